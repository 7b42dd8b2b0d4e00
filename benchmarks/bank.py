# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""How the search of the memory bank grows with the number of supports, beside the forward pass of the tower.

    python -m benchmarks.bank                            # ViT-L-14-336 with random weights, 240 px

Random entries take the place of a bank of eleven versions of each support: the search does not depend on them.
"""

from pathlib import Path

import torch
from torch.nn import functional

from anomalib_mvfa.model import MVFAModel
from anomalib_mvfa.model.memory import bank_distance
from benchmarks.timing import machine, make_parser, side_by_side, write_results

SHOTS = (1, 2, 4, 8, 16)
SHARES = (1.0, 0.25, 0.1)


def draw(shares: dict[str, float], path: Path) -> None:
    """Draw the shares of a forward pass, by ``"SHOT, SHARE"``."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for share in SHARES:
        axes.plot(SHOTS, [100 * shares[f"{shot}, {share}"] for shot in SHOTS], marker="o", label=f"coreset {share:g}")
    axes.axhline(10, color="grey", linestyle=":", linewidth=1)
    axes.set(xlabel="normal supports k", ylabel="search, % of a forward pass", xscale="log", yscale="log")
    ticks = (0.5, 1, 2, 5, 10, 20, 50)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks(SHOTS, [str(shot) for shot in SHOTS])
    axes.minorticks_off()
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


@torch.inference_mode()
def main() -> None:
    """Time the search for each size, and draw it."""
    parser = make_parser(__doc__, "bank")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    facts = machine()
    torch.manual_seed(0)
    model = MVFAModel(options.backbone, pretrained="random", class_name="Brain").eval()
    images = torch.rand(1, 3, *model.image_size)
    patches = model.tower.grid_size[0] * model.tower.grid_size[1]
    queries = torch.randn(1, patches, model.backbone.model["embed_dim"])
    variants = {"forward": lambda: model.hidden_tokens(images)}
    for shot in SHOTS:
        for share in SHARES:
            count = max(1, int(11 * shot * (patches + 1) * share))
            bank = functional.normalize(torch.randn(count, model.backbone.model["embed_dim"]), dim=-1)
            variants[f"{shot}, {share}"] = lambda bank=bank: bank_distance(queries, bank)  # type: ignore[misc]
    seconds = side_by_side(variants, options.repeats)
    levels = len(model.levels)
    shares = {name: levels * value / seconds["forward"] for name, value in seconds.items() if name != "forward"}
    rows = [[str(shot), *(f"{100 * shares[f'{shot}, {share}']:.1f} %" for share in SHARES)] for shot in SHOTS]
    columns = ["k", *(f"search of {100 * share:.0f} % of the bank, of a forward pass" for share in SHARES)]
    write_results(options.output, {"machine": facts, "seconds": seconds, "share": shares}, columns, rows)
    draw(shares, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
