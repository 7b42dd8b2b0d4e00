# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Tables and pictures: names of files, and images that cannot be read."""

import csv
import logging
from pathlib import Path

import pytest
import torch
from anomalib.data import ImageBatch, PredictDataset
from anomalib.engine import Engine
from PIL import Image
from torch.utils.data import DataLoader

from anomalib_mvfa import MVFA
from anomalib_mvfa.callbacks.loading import ReportingDataset, read_ahead, withhold
from anomalib_mvfa.visualization import claim_name


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Two pictures, and three files that are none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a.png", "z.png"):
        Image.effect_noise((40, 30), 60).save(folder / name)
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
    (table,) = (tmp_path / "results").rglob("predictions.csv")
    with table.open(newline="", encoding="utf-8") as file:
        errors = {Path(row["path"]).name: row["error"] for row in csv.DictReader(file)}
    damaged = "truncated, damaged or not an image"
    assert errors == {
        "a.png": "",
        "cut.png": damaged,
        "text.png": damaged,
        "z.png": "",
        "zero.png": "the file is empty",
    }
    assert {path.name for path in table.parent.rglob("*.png")} == {"a.png", "z.png"}
    assert f"3 of 5 images could not be read; the column 'error' of {table}" in caplog.text


def test_only_datasets_of_anomalib_itself_are_adopted(pictures):
    class Own(PredictDataset):
        pass

    dataset, own = PredictDataset(pictures), Own(pictures)
    ReportingDataset.adopt(dataset)
    ReportingDataset.adopt(own)
    ReportingDataset.adopt(None)
    assert type(dataset) is ReportingDataset
    assert type(own) is Own
    assert dataset[0].explanation == ""


def test_other_processes_read_a_plain_folder_ahead(pictures, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    dataset = PredictDataset(pictures)
    ReportingDataset.adopt(dataset)
    loader = DataLoader(dataset, collate_fn=dataset.collate_fn)
    ahead = read_ahead(loader)
    assert ahead.num_workers == 2
    assert [batch.image_path for batch in ahead] == [batch.image_path for batch in loader]
    assert read_ahead(ahead) is ahead
    other = DataLoader(torch.arange(3))
    assert read_ahead(other) is other
    monkeypatch.setattr("multiprocessing.get_start_method", lambda: "spawn")
    assert read_ahead(loader) is loader


def test_file_that_may_not_be_read_is_reported_as_such(pictures, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError

    monkeypatch.setattr("anomalib.data.predict.read_image", refuse)
    dataset = PredictDataset(pictures)
    ReportingDataset.adopt(dataset)
    assert dataset[0].explanation == "permission denied"


def test_only_unread_images_lose_their_predictions():
    batch = ImageBatch(image=torch.zeros(3, 3, 4, 4), explanation=["", "the file is empty", ""])
    batch.update(pred_score=torch.tensor([1.0, 2.0, 3.0]), anomaly_map=torch.ones(3, 4, 4))
    withhold(batch)
    assert batch.pred_score.isnan().tolist() == [False, True, False]
    assert batch.anomaly_map.isnan().flatten(1).all(1).tolist() == [False, True, False]


def test_batch_without_explanations_is_left_alone():
    batch = ImageBatch(image=torch.zeros(2, 3, 4, 4))
    batch.update(pred_score=torch.tensor([1.0, 2.0]))
    withhold(batch)
    assert batch.pred_score.tolist() == [1, 2]


def test_names_are_given_out_once_and_again_to_the_same_source():
    taken: dict[Path, str] = {}
    names = [claim_name(Path("x/a.b.png"), source, taken) for source in ("one", "two", "three", "two")]
    assert names == [Path("x/a.b.png"), Path("x/a.b_2.png"), Path("x/a.b_3.png"), Path("x/a.b_2.png")]
    volumes = [claim_name(Path("v.1_anomaly.nii.gz"), source, taken) for source in ("one", "two")]
    assert volumes == [Path("v.1_anomaly.nii.gz"), Path("v.1_anomaly_2.nii.gz")]
