# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Loading: a plain folder is read ahead, and files that cannot be read are reported and have no prediction."""

import csv
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.engine import Engine
from PIL import Image
from torch.utils.data import DataLoader

from anomalib_mvfa import MVFA
from anomalib_mvfa.callbacks.loading import read_ahead
from anomalib_mvfa.data.medical_dataset import ReportedBatch, ReportingDataset


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Two pictures, one of 16 bits, and three files that are none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a.png", "z.png"):
        Image.effect_noise((40, 30), 60).save(folder / name)
    Image.fromarray(np.linspace(0, 4095, 1200).astype(np.uint16).reshape(30, 40)).save(folder / "wide.png")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:300])
    (folder / "text.png").write_text("words")
    (folder / "zero.png").write_bytes(b"")
    return folder


def test_plain_folder_is_predicted_although_files_cannot_be_read(pictures, tmp_path, caplog):
    engine = Engine(accelerator="cpu", default_root_dir=tmp_path / "results", enable_progress_bar=False, logger=False)
    with caplog.at_level(logging.ERROR):
        batches = engine.predict(MVFA("tiny", class_name="Brain"), data_path=pictures)
    scores = {Path(batch.image_path[0]).name: float(batch.pred_score) for batch in batches}
    assert {name for name, score in scores.items() if score == score} == {"a.png", "z.png"}
    assert {Path(batch.image_path[0]).name for batch in batches if -1 not in batch.pred_label} == {"a.png", "z.png"}
    (table,) = (tmp_path / "results").rglob("predictions.csv")
    with table.open(newline="", encoding="utf-8") as file:
        rows = {Path(row["path"]).name: row for row in csv.DictReader(file)}
    damaged = "truncated, damaged or not an image"
    assert {name: row["error"] for name, row in rows.items()} == {
        "a.png": "",
        "cut.png": damaged,
        "text.png": damaged,
        "wide.png": "has more than 8 bits a pixel; --data MedicalFolder --data.path FOLDER reads it",
        "z.png": "",
        "zero.png": "the file is empty",
    }
    assert not any(row["label"] for row in rows.values() if row["error"])
    assert {path.name for path in table.parent.rglob("*.png")} == {"a.png", "z.png"}
    assert f"4 of 6 images could not be read; the column 'error' of {table}" in caplog.text


def test_other_processes_read_a_plain_folder_ahead(pictures, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    dataset = PredictDataset(pictures / "a.png")
    loader = DataLoader(dataset, collate_fn=dataset.collate_fn)
    ahead = read_ahead(loader)
    assert ahead.num_workers == 1
    assert [batch.image_path for batch in ahead] == [batch.image_path for batch in loader]
    assert [batch.explanation for batch in ahead] == [[""]]
    assert read_ahead(ahead) is ahead
    monkeypatch.setattr("multiprocessing.get_start_method", lambda: "spawn")
    assert read_ahead(loader).num_workers == 0


def test_loaders_of_other_data_sets_are_left_alone(pictures):
    class Own(PredictDataset):
        pass

    for other in (DataLoader(torch.arange(3)), DataLoader(Own(pictures))):
        assert read_ahead(other) is other


def test_file_that_may_not_be_read_is_reported_as_such(pictures, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError

    monkeypatch.setattr("anomalib.data.predict.read_image", refuse)
    assert ReportingDataset(PredictDataset(pictures))[0].explanation == "permission denied"


def test_unreadable_images_have_no_prediction_whoever_sets_one():
    batch = ReportedBatch(image=torch.zeros(3, 3, 4, 4), explanation=["", "the file is empty", ""])
    batch.update(pred_score=torch.tensor([1.0, 2.0, 0.0]), anomaly_map=torch.ones(3, 4, 4))
    batch.pred_label = batch.pred_score > 0.5  # as a post-processor does
    batch.pred_mask = batch.anomaly_map > 0.5
    assert batch.pred_score.isnan().tolist() == [False, True, False]
    assert batch.anomaly_map.isnan().flatten(1).all(1).tolist() == [False, True, False]
    assert batch.pred_label.tolist() == [1, -1, 0]
    assert [None if item.pred_label is None else bool(item.pred_label) for item in batch] == [True, None, False]
    assert [item.pred_mask is None for item in batch] == [False, True, False]


def test_batch_of_readable_images_is_anomalibs():
    batch = ReportedBatch(image=torch.zeros(2, 3, 4, 4), explanation=["", ""])
    batch.update(pred_score=torch.tensor([1.0, 2.0]), pred_label=torch.tensor([1, 0]))
    assert batch.pred_score.tolist() == [1, 2]
    assert batch.pred_label.dtype == torch.bool
