# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Serve an exported MVFA over a folder of images, a video or a camera, asynchronously.

    python examples/serve_openvino.py model.xml FOLDER --output scores.csv
    python examples/serve_openvino.py model.xml video.mp4
    python examples/serve_openvino.py model.xml 0          # first camera, until it ends or Ctrl-C

Needs openvino, numpy, pillow and, for videos and cameras, opencv; neither torch nor anomalib. While OpenVINO computes
on some images the next are read; results come in the order of the images. Pillow resizes the images as in training,
which is exact and takes less memory than to let the graph do it. DICOM and NIfTI files have to be read with the
intensity rule of the training first: see docs/data.md.
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
    """Yield name and image of each file in a folder; ``None`` for a file that cannot be read."""
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES):
        name = str(path.relative_to(folder))
        try:
            with Image.open(path) as image:
                yield name, image.convert("RGB")
        except (OSError, ValueError):
            yield name, None


def stream_images(source: str) -> Iterator[tuple[str, Image.Image | None]]:
    """Yield number and image of each frame of a video file or of a camera."""
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


def image_size(model: openvino.CompiledModel) -> tuple[int, int]:
    """Return height and width of the input, or of the maps where the graph resizes images of any size itself."""
    shape = model.input(0).get_partial_shape()
    if shape[2].is_dynamic or shape[3].is_dynamic:
        shape = model.output("anomaly_map").get_partial_shape()
    return shape[-2].get_length(), shape[-1].get_length()


def to_input(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Resize an image as in training and return it as ``(1, 3, H, W)`` in [0, 1]."""
    resized = image.resize((width, height), resample=Image.Resampling.BICUBIC)
    return np.asarray(resized, np.float32).transpose(2, 0, 1)[None] / 255


def serve(arguments: argparse.Namespace) -> int:
    """Predict all images and return the number of those that could not be read."""
    model = openvino.Core().compile_model(
        arguments.model,
        arguments.device,
        {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f32"},
    )
    height, width = image_size(model)
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
