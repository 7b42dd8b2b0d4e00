# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Checks of data sets that cost little and come before any training."""

from collections.abc import Sequence

from anomalib.data.utils import LabelName
from pandas import DataFrame
from PIL import Image

__all__ = ["check_masks", "enumerate_some"]


def check_masks(samples: DataFrame) -> None:
    """Check that every abnormal image has a mask of its own size, if any has one.

    Only the headers of the files are read.

    Args:
        samples: Samples as anomalib keeps them, with ``image_path``, ``label_index`` and ``mask_path``.

    Raises:
        ValueError: If masks are missing or differ in size from their images. The message has the count and five files.
    """
    abnormal = samples[samples["label_index"] == LabelName.ABNORMAL.value]
    absent = abnormal["mask_path"].fillna("") == ""
    if absent.all():
        return
    missing = abnormal.loc[absent, "image_path"].tolist()
    if missing:
        msg = (
            f"{len(missing)} of {len(abnormal)} abnormal images have no mask of the same stem: "
            f"{enumerate_some(missing, 5)}. "
            "Add the masks, or remove every mask folder to use the set with image labels only."
        )
        raise ValueError(msg)
    differing = []
    for image_path, mask_path in zip(abnormal["image_path"], abnormal["mask_path"], strict=True):
        with Image.open(image_path) as image, Image.open(mask_path) as mask:
            if mask.size != image.size:
                sizes = "{}x{}, image {}x{}".format(*mask.size, *image.size)
                differing.append(f"{mask_path} ({sizes})")
    if differing:
        msg = (
            f"{len(differing)} of {len(abnormal)} masks differ in size (width x height) from their image: "
            f"{enumerate_some(differing, 5)}. Resample these masks onto their images, nearest neighbour."
        )
        raise ValueError(msg)


def enumerate_some(items: Sequence[str], limit: int) -> str:
    """Name the first items and count the others."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
