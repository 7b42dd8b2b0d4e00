# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Reports of comparisons with known scores."""

import csv
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from anomalib_mvfa.comparison import load_cells, write_page, write_tables
from anomalib_mvfa.comparison.page import GalleryRow, Panel, Table, gallery
from anomalib_mvfa.comparison.published import PUBLISHED
from anomalib_mvfa.comparison.report import main

SOME = ("MVFA", "WinCLIP", "mean brightness")
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Collects tags, and fails where one is closed that is not open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def render(folder, tmp_path, **options):
    write_page(load_cells(folder), tmp_path / "page.html", tmp_path / "data", **options)
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def change(cell, **values):
    path = cell / "cell.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def cell_of(folder, prefix):
    return next((folder / "cells").glob(f"{prefix}-*"))


def test_cells_are_read_as_they_were_written(comparison):
    folder = comparison(SOME)
    cells = load_cells(folder)
    assert [cell.status for cell in cells] == ["done"] * 6
    cell = next(cell for cell in cells if cell.method == "MVFA" and cell.seed == 1)
    assert (cell.set, cell.k_shot, cell.threshold, cell.supports) == ("BrainMRI", 4, 0.6, ("good/support_1.png",))
    assert cell.scores.labels.sum() == 30
    maps = cell.read_maps()
    assert maps.values.shape == maps.masks.shape == (60, 56, 56)
    assert (maps.low, maps.high) == (0.1, 0.9)
    assert next(cell for cell in cells if cell.method == "mean brightness").read_maps() is None


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda cell: (cell / "cell.json").unlink(), "not finished"),
        (lambda cell: (cell / "cell.json").write_text('{"method": "MV'), "cell.json is damaged"),
        (lambda cell: (cell / "cell.json").write_text("{}"), "lacks"),
        (lambda cell: (cell / "cell.json").write_text("[1]"), "wrong kind"),
        (lambda cell: change(cell, k_shot="four"), "wrong kind"),
        (lambda cell: change(cell, status="odd"), "neither"),
        (lambda cell: change(cell, metrics={"image_AUROC": 0.2}), "scores.csv gives"),
        (lambda cell: (cell / "scores.csv").unlink(), "scores.csv is missing"),
        (lambda cell: (cell / "scores.csv").write_text("path,label,score\na.png,0,x\n"), "line 2"),
        (lambda cell: (cell / "scores.csv").write_text("path,label,score\na.png,0,1\nb.png,2,1\n"), "line 3"),
        (lambda cell: (cell / "scores.csv").write_text("path,label,score\na.png,0,nan\n"), "not finite"),
        (lambda cell: (cell / "scores.csv").write_text("path,label,score\na.png,0,1\na.png,1,1\n"), "twice"),
        (lambda cell: (cell / "scores.csv").write_text("path,label,score\na.png,0,1\n"), "no abnormal"),
        (lambda cell: (cell / "scores.csv").write_bytes(b"path,label,score\n\xff\xfe,0,1\n"), "damaged"),
        (lambda cell: (cell / "maps.npz").unlink(), "maps.npz is missing"),
        (lambda cell: (cell / "maps.npz").write_bytes(b"PK"), "maps.npz is damaged"),
    ],
)
def test_a_broken_cell_is_reported_and_the_rest_is_used(comparison, tmp_path, spoil, reason):
    folder = comparison(SOME)
    broken = cell_of(folder, "WinCLIP")
    spoil(broken)
    cells = load_cells(folder)
    assert [cell.folder.name for cell in cells if cell.status == "unreadable"] == [broken.name]
    assert reason in next(cell.error for cell in cells if cell.status == "unreadable")
    write_tables(cells, folder)
    text = render(folder, tmp_path)
    for written in (text, (folder / "results.md").read_text(encoding="utf-8")):
        assert broken.name in written
        assert "MVFA" in written


def test_maps_that_do_not_fit_leave_the_figures(comparison, tmp_path):
    folder = comparison(SOME, seeds=1)
    cell = cell_of(folder, "WinCLIP")
    np.savez(cell / "maps.npz", maps=np.zeros((3, 4, 4), np.uint8), low=0.0, high=1.0)
    with pytest.raises(ValueError, match=r"maps\.npz.*one picture"):
        next(c for c in load_cells(folder) if c.folder == cell).read_maps()
    assert "Heatmap of MVFA" in render(folder, tmp_path)


