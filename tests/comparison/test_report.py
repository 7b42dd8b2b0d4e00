# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Reports of comparisons with known scores."""

import base64
import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from anomalib_mvfa.comparison import load_cells, write_page, write_tables
from anomalib_mvfa.comparison.page import heatmap
from anomalib_mvfa.comparison.report import PUBLISHED, FinishedCells, environment
from anomalib_mvfa.comparison.statistics import area, differences, holm, image_metrics, intervals

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


def written(folder):
    write_tables(load_cells(folder), folder)
    return (folder / "results.md").read_text(encoding="utf-8")


def rewrite_scores(folder, prefix, scores_of):
    """Replace the scores of cells by a function of labels and seed, with the AUROC that belongs to them."""
    for cell in (folder / "cells").glob(f"{prefix}-*"):
        table = pd.read_csv(cell / "scores.csv")
        table["score"] = scores_of(table.label.to_numpy(), json.loads((cell / "cell.json").read_text())["seed"])
        table.to_csv(cell / "scores.csv", index=False)
        known = json.loads((cell / "cell.json").read_text())["metrics"]
        metrics = image_metrics(table.label.to_numpy() == 1, table.score.to_numpy())
        change(cell, metrics=known | {name: float(value[0]) for name, value in metrics.items()})


def noisy(shift, noise_seed=0):
    return lambda labels, seed: shift * labels + np.random.default_rng([seed, noise_seed]).normal(size=len(labels))


def render(folder, tmp_path, **options):
    write_page(load_cells(folder), tmp_path / "page.html", {"BrainMRI": tmp_path / "data"}, **options)
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def change(cell, **values):
    path = cell / "cell.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def cell_of(folder, prefix):
    return next((folder / "cells").glob(f"{prefix}-*"))


def test_cells_are_read_as_they_were_written(comparison):
    folder = comparison(SOME)
    cells = load_cells(folder)
    assert [cell.status for cell in cells] == ["done"] * 5
    cell = next(cell for cell in cells if cell.method == "MVFA" and cell.seed == 1)
    assert (cell.set, cell.k_shot, cell.threshold, cell.supports) == ("BrainMRI", 4, 0.6, ("good/support_1.png",))
    assert cell.scores.labels.sum() == 30
    assert cell.scores.groups == ()
    assert (cell.shown["abnormal"], cell.machine) == (4, "Processor, 1 threads")
    maps = cell.read_maps()
    assert maps.levels.shape == maps.masks.shape == (60, 56, 56)
    assert next(cell for cell in cells if cell.method == "mean brightness").read_maps() is None


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda cell: (cell / "cell.json").unlink(), "not finished"),
        (lambda cell: (cell / "cell.json").write_text('{"method": "MV'), "cell.json is damaged"),
        (lambda cell: (cell / "cell.json").write_text("{}"), "cell.json is damaged"),
        (lambda cell: (cell / "cell.json").write_text("[1]"), "cell.json is damaged"),
        (lambda cell: change(cell, k_shot="four"), "cell.json is damaged"),
        (lambda cell: change(cell, status="odd"), "cell.json is damaged"),
        (lambda cell: change(cell, metrics={"image_AUROC": 0.2}), "cell.json does not fit scores.csv"),
        (lambda cell: change(cell, metrics={}), "cell.json does not fit scores.csv"),
        (lambda cell: (cell / "maps.npz").unlink(), "maps.npz is missing"),
        (lambda cell: (cell / "scores.csv").unlink(), "scores.csv is missing or damaged"),
        *(
            (lambda cell, lines=lines: (cell / "scores.csv").write_bytes(lines), "scores.csv is missing or damaged")
            for lines in (
                b"path,label,score\na.png,0,1\nb.png,1,x\n",
                b"path,label,score\na.png,0,1\nb.png,2,1\n",
                b"path,label,score\na.png,0,1\nb.png,1,nan\n",
                b"path,label,score\na.png,0,1\na.png,1,1\n",
                b"path,label,score\na.png,0,1\n",
                b"path,label,score\n\xff\xfe,0,1\n",
                b"path,label\na.png,0\nb.png,1\n",
            )
        ),
    ],
)
def test_a_broken_cell_is_reported_and_the_rest_is_used(comparison, spoil, reason):
    folder = comparison(SOME)
    broken = cell_of(folder, "WinCLIP")
    spoil(broken)
    cells = load_cells(folder)
    assert [cell.folder.name for cell in cells if cell.status == "unreadable"] == [broken.name]
    assert reason in next(cell.error for cell in cells if cell.status == "unreadable")
    text = written(folder)
    assert broken.name in text
    assert "| MVFA |" in text


