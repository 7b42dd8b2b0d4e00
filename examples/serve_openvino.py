# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Serve an exported MVFA over a folder of images, a video or a camera, asynchronously.

    python examples/serve_openvino.py model.xml FOLDER --output scores.csv
    python examples/serve_openvino.py model.xml video.mp4
    python examples/serve_openvino.py model.xml 0          # first camera, until it ends or Ctrl-C

Needs openvino, numpy, pillow and, for videos and cameras, opencv; neither torch nor anomalib. While OpenVINO computes
on some images the next are read; results come in the order of the images. Images are resized as in training. DICOM and
NIfTI files have to be read with the intensity rule of the training first: see docs/data.md.
"""

import argparse
import csv
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openvino
from PIL import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}


def folder_images(folder: Path) -> Iterator[tuple[str, Image.Image | None]]:
    """Give the images of a folder by name; ``None`` for a file that cannot be read."""
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES):
        name = str(path.relative_to(folder))
        try:
            with Image.open(path) as image:
                yield name, image.convert("RGB")
        except (OSError, ValueError):
            yield name, None


def stream_images(source: str) -> Iterator[tuple[str, Image.Image | None]]:
    """Give the frames of a video file or of a camera by number."""
    import cv2

    stream = cv2.VideoCapture(int(source) if source.isdecimal() else source)
    if not stream.isOpened():
        sys.exit(f"{source} is no folder, and can be opened neither as a video nor as a camera.")
    try:
        number = 0
        while True:
            there, frame = stream.read()
            if not there:
                return
            yield f"frame {number}", Image.fromarray(np.ascontiguousarray(frame[..., ::-1]))
            number += 1
    finally:
        stream.release()


def to_input(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Make an image ``(1, 3, H, W)`` in [0, 1] of the size that the model reads."""
    resized = image.resize((width, height), resample=Image.Resampling.BICUBIC)
    return np.asarray(resized, np.float32).transpose(2, 0, 1)[None] / 255


def serve(arguments: argparse.Namespace) -> int:
    """Predict all images; give the number of those that could not be read."""
    model = openvino.Core().compile_model(
        arguments.model,
        arguments.device,
        {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f32"},
    )
    height, width = (model.input(0).get_partial_shape()[axis].get_length() for axis in (2, 3))
    source = Path(arguments.source)
    images = folder_images(source) if source.is_dir() else stream_images(arguments.source)
    target = arguments.output.open("w", newline="", encoding="utf-8") if arguments.output else sys.stdout
    writer = csv.writer(target)
    writer.writerow(["image", "score", "label", "error"])
    unreadable = 0
    requests = [model.create_infer_request() for _ in range(model.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))]
    under_way: deque[tuple[str, openvino.InferRequest | None]] = deque()  # in the order of the images

    def write_oldest() -> None:
        name, request = under_way.popleft()
        if request is None:
            writer.writerow([name, "", "", "could not be read"])
            return
        request.wait()
        score = float(request.get_tensor("pred_score").data.item())
        writer.writerow([name, f"{score:.6f}", int(request.get_tensor("pred_label").data.item()), ""])
        requests.append(request)

    began, count = time.perf_counter(), 0
    try:
        for name, image in images:
            request = None
            if image:
                while not requests:
                    write_oldest()
                request = requests.pop()
                request.start_async(to_input(image, height, width))
            else:
                unreadable += 1
            under_way.append((name, request))
            count += 1
    except KeyboardInterrupt:
        pass
    while under_way:
        write_oldest()
    seconds = time.perf_counter() - began
    if arguments.output:
        target.close()
    if not count:
        sys.exit(f"{arguments.source} holds no image ({', '.join(sorted(SUFFIXES))}).")
    print(
        f"{count} images in {seconds:.2f} s, {count / seconds:.1f} a second, {len(requests)} at a time; "
        f"{unreadable} could not be read.",
        file=sys.stderr,
    )
    return unreadable


def main() -> None:
    """Read the arguments and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="exported model.xml or model.onnx")
    parser.add_argument("source", help="folder, video file or number of a camera")
    parser.add_argument("--device", default="CPU", help="device of OpenVINO")
    parser.add_argument("--output", type=Path, help="CSV to write instead of standard output")
    arguments = parser.parse_args()
    if not arguments.model.is_file():
        sys.exit(f"No model at {arguments.model}. Make one with `anomalib export --export_type openvino`.")
    sys.exit(1 if serve(arguments) else 0)


if __name__ == "__main__":
    main()
