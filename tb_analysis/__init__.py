"""Read TensorBoard event files, compare resumed runs with their Source, and say PASS or FAIL by a number.

Event files -> ``event_files`` -> ``curves`` -> ``runs`` (roles and topology) -> ``verdict`` -> ``report``,
``picture`` and ``csv_files``. Nothing here imports the training framework: it reads what a run left behind.

    python3 tb_analysis/tb_analysis_script.py --tb_dir runs/ex1/tensorboard --plot_name ex1.png
"""
