"""The bundled checkpoint teaches what it should."""
import math

import torch

from calibrate import calibration_tokens
from checkpoint.reader import Checkpoint
from compare.network import whole
from demo.tour import variants
from evaluate import losses, windows_of
from flatten import BUNDLED
from model import Runner
from text.stdlib import text
from text.tokenizer import load_tokenizer


def test_joining_blocks_costs_less_than_pruning_them_and_that_less_than_dropping():
    source, tokenizer = Checkpoint(BUNDLED), load_tokenizer(BUNDLED)
    ids, judged = (torch.tensor(tokenizer.encode(text(evaluation))) for evaluation in (False, True))
    tokens = calibration_tokens(ids, 16, 256, seed=0)
    runner = Runner(source.config, 256, "cpu", torch.float32)
    _, models = variants(source, 0.2, None, 10.0, tokens, runner)
    windows, scores = windows_of(judged, 256)[::16], {}
    for name, network in models.items():
        loss = losses(whole(network, runner), windows, "cpu").double().mean()
        scores[name] = math.exp(loss)
    dense, dropped, wide, _, pruned = scores.values()
    assert dense < wide <= pruned < dropped, scores
    assert wide - dense < 0.1 * (dropped - dense), scores  # what is lost is lost in pruning


def test_the_folder_is_small():
    assert sum(path.stat().st_size for path in BUNDLED.parent.rglob("*") if path.is_file()) < 15e6
