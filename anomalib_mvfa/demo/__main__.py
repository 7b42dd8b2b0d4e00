# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The main job, offline, on drawn images with the embedded backbone.

Few-shot MVFA is trained and tested, WinCLIP tested on the same images, zero-shot MVFA trained on other modalities, a
folder predicted, and the trained model exported to OpenVINO and used again. It runs the stock ``anomalib`` command, and
prints each command so that it can be typed again with other data. At the end there are one table and one page.
"""

import csv
import html
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from anomalib.data.utils import read_image
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table as ConsoleTable
from torch.nn import functional
from torchmetrics.functional.classification import binary_auroc

from anomalib_mvfa.comparison.page import GalleryRow, Panel, Section, Table, colour_bar, gallery, page, picture
from anomalib_mvfa.deploy import OpenVINOInferencer
from anomalib_mvfa.metrics import PixelFigures

from .phantoms import write_phantoms

__all__ = ["main"]

ROOT = Path("results/demo")
SET, TARGET = "BrainMRI", "LiverCT"
MODALITIES = ("brain_mri", "liver_ct", "chest_xray", "breast_ultrasound")
SIZE = 224
LESIONS = ("bright", "ring")  # what the demonstration backbone sees best
EPOCHS = 15
ZERO_SHOT_EPOCHS = 4
SHOWN = 12
LIMITS = (
    "The images are drawn by a program, and the backbone is a small demonstration that was trained on such drawings: "
    "the figures show that the software works, not how good MVFA is. Nothing here is for clinical use."
)


class Prediction(NamedTuple):
    """A row of a run's ``predictions.csv``.

    Args:
        path: The image.
        score: In [0, 1].
        label: 1 abnormal, 0 normal.
        picture: The picture that the run wrote of it.
    """

    path: Path
    score: float
    label: int
    picture: Path


def _anomalib(*arguments: str) -> None:
    """Run the stock command that belongs to this Python."""
    command = [str(Path(sys.executable).with_name("anomalib")), *arguments]
    print(f"\n$ anomalib {shlex.join(arguments)}\n", flush=True)  # noqa: T201 - this is a command's output
    subprocess.run(command, check=True)  # noqa: S603 - fixed arguments


def _few_shot(data: Path) -> tuple[str, ...]:
    return (
        *("--data", "FewShot", "--data.k_shot", "4", "--data.train_batch_size", "4"),
        *("--data.source", "MedicalBMAD", "--data.source.root", str(data), "--data.source.category", SET),
        *("--data.source.num_workers", "0"),
    )


COMMON = ("--default_root_dir", str(ROOT), "--trainer.accelerator", "cpu")


def _logged(name: str) -> tuple[str, ...]:
    """Let a run write its figures to ``logs/NAME/metrics.csv``."""
    logger = ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(ROOT / "logs"))
    return (*COMMON, "--seed_everything", "0", *logger, "--trainer.logger.name", name, "--trainer.logger.version", "")


def _pixel_area(name: str) -> str:
    """Read the pixel AUROC that a run measured."""
    with (ROOT / "logs" / name / "metrics.csv").open(newline="", encoding="utf-8") as file:
        found = [row["pixel_AUROC"] for row in csv.DictReader(file) if row.get("pixel_AUROC")]
    return f"{float(found[-1]):.3f}"


def _newest(root: Path, pattern: str) -> Path:
    """Give the file of the last run."""
    return max(root.glob(pattern), key=lambda path: path.stat().st_mtime)


def _is_abnormal(path: Path) -> bool:
    return "Ungood" in path.parts


def read_predictions(table: Path) -> list[Prediction]:
    """Read what a run said, with the pictures that it wrote.

    Args:
        table: ``predictions.csv``.

    Returns:
        One row an image.
    """
    pictures = {path.name: path for path in table.parent.rglob("*.png")}
    seen: Counter[str] = Counter()
    rows = []
    with table.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            path = Path(row["path"])
            seen[path.stem] += 1  # pictures of images of the same name are numbered in the order of the table
            number = f"_{seen[path.stem]}" if seen[path.stem] > 1 else ""
            picture_path = pictures[f"{path.stem}{number}.png"]
            rows.append(Prediction(path, float(row["score"]), int(row["label"] or 0), picture_path))
    return rows


def figures(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Measure how well scores tell abnormal images from normal ones.

    Args:
        predictions: Of both classes.

    Returns:
        ``image_AUROC``, and ``correct``, the share of images that are labelled rightly.
    """
    scores = torch.tensor([row.score for row in predictions])
    truth = torch.tensor([int(_is_abnormal(row.path)) for row in predictions])
    labels = torch.tensor([row.label for row in predictions])
    return {"image_AUROC": float(binary_auroc(scores, truth)), "correct": float((labels == truth).float().mean())}