def test_maps_that_do_not_fit_leave_the_figures(comparison, tmp_path, caplog):
    folder = comparison(SOME, seeds=1)
    cell = cell_of(folder, "WinCLIP")
    np.savez(cell / "maps.npz", maps=np.zeros((3, 4, 4), np.uint8), low=0.0, high=1.0)
    broken = next(c for c in load_cells(folder) if c.folder == cell)
    assert broken.read_maps() is None
    assert f"{cell / 'maps.npz'} is damaged, or does not hold one map per line" in caplog.text
    assert "Heatmap of MVFA" in render(folder, tmp_path)
    caplog.clear()
    (cell / "maps.npz").write_bytes(b"PK")
    assert broken.read_maps() is None
    assert f"{cell / 'maps.npz'} is damaged" in caplog.text


def test_a_folder_without_cells_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="anomalib benchmark"):
        load_cells(tmp_path)


def test_the_csv_has_one_row_a_cell_with_all_that_was_measured(comparison):
    folder = comparison(SOME)
    cells = load_cells(folder)
    write_tables(cells, folder)
    with (folder / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    assert list(rows[0])[:7] == ["cell", "method", "set", "k_shot", "seed", "backbone", "status"]
    assert list(rows[0])[7:9] == ["image_AUROC", "image_AP"]
    assert {row["cell"] for row in rows} == {cell.folder.name for cell in cells}
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
    expected = f"| MVFA | 4 | 4 | 4 | {np.mean(areas):.1f} ± {np.std(areas, ddof=1):.1f} | 81.0 ± 1.0 |"
    assert expected in (folder / "results.md").read_text(encoding="utf-8")


def test_methods_without_supports_have_no_spread(comparison):
    text = written(comparison(SOME, seeds=3))
    row = next(line for line in text.splitlines() if line.startswith("| mean brightness |"))
    assert "±" not in row


def test_intervals_are_those_of_the_statistics_over_patients(comparison):
    folder = comparison(SOME, patients=12)
    text = written(folder)
    assert "30 normal and 30 abnormal test images of 12 patients" in text
    runs = [cell.scores for cell in load_cells(folder) if cell.method == "MVFA"]
    assert len(set(runs[0].groups)) == 12
    ends = intervals(runs)
    assert f"± {100 * np.std([area([r]).value for r in runs], ddof=1):.1f} [{100 * ends['image_AUROC'][0]:.1f}," in text
    assert f"[{100 * ends['image_AP'][0]:.1f}, {100 * ends['image_AP'][1]:.1f}]" in text
    assert "patients resampled" in text
    assert "taken as independent" not in text.partition("## Results")[0]


def test_the_verdict_says_where_no_patients_are_known(comparison):
    summary = written(comparison(SOME)).partition("## Results")[0]
    for sentence in summary.split(". "):
        if "95 % interval" in sentence:
            assert "no patients are known, images are taken as independent" in sentence


def test_published_values_stand_beside_their_own_sets(comparison):
    folder = comparison(SOME, name="Brain_AD")
    write_tables(load_cells(folder), folder)
    text = (folder / "results.md").read_text(encoding="utf-8")
    assert "| *MVFA, published* | *-* | *-* | *-* | *92.44* | *97.30* |" in text
    assert "| *APRIL-GAN, published* | *-* | *-* | *-* | *89.18* | *94.67* |" in text
    assert "published, not measured here" in text


def test_published_values_do_not_stand_beside_other_sets(comparison):
    folder = comparison(SOME)
    write_tables(load_cells(folder), folder)
    assert "published" not in (folder / "results.md").read_text(encoding="utf-8").partition("## Results")[2]


def test_published_values_have_the_published_means():
    few, zero = PUBLISHED["MVFA", 4], PUBLISHED["MVFA (zero-shot)", 0]
    for row, means in ((few, {"image": 88.97, "pixel": 98.67}), (zero, {"image": 80.43, "pixel": 93.39})):
        for level, mean in means.items():
            values = [value for (_, own), value in row.items() if own == level]
            assert len(values) == (6 if level == "image" else 3)
            assert np.mean(values) == pytest.approx(mean, abs=0.006)


def test_the_summary_compares_like_with_like_first(comparison):
    folder = comparison()
    rewrite_scores(folder, "WinCLIP", noisy(0.3))
    rewrite_scores(folder, "MVFA_(normal_only)", noisy(2.5))
    rewrite_scores(folder, "MVFA", noisy(2.6))
    first = written(folder).partition("## Results")[0]
    like = first.index("Of methods that are shown the same normal images, the image AUROC of MVFA (normal only)")
    labels = first.index("Given 4 abnormal images and 4 masks as well, the image AUROC of MVFA (")
    assert like < labels
    assert "is significantly higher than that of WinCLIP (" in first[like:labels]
    assert "does not differ significantly from that of MVFA (normal only)" in first[labels:]


def test_a_worse_method_is_called_lower(comparison):
    folder = comparison(("MVFA", "WinCLIP"))
    rewrite_scores(folder, "MVFA", noisy(0.2))
    rewrite_scores(folder, "WinCLIP", noisy(3.0))
    text = written(folder)
    assert "is significantly lower than that of WinCLIP" in text
    assert "significantly higher" not in text
    assert "other supports may reverse it" not in text


def test_a_difference_that_a_draw_reverses_is_said_to_be_one(comparison):
    folder = comparison(("MVFA", "WinCLIP"), seeds=3, images=200)
    rewrite_scores(folder, "WinCLIP", noisy(1.0))
    rewrite_scores(folder, "MVFA", lambda labels, seed: noisy(0.2 if seed == 2 else 5.0, 5)(labels, seed))
    assert "but only with 2 of 3 draws: other supports may reverse it" in written(folder)


def test_the_verdict_follows_the_corrected_p_value(comparison):
    """A difference that is significant by itself, but not among the comparisons of its table."""
    folder = comparison()
    rewrite_scores(folder, "*", noisy(1.0))
    rewrite_scores(folder, "MVFA", noisy(1.9, 3))
    text = written(folder)
    pairs = FinishedCells(load_cells(folder)).pairs["BrainMRI", 4]
    assert len(pairs) == pairs[0].family == 9 + 4
    expected = holm([pair.area.p_value for pair in pairs])
    assert [pair.adjusted for pair in pairs] == list(expected)
    turned = [pair for pair in pairs if pair.area.p_value < 0.05 < pair.adjusted]
    assert turned
    assert "Holm's family: the 13 comparisons of this table" in text
    said = re.findall(r"(does not differ|is) significantly .*? p [=<] ([\d.]+) after", text.partition("## Results")[0])
    assert len(said) == 3 + 2  # with supports, and without
    assert all((verdict == "is") == (float(p_value) < 0.05) for verdict, p_value in said)


def test_p_values_and_differences_in_the_tables_are_those_of_the_statistics(comparison):
    folder = comparison(("MVFA", "WinCLIP", "mean brightness"))
    text = written(folder)
    cells = load_cells(folder)
    runs = {name: [cell.scores for cell in cells if cell.method == name] for name in ("MVFA", "WinCLIP")}
    found = differences(runs["MVFA"], runs["WinCLIP"])
    value = found["image_AUROC"]
    shown = f"{100 * value.mean:+.1f} [{100 * value.low:+.1f}, {100 * value.high:+.1f}]"
    p_value = "< 0.001" if value.p_value < 0.001 else f"{value.p_value:.3f}"
    assert f"| MVFA - WinCLIP | {shown} | {p_value} |" in text
    assert f"| {value.ahead} of 2 |" in text


def test_pairs_without_a_common_class_have_no_p_value(comparison):
    folder = comparison(("MVFA", "WinCLIP"), seeds=1)
    table = pd.read_csv(cell_of(folder, "WinCLIP") / "scores.csv")
    table.loc[table.label == 1, "path"] = "elsewhere/" + table.path[table.label == 1]
    table.to_csv(cell_of(folder, "WinCLIP") / "scores.csv", index=False)
    text = written(folder)
    assert "cannot be compared: their common test images lack a class" in text
    assert "| MVFA - WinCLIP | - | - | - |" in text
    assert "significantly" not in text


def test_every_table_says_what_a_method_was_shown(comparison):
    text = written(comparison())
    for table in text.partition("## Paired tests")[0].split("**\n")[1:]:
        if "| method |" in table:
            assert "| method | normal shown | abnormal shown | masks shown |" in table
    assert "| MVFA (normal only) | 4 | 0 | 0 |" in text
    assert "| PatchCore, random weights | 4 | 0 | 0 | random weights |" in text


def test_names_in_markdown_are_escaped(comparison):
    text = written(comparison(SOME, seeds=1, name="a|b *c* <img src=x> [d](e) `f`"))
    assert r"a\|b \*c\* \<img src=x> [d]\(e) \`f\`" in text
    assert "<img" not in text.replace(r"\<img", "")
    columns = {
        line.count("|") - line.count(r"\|") for line in text.partition("## All")[0].splitlines() if "| MVFA |" in line
    }
    assert columns == {7}


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
    assert sum(attributes.get("class") == "plot" for tag, attributes in tags) == 2 + 2
    assert ("html", {"lang": "en"}) in tags


def test_curves_show_every_method_by_its_own_name(comparison, tmp_path):
    folder = comparison(SOME, seeds=1)
    change(cell_of(folder, "WinCLIP"), method="Win $k$ <b>")
    plots = re.findall(r'svg\+xml;base64,([^"]+)', render(folder, tmp_path))
    curves = next(plot for plot in map(bytes.decode, map(base64.b64decode, plots)) if "recall" in plot)
    assert "Win $k$ &lt;b&gt; (" in curves
    assert "MVFA (" in curves


def test_file_names_do_not_reach_the_page(comparison, tmp_path):
    folder = comparison(SOME)
    change(cell_of(folder, "WinCLIP"), status="failed", error="secret/place/patient_7.png is damaged")
    write_tables(load_cells(folder), folder)
    hidden = render(folder, tmp_path)
    for text in (hidden, (folder / "results.md").read_text(encoding="utf-8")):
        for secret in ("patient_", "secret", "support_0", str(tmp_path)):
            assert secret not in text


def test_names_are_escaped(comparison, tmp_path):
    folder = comparison(SOME, seeds=1, name="<script>alert(1)</script>")
    text = render(folder, tmp_path)
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_each_method_shows_its_best_and_worst_image(comparison, tmp_path):
    folder = comparison(SOME, seeds=1)
    text = render(folder, tmp_path)
    cell = next(cell for cell in load_cells(folder) if cell.method == "MVFA")
    scores = cell.scores
    lowest = min((s, p) for s, p, ill in zip(scores.scores, scores.paths, scores.labels, strict=True) if ill)[1]
    highest = max((s, p) for s, p, ill in zip(scores.scores, scores.paths, scores.labels, strict=True) if not ill)[1]
    headings = re.findall(r"<h4>([^,]+), (?:ab)?normal <span>([^<]+)</span>", text)
    number = {path: f"Image {index + 1}" for index, path in enumerate(sorted(scores.paths))}
    assert "worst of MVFA" in dict(headings)[number[lowest]]
    assert "worst normal of MVFA" in dict(headings)[number[highest]]


def test_images_that_are_not_there_leave_a_gap(comparison, tmp_path):
    folder = comparison(SOME, seeds=1)
    write_page(load_cells(folder), tmp_path / "page.html", {"BrainMRI": tmp_path / "elsewhere"})
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
    low, high = (np.asarray(heatmap(np.full((8, 8), value, np.uint8), (24, 16))) for value in (0, 255))
    assert low.shape == high.shape == (16, 24, 3)
    assert low.max() < 10
    assert high.min() > 150


@pytest.fixture
def two_sets(comparison, tmp_path):
    """Two sets of unequal size, one of them published and with patients, two shots, a failed and a damaged cell."""
    folder = comparison(("MVFA", "MVFA (normal only)", "WinCLIP", "mean brightness"), name="Brain_AD", patients=12)
    for method in ("MVFA", "WinCLIP", "PatchCore", "mean brightness", "distance to mean normal"):
        for seed in range(1 if method == "mean brightness" else 3):
            masks = np.zeros((40, 56, 56), dtype=bool) if method == "PatchCore" else None
            cell = comparison.write_cell(
                folder, method, "Colon", 0 if method == "mean brightness" else 4, seed, masks, images=40
            )
            table = pd.read_csv(cell / "scores.csv").iloc[:33]  # 20 normal, 13 abnormal
            table.to_csv(cell / "scores.csv", index=False)
            metrics = image_metrics(table.label.to_numpy() == 1, table.score.to_numpy())
            known = json.loads((cell / "cell.json").read_text())["metrics"]
            change(cell, metrics=known | {name: float(value[0]) for name, value in metrics.items()})
            change(cell, cost={"train_seconds": 0.0123, "train_peak_mb": None, "predict_ms": 99.96, "size_mb": 1234.5})
            change(cell, machine="Another, 2 threads", config={"pixel_metrics": "network"})
    comparison.write_cell(folder, "MVFA", "Brain_AD", 2, 0, np.zeros((60, 56, 56), dtype=bool), patients=12)
    weights = "FileNotFoundError: The weights of X are missing."
    comparison.write_cell(folder, "WinCLIP", "Brain_AD", 2, 0, status="failed", error=weights)
    comparison.write_cell(
        folder, "AnomalyDINO", "Brain_AD", 4, 0, status="failed", error="secret/patient.png is damaged"
    )
    (comparison.write_cell(folder, "AnomalyDINO", "Colon", 4, 1) / "scores.csv").unlink()
    return folder


def test_the_tables_of_two_sets_are_as_expected_to_the_last_sign(two_sets):
    """Numbers may differ by one in the last digit, from processor to processor; everything else is equal."""
    expected = Path(__file__).with_name("expected_results.md").read_text(encoding="utf-8")
    number = re.compile(r"(\d+(?:\.\d+)?)")
    found, wanted = number.split(written(two_sets)), number.split(expected)
    assert found[::2] == wanted[::2]
    for one, other in zip(found[1::2], wanted[1::2], strict=True):
        decimals = len(other.partition(".")[2])
        assert len(one.partition(".")[2]) == decimals
        assert float(one) == pytest.approx(float(other), abs=1.001 * 10**-decimals if decimals else 0)


def test_p_values_are_written_as_small_only_below_a_thousandth():
    shown = environment().filters["p_value"]
    assert [shown(value) for value in (float("nan"), 0.00099, 0.001, 0.0496)] == ["-", "< 0.001", "0.001", "0.050"]


def test_an_image_may_have_a_name_that_stands_for_nothing(comparison):
    folder = comparison(("mean brightness",), seeds=1)
    table = pd.read_csv(cell_of(folder, "mean_brightness") / "scores.csv")
    table.loc[3, "path"] = "NA"
    table.to_csv(cell_of(folder, "mean_brightness") / "scores.csv", index=False)
    (cell,) = load_cells(folder)
    assert cell.scores.paths[3] == "NA"
