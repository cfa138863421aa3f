"""The other ways to make a model smaller: one function each, on the same model, text and evaluator.

    network.py      a model in memory, and the calibration text with a count of its passes
    dropping.py     blocks, or halves of blocks, are left out
    patching.py     blocks are left out, and the rest is made to fit again
    merging.py      several blocks become one
    width.py        every block gets narrower
    fisher.py       the same, by the gradients of masks
    flattened.py    FlattenGPT and its ablations
    swaps.py        another elimination for our fit: OSSCAR's swaps
    methods.py      the list of all methods
    harness.py      python -m compare: all methods side by side, into tables like those in results/
    judge.py        how good a compressed model is
    rows.py         the results that are kept, one row for each method, ratio and seed
    tables.py       tables and figures of them
    zeroshot.py     python -m compare.zeroshot: multiple-choice questions
    tasks.py        how those questions are read and worded
    speed.py        python -m compare.speed: how fast the result reads and writes
    cost.py         python -m compare.cost: what flattening takes, next to transformers
    refit_cost.py   python -m compare.refit_cost: what the fit takes, next to the paper's pruning
"""
