"""The lines that a run prints about each merged block."""
import torch
from torch import Tensor

from checkpoint.config import Config

ERRORS = ("flattened", "selected", "compensated", "refit")


def kept(group: dict, config: Config) -> dict[str, str]:
    """Return how many heads and channels each member of a pruned group kept, as "1+3"."""
    if "kv_heads" not in group:
        return {}
    return {"heads": "+".join(str(len(member) * config.n_rep) for member in group["kv_heads"]),
            "channels": "+".join(str(len(member)) for member in group["channels"])}


def row(group: dict, config: Config) -> str:
    """Describe a group in one line: what was joined, what each member kept, and the errors."""
    first, last = group["blocks"][0], group["blocks"][-1]
    line = f"blocks {first}-{last}   similarity {group['similarity']:.3f}"
    line += f"   damage {group['damage']:.3f}" if "damage" in group else ""
    if numbers := kept(group, config):
        line += f"   heads {numbers['heads']}   channels {numbers['channels']}"
        line += " (q_norm, k_norm: attention of one member, whole)" if config.qk_norm else ""
    errors = [f"{name} {group[f'error_{name}']:.1%}" for name in ERRORS if f"error_{name}" in group]
    return f"{line}   error: {', '.join(errors)}"


def explain(groups: list[dict], S: Tensor, config: Config) -> None:
    """Print how the groups came about and what pruning saw."""
    print("\nsimilarity of neighbours' inputs, S[i, i+1]: "
          + " ".join(f"{value:.3f}" for value in S.diagonal(1)))
    for group in groups:
        if "head_scores" not in group:
            continue
        first, last, width = group["blocks"][0], group["blocks"][-1], len(group["blocks"])
        scores = torch.tensor(group["head_scores"]).view(width, -1).mean(1)
        print(f"blocks {first}-{last}: mean head score of each member "
              f"{' '.join(f'{score:.3g}' for score in scores)}; the "
              f"{width * config.intermediate_size} channels have "
              f"{group['effective_dimension']:.1f} effective dimensions at ridge "
              f"{group['ridge']:.3g}")
    if any("damage" in group for group in groups):
        print("damage: how far the predictions move from the dense model's if these blocks alone "
              "are merged, KL in nats a token")
    print("errors: |y - dense| / |dense - x|, mean over tokens of one calibration window in "
          "sixteen\n"
          "  flattened     the blocks side by side\n"
          "  selected      only the best heads and channels\n"
          "  compensated   the other channels folded in\n"
          "  refit         fitted; measured against the stream of the whole dense model, so with "
          "what earlier groups lost")
