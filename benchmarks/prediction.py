# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""How much of the prediction of a folder is the model, and how much is reading and drawing.

    python -m benchmarks.prediction                      # 1,000 images, ViT-L-14-336 with random weights, 240 px
    python -m benchmarks.prediction --backbone tiny --images 200

The naive variant reads, predicts and draws one image after the other; the other one is ``Engine.predict`` as it is,
which reads ahead and draws while the model goes on. Both predict the same drawn images, in turns.
"""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from anomalib.engine import Engine
from torch import Tensor

from anomalib_mvfa import MVFA, visualization
from anomalib_mvfa.callbacks import loading
from anomalib_mvfa.demo.phantoms import write_phantoms
from benchmarks.timing import machine, make_parser, write_results


def write_images(folder: Path, count: int, size: int) -> Path:
    """Copy drawn images into a plain folder until there are enough."""
    if len(list(folder.glob("*.png"))) != count:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        drawn = sorted(write_phantoms(folder.parent / "phantoms", ["brain_mri"], size=size).rglob("img/*.png"))
        for number in range(count):
            shutil.copy(drawn[number % len(drawn)], folder / f"{number:04}.png")
    return folder


class _Immediately(Executor):
    """Draws at once, in place of a pool of threads."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def submit(self, call: Callable[..., object], /, *args: object, **kwargs: object) -> Future[object]:  # type: ignore[override]
        future: Future[object] = Future()
        future.set_result(call(*args, **kwargs))
        return future


def predict(mvfa: MVFA, folder: Path, output: Path, *, naive: bool) -> dict[str, float]:
    """Predict a folder.

    Returns:
        ``seconds`` from the first image to the end, and the ``model`` part of them.
    """
    spent, began = 0.0, 0.0
    forward = mvfa.model.forward

    def timed(images: Tensor) -> object:
        nonlocal spent, began
        start = time.perf_counter()
        began = began or start
        answer = forward(images)
        if images.is_cuda:
            torch.cuda.synchronize()
        spent += time.perf_counter() - start
        return answer

    with ExitStack() as stack:
        stack.enter_context(patch.object(mvfa.model, "forward", timed))
        if naive:
            stack.enter_context(patch.object(loading, "read_ahead", lambda loader: loader))
            stack.enter_context(patch.object(visualization, "ThreadPoolExecutor", _Immediately))
        engine = Engine(default_root_dir=output, logger=False, enable_progress_bar=not naive)
        engine.predict(mvfa, data_path=folder, return_predictions=False)
    return {"seconds": time.perf_counter() - began, "model": spent}


def main() -> None:
    """Predict in both ways, in turns."""
    parser = make_parser(__doc__, "prediction")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--size", type=int, default=512, help="side of the drawn images in pixels")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    facts = machine()
    folder = write_images(options.output.parent / "folder", options.images, options.size)
    mvfa = MVFA(options.backbone, "random", class_name="Brain", memory=False)
    mvfa.configure_model()
    mvfa.post_processor.image_threshold.fill_(0.5)
    found: dict[str, dict[str, float]] = {}
    for _ in range(options.rounds):
        for name, naive in (("one after the other", True), ("overlapped", False)):
            figures = predict(mvfa, folder, options.output.parent / "predicted", naive=naive)
            print(name, figures, flush=True)
            if name not in found or figures["seconds"] < found[name]["seconds"]:
                found[name] = figures
    rows = [
        [
            name,
            f"{1000 * figures['seconds'] / options.images:,.0f}",
            f"{1000 * figures['model'] / options.images:,.0f}",
            f"{100 * figures['model'] / figures['seconds']:.1f} %",
        ]
        for name, figures in found.items()
    ]
    columns = ["variant", "ms an image", "of it the model", "share"]
    write_results(options.output, {"machine": facts, "images": options.images, "variants": found}, columns, rows)


if __name__ == "__main__":
    main()