def test_a_folder_without_cells_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="anomalib benchmark"):
        load_cells(tmp_path)


def test_the_csv_has_one_row_a_cell_with_all_that_was_measured(comparison):
    folder = comparison(SOME)
    cells = load_cells(folder)
    write_tables(cells, folder)
    with (folder / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    row = next(row for row in rows if row["method"] == "MVFA" and row["seed"] == "1")
    known = next(cell for cell in cells if cell.method == "MVFA" and cell.seed == 1)
    assert float(row["image_AUROC"]) == known.metrics["image_AUROC"]
    assert (row["pixel_Dice"], row["train_seconds"], row["status"]) == ("0.45", "12.5", "done")
    assert not list(folder.glob("*.partial"))


def test_tables_give_mean_and_spread_over_the_seeds(comparison):
    folder = comparison(SOME, seeds=3)
    cells = load_cells(folder)
    write_tables(cells, folder)
    areas = [100 * cell.metrics["image_AUROC"] for cell in cells if cell.method == "MVFA"]
    expected = f"| MVFA | {np.mean(areas):.1f} ± {np.std(areas, ddof=1):.1f} | 81.0 ± 1.0 |"
    assert expected in (folder / "results.md").read_text(encoding="utf-8")


def test_published_figures_stand_beside_the_sets_they_are_of(comparison):
    folder = comparison(SOME, name="Brain_AD")
    write_tables(load_cells(folder), folder)
    text = (folder / "results.md").read_text(encoding="utf-8")
    assert "| *MVFA, published* | *92.44* | *97.30* |" in text
    assert "| *APRIL-GAN, published* | *89.18* | *94.67* |" in text
    assert "published, not measured here" in text


def test_published_figures_do_not_stand_beside_other_sets(comparison):
    folder = comparison(SOME)
    write_tables(load_cells(folder), folder)
    assert "published" not in (folder / "results.md").read_text(encoding="utf-8").partition("## Results")[2]


def test_published_figures_have_the_published_means():
    few, zero = PUBLISHED["MVFA", 4].values(), PUBLISHED["MVFA (zero-shot)", 0].values()
    for figures, image, pixel in ((few, 88.97, 98.67), (zero, 80.43, 93.39)):
        assert np.mean([figure.image for figure in figures]) == pytest.approx(image, abs=0.006)
        assert np.mean([figure.pixel for figure in figures if figure.pixel]) == pytest.approx(pixel, abs=0.006)


def test_the_summary_claims_only_what_is_significant(comparison):
    folder = comparison(("MVFA", "mean brightness", "WinCLIP"))
    for method in ("WinCLIP", "mean brightness"):  # the former far behind, the latter the same as MVFA
        for cell in (folder / "cells").glob(f"{method.replace(' ', '_')}-*"):
            source = folder / "cells" / cell.name.replace(cell.name.split("-")[0], "MVFA")
            if method == "mean brightness":
                (cell / "scores.csv").write_text((source / "scores.csv").read_text())
                change(cell, metrics=json.loads((source / "cell.json").read_text())["metrics"])
                (cell / "maps.npz").write_bytes((source / "maps.npz").read_bytes())
    write_tables(load_cells(folder), folder)
    text = (folder / "results.md").read_text(encoding="utf-8")
    summary = text.partition("## Results")[0]
    assert "significantly better than WinCLIP" in summary
    assert "Compared with mean brightness" in summary
    assert "not significant (+0.0 points" in summary


def test_two_cells_of_one_place_are_refused(comparison):
    folder = comparison(("MVFA",), seeds=1)
    cell = cell_of(folder, "MVFA")
    other = cell.with_name("twin")
    other.mkdir()
    for file in cell.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="same method, set, shot and seed"):
        write_tables(load_cells(folder), folder)


def test_the_page_of_ten_methods_is_self_contained_and_small(comparison, tmp_path):
    text = render(comparison(), tmp_path)
    assert len(text.encode()) < 5_000_000
    tags = Page(text).tags
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in tags}
    for _, attributes in tags:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("data:image/", "#"))
    assert "url(" not in text
    assert "@import" not in text


