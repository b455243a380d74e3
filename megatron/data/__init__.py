"""Token files on disk, and the order in which a training run reads them.

The sequence of samples is a pure function of (files, split, sequence length, seed, number of
samples). Which rank reads which sample is arithmetic on `consumed_samples`, so a run may go on under another
data-parallel size or micro batch and still see every sample exactly once.

    train, valid, test = build_datasets(["gpt2_text_document"], "949,50,1", 128, seed=1, num_samples=(800, 80, 8))
    for indices in SampleIndexer(len(train), consumed_samples, micro_batch_size, dp_rank, dp_size):
        batch = Collator()([train[i] for i in indices])

This package imports nothing else of the project; see gpt_dataset.py, sampler.py, tokenizer.py.
"""
