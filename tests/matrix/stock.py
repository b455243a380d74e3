"""DeepSpeed's own converter, run as its command does, for tests that hold ours against it.

run_ranks(1, stock_convert, str(native), str(output))
"""

from __future__ import annotations

from argparse import Namespace


def stock_convert(rank: int, world_size: int, source: str, output: str) -> None:
    """The body of a rank."""
    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(
        Namespace(
            input_folder=source,
            output_folder=output,
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=False,
        )
    )
