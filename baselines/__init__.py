"""The other ways to make a model smaller: one function each, on the same model, text and evaluator.

    network.py    a model in memory, and the calibration text with a count of how often it was used
    dropping.py   blocks, or halves of blocks, are left out
    merging.py    several blocks become one
    width.py      every block gets narrower
    flattened.py  FlattenGPT and its ablations
    methods.py    the list of them
    compare.py    python -m baselines.compare: all of them side by side
"""
