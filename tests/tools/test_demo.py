# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The demonstration: what it reads from its runs, its page, and a user's folder."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from anomalib_mvfa.comparison.cells import Cell
from anomalib_mvfa.comparison.statistics import ImageScores
from tools.demo import __main__ as demo
from tools.demo.page import StepError, summarise, write_page

NORMAL, ABNORMAL = 4, 6
PATHS = tuple(f"test/{'good' if i < NORMAL else 'Ungood'}/{i:02d}.png" for i in range(NORMAL + ABNORMAL))
LABELS = np.arange(NORMAL + ABNORMAL) >= NORMAL


def _cell(
    root: Path, method: str, seed: int, scores: np.ndarray, threshold: float | None = 0.5, **metrics: float
) -> Cell:
    folder = root / f"{method}{seed}"
    folder.mkdir(parents=True)
    levels = np.zeros((len(PATHS), 8, 8), dtype=np.uint8)
    levels[LABELS, 2:5, 2:5] = 255
    np.savez(folder / "maps.npz", maps=levels, low=0.0, high=1.0, masks=(levels > 0).astype(np.uint8))
    return Cell(
        folder,
        method=method,
        seed=seed,
        metrics=metrics,
        threshold=threshold,
        config={"source": {"init_args": {"root": str(root)}}},
        scores=ImageScores(PATHS, LABELS, scores),
    )


@pytest.fixture
def cells(tmp_path, monkeypatch):
    for path in PATHS:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (90, 90, 90)).save(tmp_path / path)
    good, bad = LABELS.astype(float), np.ones(len(PATHS))
    made = [
        _cell(tmp_path, "MVFA", 0, good, image_AUROC=0.9, pixel_AUROC=0.8),
        _cell(tmp_path, "MVFA", 1, bad, image_AUROC=0.8, pixel_AUROC=0.6),
        _cell(tmp_path, "WinCLIP", 0, bad, image_AUROC=0.5, pixel_AUROC=0.5),
        _cell(tmp_path, "mean brightness", 0, bad, threshold=None, image_AUROC=0.55),
    ]
    monkeypatch.setattr("tools.demo.page.load_cells", lambda _folder: made)
    return made


def test_rows_hold_means_over_the_draws_and_the_share_of_correct_labels(cells, tmp_path):
    rows = {row[0]: row[1:] for row in summarise(tmp_path).rows}
    assert rows["MVFA, 4-shot"] == ("0.850 ± 0.071", "0.700 ± 0.141", "80 %")  # 10 of 10 and 6 of 10
    assert rows["WinCLIP, 4-shot, same backbone"] == ("0.500", "0.500", "60 %")
    assert rows["mean brightness"] == ("0.550", "-", "-")
    assert next(iter(rows)) == "MVFA, 4-shot"


def test_examples_lie_at_even_distances_and_carry_both_methods(cells, tmp_path):
    examples = summarise(tmp_path).examples
    assert [example.title for example in examples] == ["05, abnormal", "07, abnormal", "09, abnormal", "02, normal"]
    labels = [{name: label for name, (_, label) in example.heatmaps.items()} for example in examples]
    assert labels[0] == {"MVFA": "abnormal", "WinCLIP": "abnormal"}
    assert labels[-1] == {"MVFA": "normal", "WinCLIP": "abnormal"}
    heat = np.asarray(examples[0].heatmaps["MVFA"][0]).astype(int)
    assert heat[80, 80, 0] - heat[80, 80, 2] > 60  # warm inside the lesion
    assert abs(heat[200, 200] - 90).max() < 3
    outlined = np.asarray(examples[0].image).astype(int)
    assert (outlined[..., 2] - outlined[..., 0] > 60).any()
    assert (np.asarray(examples[-1].image) == 90).all()  # a normal image has no outline


def test_a_failed_cell_is_reported_with_its_reason(cells, tmp_path, monkeypatch):
    failed = Cell(tmp_path / "broken", status="failed", error="no memory")
    monkeypatch.setattr("tools.demo.page.load_cells", lambda _folder: [*cells, failed])
    with pytest.raises(ValueError, match="broken failed: no memory"):
        summarise(tmp_path)


def test_page_begins_with_pictures_then_results_then_commands_and_escapes_names(cells, tmp_path):
    summaries = {"<b>set": summarise(tmp_path)}
    page = write_page(
        tmp_path / "page.html", summaries, ["anomalib train --x '<y>'"], {"Log": tmp_path / "log"}, "Limits."
    )
    text = page.read_text()
    positions = [text.index(part) for part in ("data:image/jpeg", "0.850 ± 0.071", "anomalib train", "make demo DATA")]
    assert positions == sorted(positions)
    assert "were chosen by their results" in text
    own = write_page(tmp_path / "own.html", summaries, [], {}, "").read_text()  # a user's images
    assert "chosen by their results" not in own
    assert "<b>set" not in text
    assert "&lt;b&gt;set" in text
    assert "&lt;y&gt;" in text
    assert "<script" not in text
    assert not re.search(r"src=\"http|href=\"http", text)


def test_a_folder_of_images_is_described_with_masks_only_where_there_are_any(tmp_path):
    for name in ("normal", "abnormal"):
        (tmp_path / name).mkdir()
    (source,) = demo.user_folder(tmp_path).values()
    assert "mask_dir" not in source["init_args"]
    (tmp_path / "masks").mkdir()
    (source,) = demo.user_folder(tmp_path).values()
    assert source["init_args"]["mask_dir"] == "masks"
    assert source["class_path"] == "Folder"


def test_a_folder_without_classes_is_refused_with_the_remedy(tmp_path, capsys):
    (tmp_path / "normal").mkdir()
    with pytest.raises(SystemExit, match=r"no folder abnormal.*normal/ and abnormal/"):
        demo.main(["--data", str(tmp_path), "--output", str(tmp_path / "out")])


def test_full_size_weights_are_used_where_they_were_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert not demo.has_full_size_weights()
    (tmp_path / ".cache/clip").mkdir(parents=True)
    (tmp_path / ".cache/clip/ViT-L-14-336px.pt").touch()
    assert demo.has_full_size_weights()


def test_a_command_that_fails_ends_the_demonstration_with_the_end_of_the_log(tmp_path):
    console = Console(file=(tmp_path / "out.txt").open("w"), width=200)
    run = demo.Demonstration(tmp_path, {}, {}, None, console=console)
    run.log.write_text("")
    with pytest.raises(StepError, match=r"demo\.log(.|\n)*nonsense"):
        run.run("A step", [["nonsense"]])
    assert "$ anomalib nonsense" in (tmp_path / "out.txt").read_text()