def test_everything_on_the_page_can_be_read_aloud(comparison, tmp_path):
    tags = Page(render(comparison(SOME), tmp_path)).tags
    assert all(attributes.get("alt") for tag, attributes in tags if tag == "img")
    assert all(attributes.get("scope") in {"col", "row"} for tag, attributes in tags if tag == "th")
    drawings = [attributes for tag, attributes in tags if tag == "svg"]
    assert len(drawings) > 5
    assert all(a.get("aria-label") if a.get("role") == "img" else a.get("aria-hidden") for a in drawings)
    assert ("html", {"lang": "en"}) in tags


def test_curves_are_thin(comparison, tmp_path):
    lines = re.findall(r'points="([^"]+)"', render(comparison(images=200), tmp_path))
    assert len(lines) == 20
    assert all(10 < len(line.split()) < 300 for line in lines)


def test_file_names_do_not_reach_the_page_unless_asked_for(comparison, tmp_path):
    folder = comparison(SOME)
    change(cell_of(folder, "mean_brightness"), status="failed", error="secret/place/patient_7.png is damaged")
    write_tables(load_cells(folder), folder)
    hidden = render(folder, tmp_path)
    for text in (hidden, (folder / "results.md").read_text(encoding="utf-8")):
        for secret in ("patient", "secret", "support_0", str(tmp_path)):
            assert secret not in text
    shown = render(folder, tmp_path, show_paths=True)
    assert "Ungood/patient_0" in shown
    assert "good/support_0.png" in shown
    assert str(tmp_path) not in shown


def test_names_are_escaped(comparison, tmp_path):
    folder = comparison(SOME, seeds=1, name="<script>alert(1)</script>")
    text = render(folder, tmp_path, command="anomalib benchmark --config <x>")
    assert "<script" not in text
    assert "--config &lt;x&gt;" in text


def test_each_method_shows_its_best_and_worst_image(comparison, tmp_path):
    folder = comparison(SOME, seeds=1)
    text = render(folder, tmp_path, show_paths=True)
    cell = next(cell for cell in load_cells(folder) if cell.method == "MVFA")
    scores = cell.scores
    lowest = min((s, p) for s, p, ill in zip(scores.scores, scores.paths, scores.labels, strict=True) if ill)[1]
    highest = max((s, p) for s, p, ill in zip(scores.scores, scores.paths, scores.labels, strict=True) if not ill)[1]
    headings = re.findall(r"<h4>([^,]+), (?:ab)?normal <span>([^<]+)</span>", text)
    assert "worst of MVFA" in dict(headings)[lowest]
    assert "worst normal of MVFA" in dict(headings)[highest]


def test_images_that_are_not_there_leave_a_gap(comparison, tmp_path):
    folder = comparison(SOME, seeds=1)
    write_page(load_cells(folder), tmp_path / "page.html", tmp_path / "elsewhere")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "image not found" in text
    assert "Heatmap of MVFA" in text


def test_the_demonstration_backbone_is_called_one(comparison, tmp_path):
    folder = comparison(("MVFA",), seeds=1)
    assert "demonstration network" in render(folder, tmp_path)
    change(cell_of(folder, "MVFA"), backbone="ViT-L-14-336")
    assert "demonstration network" not in render(folder, tmp_path)
    assert "not for clinical use" in render(folder, tmp_path)


def test_heatmaps_have_one_colour_scale():
    def colours(value):
        panel = Panel("MVFA", np.full((8, 8), value, np.uint8), "0.5")
        row = GalleryRow("Image 1", "abnormal", np.zeros((8, 8, 3), np.uint8), np.eye(8, dtype=bool), [panel])
        return re.findall(r'base64,([^"]+)', gallery([row]))[-1]

    assert colours(0) == colours(0)
    assert colours(0) != colours(255)


def test_a_bar_in_a_text_does_not_split_a_markdown_cell():
    table = Table("a", ["method", "x\ny"], [["m|n", "1"]])
    assert r"| m\|n | 1 |" in table.to_markdown()
    assert "| method | x, y |" in table.to_markdown()


def test_a_comparison_is_reported_from_the_command_line(comparison, tmp_path):
    folder = comparison(SOME, seeds=1)
    main([str(folder), "--data_root", str(tmp_path / "data")])
    assert {"results.csv", "results.md", "report.html"} <= {path.name for path in folder.iterdir()}
