"""Run some blocks more than once, without training: the opposite of making them fewer.

    x <- (1 - 1/K) x + (1/K) g(x), K times       g: the blocks of a window, one after the other

K = 1 is the dense model. Beside this damped loop stands the undamped one, x <- g(x), which shows
what damping is for. After the published description of Training-Free Looped Transformers
(arXiv 2605.23872); not a reproduction. Tables, and loops with training: docs/looping.md.

    python -m beyond.loop --ckpt PATH --window 10-13 8-15 --times 2 3
"""
from itertools import product

from torch import Tensor, nn

import console
from checkpoint.reader import Checkpoint
from console.options import add_device_options, compute_dtype
from evaluate import losses, windows_of
from model import load
from text.tokenizer import load_tokenizer
from text.wikitext import evaluation_text


class Loop(nn.Module):
    """Run blocks K = `times` times, in the place of one block. Without a cache: it only reads.

    Damped: x <- (1 - 1/K) x + (1/K) g(x), else x <- g(x), for a stream x (B, T, C).
    """

    def __init__(self, blocks: nn.ModuleList, times: int, damped: bool):
        super().__init__()
        self.blocks, self.times, self.share = blocks, times, 1 / times if damped else 1.0

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: None = None,
                number: int = 0) -> Tensor:
        for _ in range(self.times):
            y = x
            for block in self.blocks:
                y = block(y, rope)
            x = (1 - self.share) * x + self.share * y                       # y for a share of 1
        return x


def looped(blocks: nn.ModuleList, first: int, last: int, times: int,
           damped: bool) -> nn.ModuleList:
    """Return the blocks of a model, of which those from first to last loop."""
    middle = Loop(blocks[first:last + 1], times, damped)
    return nn.ModuleList([*blocks[:first], middle, *blocks[last + 1:]])


def window(word: str) -> tuple[int, int]:
    """Read a window first-last, both blocks included."""
    first, last = map(int, word.split("-"))
    return first, last


def main() -> None:
    parser = console.parser("Run some blocks more than once.", __doc__)
    add = parser.add_argument
    add("--ckpt", required=True, help="the dense model")
    add("--window", nargs="+", type=window, required=True, metavar="FIRST-LAST",
        help="blocks to loop, as in 8-11")
    add("--times", nargs="+", type=int, default=[2, 3, 4], help="how often (default 2 3 4)")
    add("--data", help="a text to judge by, as for evaluate.py")
    add("--length", type=int, default=512, help="tokens in a window of text (default %(default)s)")
    add("--max-windows", type=int, help="judge on at most this many windows of text")
    add_device_options(parser)
    args = parser.parse_args()
    source = Checkpoint(args.ckpt)
    L = source.config.num_hidden_layers
    if min(args.times) < 1 or not all(first <= last < L for first, last in args.window):
        raise ValueError(f"--window: expected FIRST-LAST, in blocks 0-{L - 1}, and --times of at "
                         "least 1")
    text, name = evaluation_text(args.data)
    windows = windows_of(load_tokenizer(source.path).encode(text), args.length, args.max_windows)
    net = load(source.path, args.device, compute_dtype(args.dtype, args.device, source.dtype))
    blocks = net.model["layers"]

    def perplexity(layers: nn.ModuleList) -> str:
        net.model["layers"] = layers
        return f"{losses(net, windows, args.device).double().mean().exp():.4f}"
    print(f"judged on {len(windows)} windows of {args.length} tokens of {name}\n"
          "| blocks | K | damped | undamped |\n|---|---|---|---|")
    print(f"| dense | 1 | {perplexity(blocks)} | |", flush=True)
    for (first, last), K in product(args.window, args.times):
        scores = [perplexity(looped(blocks, first, last, K, damped)) for damped in (True, False)]
        print(f"| {first}-{last} | {K} | {' | '.join(scores)} |", flush=True)


if __name__ == "__main__":
    console.run(main)
