# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""What the demonstration reads from its runs."""

import csv

import pytest

from anomalib_mvfa.demo.__main__ import figures, read_predictions


def test_pictures_of_images_of_the_same_name_are_told_apart(tmp_path):
    folder = tmp_path / "images" / "img"
    folder.mkdir(parents=True)
    for name in ("0000.png", "0000_2.png", "0001.png"):
        (folder / name).touch()
    rows = [
        ("test/Ungood/img/0000.png", 0.9, 1),
        ("test/good/img/0000.png", 0.2, 0),
        ("test/good/img/0001.png", 0.6, 1),
    ]
    with (tmp_path / "images" / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "score", "label"])
        writer.writerows(rows)
    predictions = read_predictions(tmp_path / "images" / "predictions.csv")
    assert [row.picture.name for row in predictions] == ["0000.png", "0000_2.png", "0001.png"]
    found = figures(predictions)
    assert found["image_AUROC"] == 1.0
    assert found["correct"] == pytest.approx(2 / 3)