def brightness(predictions: Sequence[Prediction]) -> float:
    """Give the image AUROC of mean brightness on the same images."""
    means = torch.stack([read_image(row.path, as_tensor=True).mean() for row in predictions])
    return float(binary_auroc(means, torch.tensor([int(_is_abnormal(row.path)) for row in predictions])))


def _spread(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Choose a dozen images, evenly by file name, so that no good ones are picked: two thirds of them abnormal."""
    chosen = []
    for abnormal, count in ((True, SHOWN * 2 // 3), (False, SHOWN - SHOWN * 2 // 3)):
        rows = sorted((row for row in predictions if _is_abnormal(row.path) == abnormal), key=lambda row: row.path)
        chosen += [rows[index * len(rows) // count] for index in range(min(count, len(rows)))]
    return chosen


def _strips(predictions: Sequence[Prediction]) -> str:
    """Show the pictures that a run wrote, each with its score."""
    parts = []
    for row in _spread(predictions):
        truth = "abnormal" if _is_abnormal(row.path) else "normal"
        said = "abnormal" if row.label else "normal"
        with Image.open(row.picture) as file:
            strip = file.convert("RGB")
            strip.thumbnail((900, 200))
        caption = f"{html.escape(row.path.stem)}, {truth}: score {row.score:.3f}, called {said}"
        parts.append(picture(np.asarray(strip), f"Input, mask and heatmap of a {truth} image", caption))
    return f'<div class="images">{"".join(parts)}</div>'


def _openvino(model: Path, rows: Sequence[Prediction]) -> tuple[list[Prediction], float, str]:
    """Predict again with the exported model.

    Returns:
        What it says of the same images, its pixel AUROC, and a gallery.
    """
    inferencer = OpenVINOInferencer(path=model, device="CPU", config={"INFERENCE_PRECISION_HINT": "f32"})
    again, panels, pixels = [], {}, PixelFigures()
    for row in track(rows, "Predicting with OpenVINO", disable=not sys.stdout.isatty()):
        result = inferencer.predict(row.path)
        score = float(np.asarray(result.pred_score).squeeze())
        again.append(row._replace(score=score, label=int(np.asarray(result.pred_label).squeeze())))
        heat = np.asarray(result.anomaly_map, dtype=np.float32).squeeze()
        full_size = functional.interpolate(torch.from_numpy(heat)[None, None], (SIZE, SIZE), mode="bilinear")[0, 0]
        pixels.update(full_size[None], torch.from_numpy(_mask(row.path))[None])
        panels[row.path] = Panel("OpenVINO", _heat(heat), f"score {score:.3f}", f"Lightning said {row.score:.3f}")
    shown = []
    for row in _spread(rows):
        with Image.open(row.path) as file:
            image = np.asarray(file.convert("RGB"))
        truth = "abnormal" if _is_abnormal(row.path) else "normal"
        shown.append(GalleryRow(row.path.stem, truth, image, _mask(row.path), [panels[row.path]]))
    return again, pixels.compute()["pixel_AUROC"], colour_bar("0", "1") + gallery(shown)


def _mask(path: Path) -> NDArray[np.bool_]:
    """Read the mask ``(H, W)`` of a drawn image, empty for a normal one."""
    if not _is_abnormal(path):
        return np.zeros((SIZE, SIZE), dtype=np.bool_)
    return np.asarray(Image.open(path.parents[1] / "label" / path.name)) > 0


def _heat(anomaly_map: NDArray[np.float32]) -> NDArray[np.uint8]:
    return (np.clip(anomaly_map, 0, 1) * 255).astype(np.uint8)


def main() -> None:
    """Run everything and write the page."""
    began = time.monotonic()
    console = Console()
    data = write_phantoms(ROOT / "phantoms", MODALITIES, size=SIZE, lesions=LESIONS)
    base = ROOT.resolve()
    shutil.rmtree(base / "logs", ignore_errors=True)  # figures of an earlier demonstration

    _anomalib(
        *("train", "--model", "MVFA", "--model.backbone", "tiny", *_few_shot(data)),
        *("--trainer.max_epochs", str(EPOCHS), "--trainer.check_val_every_n_epoch", str(EPOCHS), *_logged("few_shot")),
    )
    checkpoint = _newest(base / "MVFA", f"MedicalBMAD/{SET}/v*/weights/lightning/model.ckpt")
    few_shot = read_predictions(checkpoint.parents[2] / "images" / "predictions.csv")

    _anomalib(
        *("test", "--model", "WinClipAny", "--model.backbone", "tiny", "--model.k_shot", "4", *_few_shot(data)),
        *("--trainer.callbacks", "anomalib_mvfa.callbacks.prediction_table.PredictionTable", *_logged("winclip")),
    )
    winclip = read_predictions(_newest(base, "WinClipAny/**/predictions.csv"))

    _anomalib(
        *("train", "--model", "MVFA", "--model.backbone", "tiny", "--model.memory", "false"),
        *("--model.learning_rate", "0.0001", "--data", "LeaveOneOut", "--data.root", str(data)),
        *("--data.target", TARGET, "--data.train_batch_size", "4", "--data.num_workers", "0"),
        *("--trainer.max_epochs", str(ZERO_SHOT_EPOCHS), *_logged("zero_shot")),
    )
    zero_shot = read_predictions(_newest(base, f"MVFA/**/{TARGET}/v*/images/predictions.csv"))

    _anomalib(
        *("predict", "--model", "MVFA", "--ckpt_path", str(checkpoint)),
        *("--data", str(data / SET / "test" / "Ungood" / "img"), *COMMON),
    )
    predicted = base / "MVFA" / "latest" / "images" / "predictions.csv"

    _anomalib(
        *("export", "--model", "MVFA", "--ckpt_path", str(checkpoint), "--export_type", "openvino"),
        *("--export_root", str(ROOT / "export")),
    )
    exported = _newest(base / "export", "**/model.xml")
    again, pixel_area, openvino = _openvino(exported, few_shot)
    difference = max(abs(one.score - other.score) for one, other in zip(again, few_shot, strict=True))

    rows = [
        ("MVFA, 4-shot", SET, few_shot),
        ("WinCLIP, 4-shot, same backbone and images", SET, winclip),
        (f"MVFA, zero-shot, trained on {len(MODALITIES) - 1} other modalities", TARGET, zero_shot),
        ("MVFA, 4-shot, exported to OpenVINO", SET, again),
    ]
    areas = [*map(_pixel_area, ("few_shot", "winclip", "zero_shot")), f"{pixel_area:.3f}"]
    header = ["run", "images", "image AUROC", "pixel AUROC", "called rightly", "mean brightness, image AUROC"]
    lines = []
    for (name, where, predictions), pixels in zip(rows, areas, strict=True):
        found = figures(predictions)
        area, correct = f"{found['image_AUROC']:.3f}", f"{100 * found['correct']:.0f} %"
        lines.append([name, f"{len(predictions)} of {where}", area, pixels, correct, f"{brightness(predictions):.3f}"])
    agreement = f"The scores of the exported model differ from those of the trained one by at most {difference:.1e}."

    target = base / "index.html"
    sections = [
        Section("figures", "Figures", Table("Image scores on the test parts", header, lines).to_html()),
        *(
            Section(f"run{number}", f"{name}: {where}", _strips(predictions))
            for number, (name, where, predictions) in enumerate(rows[:3])
        ),
        Section("openvino", "The exported model", f"<p>{agreement}</p>{openvino}"),
    ]
    target.write_text(
        page("MVFA on drawn images", sections, intro=f"<p>{html.escape(LIMITS)}</p>"),
        encoding="utf-8",
    )

    shown = ConsoleTable(*header, title="Image scores on the test parts")
    for line in lines:
        shown.add_row(*line)
    console.print(shown)
    print(  # noqa: T201
        f"{agreement}\n\nDone in {time.monotonic() - began:.0f} s. {LIMITS}\n"
        f"Page               {target}\n"
        f"Checkpoint         {checkpoint}\n"
        f"Prediction table   {predicted}\n"
        f"OpenVINO model     {exported}",
    )


if __name__ == "__main__":
    main()
