# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The data set that all datamodules of this package read through."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataset, ImageBatch, ImageItem, PredictDataset
from anomalib.data.utils import LabelName
from PIL import Image as PILImage
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.tv_tensors import Image, Mask

from .readers import ImageRef, IntensityRule, UnreadableImageError, read_image, read_mask

__all__ = ["WHOLE_FILE", "MedicalDataset", "ReportedBatch", "ReportingDataset", "read_by_us"]

WHOLE_FILE = -1  # stands for "no frame" in the table, whose column then is of integers


@dataclass
class ReportedBatch(ImageBatch):
    """A batch whose images with an ``explanation`` could not be read, and have no prediction.

    Their scores and maps are NaN, their labels ``LabelName.UNKNOWN`` (-1; ``pred_label`` then holds integers), their
    masks empty. Their items have ``None`` for label and mask.
    """

    item_class = ImageItem

    def _withhold(self, values: Tensor | None, fill: float, dtype: torch.dtype | None = None) -> Tensor | None:
        unread = torch.tensor([bool(reason) for reason in self.__dict__.get("explanation") or ()], dtype=torch.bool)
        if values is None or not unread.any():
            return values
        return values.to(dtype).masked_fill(unread.to(values.device).view(-1, *(1,) * (values.ndim - 1)), fill)

    def validate_pred_score(self, pred_score: Tensor | None) -> Tensor | None:  # type: ignore[override]  # anomalib's are static
        """Validate scores ``(B,)``."""
        return self._withhold(ImageBatch.validate_pred_score(pred_score), torch.nan)

    def validate_anomaly_map(self, anomaly_map: Tensor | None) -> Tensor | None:  # type: ignore[override]
        """Validate maps ``(B, H, W)``."""
        return self._withhold(ImageBatch.validate_anomaly_map(anomaly_map), torch.nan)

    def validate_pred_label(self, pred_label: Tensor | None) -> Tensor | None:  # type: ignore[override]
        """Validate labels ``(B,)``."""
        return self._withhold(ImageBatch.validate_pred_label(pred_label), LabelName.UNKNOWN.value, torch.int8)

    @property
    def items(self) -> list[ImageItem]:
        """The items; those of unreadable images have neither label nor mask."""
        items: list[ImageItem] = super().items
        for item in items:
            if item.explanation:
                item.pred_label = item.pred_mask = None
        return items


class ReportingDataset(Dataset[ImageItem]):
    """anomalib's data set of a folder, with a black image in the place of each file that cannot be read.

    Its ``explanation`` is the reason; the other explanations are empty.
    """

    collate_fn = staticmethod(ReportedBatch.collate)

    def __init__(self, source: PredictDataset) -> None:
        self.source = source

    @property
    def image_paths(self) -> list[str]:
        """The ``image_path`` of every item."""
        return [str(path) for path in self.source.image_filenames]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> ImageItem:
        """Read one image, or report why it cannot be read."""
        path = Path(self.source.image_filenames[index])
        try:
            with PILImage.open(path) as image:
                wide = image.mode in {"I", "F"} or image.mode.startswith("I;")
            if not wide:  # anomalib would clip it to white
                item: ImageItem = self.source[index]
                item.explanation = ""
                return item
            reason = "has more than 8 bits a pixel; --data MedicalFolder --data.path FOLDER reads it"
        except Exception as error:  # Pillow raises many kinds on damaged files
            reason = _why_unreadable(path, error)
        return ImageItem(image=torch.zeros(3, 1, 1), image_path=str(path), explanation=reason)


def _why_unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "permission denied"
    if not path.is_file():
        return "no such file"
    return "truncated, damaged or not an image" if path.stat().st_size else "the file is empty"


