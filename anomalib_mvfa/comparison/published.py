# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Results that others published, to stand beside what was measured here."""

from collections.abc import Mapping

__all__ = ["PAPER_SETS", "PUBLISHED", "SOURCE", "paper_set"]

SOURCE = (
    "Huang et al., Adapting Visual-Language Models for Generalizable Anomaly Detection in Medical Images, CVPR 2024, "
    "arXiv 2403.12570"
)
PAPER_SETS = ("Histopathology", "Chest", "Retina_OCT2017", "Brain", "Liver", "Retina_RESC")
"""The sets in the order of the paper's tables. The last three have masks."""


def _row(image: tuple[float, ...], pixel: tuple[float, ...] = ()) -> dict[tuple[str, str], float]:
    known = {(name, "image"): value for name, value in zip(PAPER_SETS, image, strict=True)}
    return known | {(name, "pixel"): value for name, value in zip(PAPER_SETS[-len(pixel) :], pixel, strict=False)}


PUBLISHED: Mapping[tuple[str, int], Mapping[tuple[str, str], float]] = {
    ("MVFA", 2): _row((82.61, 81.32, 97.98, 92.72, 81.08, 91.36)),
    ("MVFA", 4): _row((82.71, 81.95, 99.38, 92.44, 81.18, 96.18), (97.30, 99.73, 98.97)),
    ("MVFA", 8): _row((85.10, 83.89, 99.64, 92.61, 85.90, 96.57)),
    ("MVFA", 16): _row((82.62, 85.72, 99.66, 94.40, 83.85, 97.25)),
    ("WinCLIP", 4): _row((67.49, 70.00, 97.89, 66.85, 67.19, 88.83), (94.16, 96.75, 96.68)),
    ("APRIL-GAN", 4): _row((76.11, 77.43, 99.41, 89.18, 53.05, 94.70), (94.67, 96.24, 97.98)),
    ("MVFA (zero-shot)", 0): _row((77.90, 71.11, 95.40, 78.63, 76.24, 83.31), (90.27, 97.85, 92.05)),
    ("WinCLIP (zero-shot)", 0): _row((69.85, 70.86, 46.64, 66.49, 64.20, 42.51), (85.99, 96.20, 80.56)),
    ("APRIL-GAN (zero-shot)", 0): _row((72.36, 57.49, 92.61, 76.43, 70.57, 75.67), (91.79, 97.05, 85.23)),
}
"""AUROC in percent of the paper's tables, by method and shot, then by set and level (image or pixel)."""


def paper_set(name: str) -> str | None:
    """Find the published name of a set, whatever its letter case and with or without ``_AD``.

    Example:
        >>> paper_set("brain_AD"), paper_set("BrainMRI")
        ('Brain', None)
    """
    known = {published.lower(): published for published in PAPER_SETS}
    return known.get(name.lower().removesuffix("_ad"))
