"""All methods by name: the function, and where it is from.

A function takes a dense network, the number of blocks to remove and the calibration text.
It returns a network.
"""
from functools import partial

from beyond.refit import PARTS
from beyond.regression import RIDGE
from compare import dropping, fisher, flattened, merging, patching, sharing, swaps, width

PAPER = "FlattenGPT, arXiv 2602.08858"


def ablation(**options) -> partial:
    """Return the paper's method with other options."""
    return partial(flattened.flattengpt, **options)


def fit(**options) -> partial:
    """Return our fit with other options."""
    return partial(flattened.refit, **options)


METHODS = {
    "last": (dropping.last_blocks, "reverse order, arXiv 2411.15558"),
    "shortgpt": (dropping.shortgpt, "ShortGPT, arXiv 2403.03853"),
    "sleb": (dropping.sleb, "SLEB, arXiv 2402.09025"),
    "shortened-ppl": (dropping.shortened_ppl, "Shortened-LLaMA, arXiv 2402.02834"),
    "taylor+": (dropping.taylor_plus, "Shortened-LLaMA, arXiv 2402.02834"),
    "magnitude+": (dropping.magnitude_plus, "Shortened-LLaMA, arXiv 2402.02834"),
    "blockpruner": (dropping.blockpruner, "BlockPruner, arXiv 2406.10594"),
    "finercut": (dropping.finercut, "FinerCut, arXiv 2405.18218, sized in parameters"),
    "streamline-first": (dropping.streamline_first,
                         "LLM-Streamline, arXiv 2403.19135, before training"),
    "streamline-linear": (dropping.streamline_linear,
                          "LLM-Streamline's window, our closed-form replacement"),
    "replaceme": (patching.replaceme, "ReplaceMe, arXiv 2505.02819, least squares"),
    "linearpatch": (patching.linearpatch, "LinearPatch, arXiv 2505.24680, before training"),
    "prune-comp": (patching.prune_and_comp, "Prune&Comp, arXiv 2507.18212, Block Influence"),
    "fcm": (dropping.fcm, "FCM layer fusion, NeurIPS 2026, keep-one rule"),
    "laco-paper": (merging.laco_paper, "LaCo, arXiv 2402.11187"),
    "laco-released": (merging.laco_released, "LaCo, as its released code computes"),
    "swm": (merging.sliding_window_merging, "Sliding-Window-Merging, arXiv 2502.19159"),
    "mka": (merging.mka, "MKA, arXiv 2406.16330, pairwise merge"),
    "come": (merging.come, "CoMe, arXiv 2510.15304"),
    "come-posterior": (merging.come_posterior, "CoMe-P, arXiv 2510.15304"),
    "width": (width.uniform, "channel pruning, MoDeGPT type I (arXiv 2408.09632) for the MLP"),
    "flap": (width.flap, "FLAP, arXiv 2312.11983, uniform widths"),
    "2ssp": (width.two_stages, "2SSP, arXiv 2501.17771"),
    "kwon-fisher": (fisher.kwon, "Kwon et al. 2022, arXiv 2204.09656, uniform widths"),
    "tied-lowrank": (sharing.tied_low_rank,
                     "control: shared blocks with low-rank differences (arXiv 2410.20672)"),
    "width-refit": (width.refit, "control: our fit, every block narrower"),
    "drop-refit": (fit(first_only=True), "control: our fit, but only the first of a group stays"),
    "drop-refit-damage": (fit(first_only=True, by_damage=True),
                          "control: drop-refit, grouped by measured damage"),
    "flattengpt": (flattened.flattengpt, PAPER),
    "flat-refit": (flattened.refit, "ours: fitted to the dense model, grouped by similarity"),
    "flat-refit-damage": (fit(by_damage=True), "ours: fitted, grouped by damage (the default)"),
    "flat-refit-swaps": (fit(eliminators=swaps.SWAPPING),
                         "ours: flat-refit with OSSCAR's swaps (arXiv 2403.12983)"),
    **{f"flat-refit-no-{part}": (fit(parts=tuple(set(PARTS) - {part})),
                                 f"ours: flat-refit without {what}")
       for part, what in (("align", "alignment"), ("eliminate", "elimination"),
                          ("values", "new values"), ("dense", "the dense target"))},
    **{f"flat-refit-ridge-{ridge:g}": (fit(ridge=ridge),
                                       f"ours: flat-refit, ridge {ridge:g}, not {RIDGE:g}")
       for ridge in (0.1, 1.0, 10.0)},
    "flat-wide": (flattened.wide, f"{PAPER}: flattening alone, no parameter removed"),
    "flat-heads-only": (ablation(channels=False), f"{PAPER}: only heads pruned"),
    "flat-channels-only": (ablation(heads=False), f"{PAPER}: only channels pruned"),
    "flat-selection": (ablation(compensate=False), f"{PAPER}: without compensation"),
    "flat-pairs": (ablation(max_group=2), f"{PAPER}: groups of two only"),
    "flat-magnitude": (ablation(score=flattened.magnitude_score),
                       f"{PAPER}: channels by magnitude"),
    "flat-wanda": (ablation(score=flattened.wanda_score), f"{PAPER}: channels as in Wanda"),
    "flat-random": (ablation(score=flattened.random_score), f"{PAPER}: random channels"),
    **{f"flat-ridge-{ridge:g}": (ablation(ridge=ridge), f"{PAPER}: ridge {ridge:g} instead of 10")
       for ridge in (1e-4, 1e-3, 1e-2, 0.1, 1.0, 100.0)},
}