class MedicalDataset(AnomalibDataset):
    """Images in any readable format, with what is known about them.

    An item's ``image_path`` is the file, and for a slice or frame the file, ``#`` and its number.

    Args:
        samples: One row an image, in an order that is kept: ``image_path`` (the file), ``label_index``, ``mask_path``
            (``""`` for none), and if wanted ``frame`` (-1 for a file that is one image), ``group`` (a number),
            ``has_mask`` (of the image's set) and ``problem`` (why the image cannot be used; ``""`` for none).
        rule: How stored values become grey levels.
        like: Axis, volume, limit of pixels and root of the images.
        report: Whether an unreadable image becomes a black one whose ``explanation`` is the reason, not an error.
        blackout: Rectangles ``(left, top, width, height)`` in pixels of an image that are set to black.
    """

    def __init__(
        self,
        samples: pd.DataFrame,
        rule: IntensityRule | None = None,
        like: ImageRef | None = None,
        report: bool = False,
        blackout: Sequence[Sequence[int]] = (),
    ) -> None:
        super().__init__()
        self.samples = samples
        self.rule = rule or IntensityRule()
        self.like = like or ImageRef(Path())
        self.report = report
        self.blackout = blackout

    @property
    def samples(self) -> pd.DataFrame:
        """The table; anomalib's own setter would sort slices by the name of their volume, which they share."""
        return super().samples

    @samples.setter
    def samples(self, samples: pd.DataFrame) -> None:
        self._samples = samples.reset_index(drop=True)

    @property
    def collate_fn(self) -> Callable[..., Any]:
        """Collate into batches, in which unreadable images have no predictions where such images are reported."""
        return ReportedBatch.collate if self.report else super().collate_fn

    def __getitem__(self, index: int) -> ImageItem:
        """Read one image and its mask; an UnreadableImageError, unless such images are reported."""
        row = self.samples.iloc[index]
        ref = self._ref(row.image_path, row.get("frame", WHOLE_FILE))
        mask, reason = None, ""
        try:
            image, mask = self._read(row, ref)
        except UnreadableImageError as error:
            if not self.report:
                raise
            image, reason = Image(torch.zeros(3, 1, 1)), error.reason
            if self.task == TaskType.SEGMENTATION:
                mask = Mask(torch.zeros(1, 1, dtype=torch.uint8))
        if self.augmentations is not None:
            image, mask = (self.augmentations(image), None) if mask is None else self.augmentations(image, mask)
        return ImageItem(
            image=image,
            gt_mask=mask,
            gt_label=None if row.label_index == LabelName.UNKNOWN else torch.tensor(int(row.label_index)),
            image_path=_item_path(row.image_path, row.get("frame", WHOLE_FILE)),
            mask_path=row.mask_path,
            explanation=reason if self.report else None,
        )

    def _ref(self, path: str | Path, frame: int) -> ImageRef:
        return replace(self.like, path=Path(path), frame=None if frame == WHOLE_FILE else int(frame))

    def _read(self, row: Any, ref: ImageRef) -> tuple[Tensor, Mask | None]:
        has_mask = self.task == TaskType.SEGMENTATION and row.label_index == LabelName.ABNORMAL.value
        reason = row.get("problem")
        if has_mask and row.get("has_mask", True) and not row.mask_path:
            reason = "abnormal, but without a mask of the same stem, while the set has masks"
        if reason:
            raise UnreadableImageError(ref.path, reason)
        try:
            image = self._image(ref)
            mask = read_mask(replace(ref, path=Path(row.mask_path))) if has_mask and row.mask_path else None
        except FileNotFoundError as error:
            raise UnreadableImageError(error.filename, "no such file") from None
        except UnreadableImageError:
            raise
        except ValueError as error:  # a mask file with fewer frames than its image
            raise UnreadableImageError(row.mask_path, f"does not fit {ref.path.name}: {error}") from None
        if self.task == TaskType.CLASSIFICATION:
            return image, None
        if mask is None:
            mask = torch.zeros(image.shape[-2:])
        if mask.shape != image.shape[-2:]:
            (height, width), (image_height, image_width) = mask.shape, image.shape[-2:]
            reason = (
                f"this mask is {width}x{height} (width x height), its image {image_width}x{image_height}; "
                "resample it onto the image, nearest neighbour"
            )
            raise UnreadableImageError(row.mask_path, reason)
        return image, Mask(mask.to(torch.uint8))

    def _image(self, ref: ImageRef) -> Tensor:
        image = read_image(ref, self.rule)
        for left, top, width, height in self.blackout:
            image[:, top : top + height, left : left + width] = 0
        return image

    def ref(self, image_path: str) -> ImageRef:
        """Return the reference that an item's ``image_path`` stands for."""
        file, mark, number = image_path.rpartition("#")
        is_frame = mark and not Path(image_path).is_file()
        return self._ref(file, int(number)) if is_frame else self._ref(image_path, WHOLE_FILE)

    @property
    def image_paths(self) -> list[str]:
        """The ``image_path`` of every item."""
        frames = self.samples.get("frame", [WHOLE_FILE] * len(self.samples))
        return [_item_path(*row) for row in zip(self.samples["image_path"], frames, strict=True)]

    def original(self, image_path: str) -> Tensor:
        """Read the image of an item again, at its own size: ``(3, H, W)`` in [0, 1]."""
        return self._image(self.ref(image_path))

    def output_name(self, image_path: str) -> str:
        """Return the name of the results of an item, with its folders and without a suffix."""
        return self.ref(image_path).name


def _item_path(path: str, frame: int) -> str:
    return path if frame == WHOLE_FILE else f"{path}#{frame}"


def read_by_us(dataset: AnomalibDataset, root: Path) -> AnomalibDataset:
    """Return a data set that reads images in anomalib's default way, such as ``Folder``'s, with our readers instead.

    Those with a way of reading of their own are returned as they are. Names of outputs are relative to ``root``.
    """
    if type(dataset).__getitem__ is not AnomalibDataset.__getitem__:
        return dataset
    own = MedicalDataset(dataset.samples, like=ImageRef(root, root=root))
    own.augmentations = dataset.augmentations
    return own
