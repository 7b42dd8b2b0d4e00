# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Coverage of the 95 % intervals and size of the paired test of a comparison, on simulated scores.

    python -m benchmarks.coverage --repetitions 1000

Scores are normally distributed; the shift of the abnormal ones gives the true AUROC. In the clustered
settings each patient has ten slices, all normal or all abnormal, whose scores share a part of their variance (the
intra-class correlation). "Clustered" uses the patients as groups, "as if independent" ignores them. The paired test
compares two methods with the same true area; it should reject in 5 % of the repetitions.
"""

import argparse

import numpy as np
from scipy.stats import norm

from anomalib_mvfa.comparison.statistics import ImageScores, area, area_difference, bca_interval, bootstrap

SETTINGS = [
    # true area, patients of each class, slices of each patient, intra-class correlation
    (0.7, 20, 1, 0.0),
    (0.9, 20, 1, 0.0),
    (0.96, 20, 1, 0.0),
    (0.7, 100, 1, 0.0),
    (0.9, 100, 1, 0.0),
    (0.96, 100, 1, 0.0),
    (0.7, 20, 10, 0.3),
    (0.9, 20, 10, 0.3),
    (0.96, 20, 10, 0.3),
    (0.7, 20, 10, 0.6),
    (0.9, 20, 10, 0.6),
    (0.96, 20, 10, 0.6),
]


def simulate(
    rng: np.random.Generator, true: float, patients: int, slices: int, correlation: float, grouped: bool
) -> list[ImageScores]:
    """Return the scores of two methods of the same true area, which share half of their variance."""
    images = 2 * patients * slices
    groups = np.repeat(np.arange(2 * patients), slices)
    labels = groups >= patients

    def noise() -> np.ndarray:
        by_patient = rng.normal(size=2 * patients)[groups]
        return correlation**0.5 * by_patient + (1 - correlation) ** 0.5 * rng.normal(size=images)

    shared = noise()
    shift = 2**0.5 * norm.ppf(true)
    names = tuple(f"{index:05}" for index in range(images))
    known = tuple(map(str, groups)) if grouped else ()
    return [ImageScores(names, labels, (shared + noise()) / 2**0.5 + shift * labels, known) for _ in range(2)]


def main() -> None:
    """Print a table in percent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap intervals beside")
    options = parser.parse_args()
    header = ["AUROC", "patients", "slices", "correlation", "groups", "logit", "BCa", "percentile", "test rejects"]
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|")
    for setting in SETTINGS:
        true, patients, slices, correlation = setting
        for grouped in (True, False) if slices > 1 else (False,):
            rng = np.random.default_rng(0)
            covered, rejected = np.zeros(3), 0
            for _ in range(options.repetitions):
                first, second = simulate(rng, *setting, grouped)
                sample = bootstrap((first,), draws=options.draws)["image_AUROC"]
                percentile = np.quantile(sample.draws, [0.025, 0.975])
                for index, (low, high) in enumerate((area([first]).interval(), bca_interval(sample), percentile)):
                    covered[index] += low <= true <= high
                rejected += area_difference([first], [second]).p_value() < 0.05
            kind = "clustered" if grouped else "as if independent" if slices > 1 else "-"
            shares = " | ".join(f"{100 * share / options.repetitions:.1f}" for share in (*covered, rejected))
            print(f"| {true} | 2 x {patients} | {slices} | {correlation} | {kind} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
