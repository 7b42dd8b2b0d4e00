# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Folders and lists of medical images in any readable format, to predict and to train on.

No header value of a DICOM file gets beyond this module: images are named by their files, and patients are numbered.
"""

import logging
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataModule, AnomalibDataset, ImageItem
from anomalib.data.utils import LabelName, Split, ValSplitMode
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import EVAL_DATALOADERS
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Transform
from torchvision.tv_tensors import Image, Mask

from anomalib_mvfa.processes import gather_objects
from anomalib_mvfa.visualization import claim_name, loaded_dataset, results_dir

from .checks import check_images, enumerate_some, size_difference
from .readers import (
    ImageRef,
    IntensityRule,
    UnreadableImageError,
    is_dicom,
    is_volume,
    list_images,
    patient_key,
    read_image,
    read_mask,
    read_volume,
    same_grid,
    volume_slice,
    write_volume,
)

__all__ = ["AnomalyVolumes", "MedicalDataset", "MedicalFolder"]

logger = logging.getLogger(__name__)

GROUPINGS = ("folder", "patient", "csv")
LABELS = {
    "normal": LabelName.NORMAL,
    "good": LabelName.NORMAL,
    "0": LabelName.NORMAL,
    "abnormal": LabelName.ABNORMAL,
    "anomalous": LabelName.ABNORMAL,
    "ungood": LabelName.ABNORMAL,
    "1": LabelName.ABNORMAL,
}
SPLITS = {"train": Split.TRAIN, "val": Split.VAL, "valid": Split.VAL, "validation": Split.VAL, "test": Split.TEST}
WHOLE_FILE = -1  # stands for "no frame" in the table, whose column then is of integers


class MedicalDataset(AnomalibDataset):
    """Images in any readable format, with what is known about them.

    An item's ``image_path`` is the file, and for a slice or frame the file, ``#`` and its number.

    Args:
        samples: One row an image: ``image_path`` (the file), ``frame`` (-1 for a file that is one image),
            ``label_index``, ``mask_path`` (``""`` for none), ``split``, ``group`` (a number), ``problem`` (why the
            image cannot be used, found before reading; ``""`` for none). The order is kept.
        rule: How stored values become grey levels.
        axis: Axis along which volumes are cut.
        root: Folder that names of outputs are relative to.
        report: Whether an unreadable image becomes a black one whose ``explanation`` is the reason, not an error.
    """

    def __init__(
        self,
        samples: pd.DataFrame,
        rule: IntensityRule,
        axis: int = 2,
        root: Path | None = None,
        report: bool = False,
    ) -> None:
        super().__init__()
        self.samples = samples
        self.rule = rule
        self.axis = axis
        self.root = root
        self.report = report

    @property
    def samples(self) -> pd.DataFrame:
        """The table; anomalib's own setter would sort slices by the name of their volume, which they share."""
        return super().samples

    @samples.setter
    def samples(self, samples: pd.DataFrame) -> None:
        self._samples = samples.reset_index(drop=True)

    def __getitem__(self, index: int) -> ImageItem:
        """Read one image and its mask.

        Raises:
            UnreadableImageError: If the image or its mask gives none, or the mask has another size, unless such images
                are reported.
        """
        row = self.samples.iloc[index]
        frame = None if row.frame == WHOLE_FILE else int(row.frame)
        label = LabelName(row.label_index)
        mask, reason = None, ""
        try:
            image, mask = self._read(row, frame, label)
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
            gt_label=None if label == LabelName.UNKNOWN else torch.tensor(label.value),
            image_path=row.image_path if frame is None else f"{row.image_path}#{frame}",
            mask_path=row.mask_path,
            explanation=reason if self.report else None,
        )

    def _read(self, row: Any, frame: int | None, label: LabelName) -> tuple[Tensor, Mask | None]:  # noqa: ANN401
        path, mask_path = Path(row.image_path), Path(row.mask_path)
        if row.problem:
            raise UnreadableImageError(path, row.problem)
        try:
            image = read_image(ImageRef(path, frame, self.axis), self.rule)
            if self.task == TaskType.CLASSIFICATION:
                return image, None
            if label == LabelName.NORMAL:
                return image, Mask(torch.zeros(image.shape[-2:], dtype=torch.uint8))
            mask = read_mask(ImageRef(mask_path, frame, self.axis))
        except FileNotFoundError as error:
            raise UnreadableImageError(error.filename, "no such file") from None
        except UnreadableImageError:
            raise
        except ValueError as error:  # a mask file with fewer frames than its image
            raise UnreadableImageError(mask_path, f"does not fit {path.name}: {error}") from None
        if mask.shape != image.shape[-2:]:
            raise UnreadableImageError(mask_path, size_difference(mask.shape, image.shape))
        return image, Mask(mask.to(torch.uint8))

    def ref(self, image_path: str) -> ImageRef:
        """Give what an item's ``image_path`` stands for."""
        path, frame = Path(image_path), None
        file, mark, number = image_path.rpartition("#")
        if mark and not path.is_file():
            path, frame = Path(file), int(number)
        root = self.root if self.root is not None and path.is_relative_to(self.root) else None
        return ImageRef(path, frame, self.axis, root)

    @property
    def image_paths(self) -> list[str]:
        """The ``image_path`` of every item."""
        rows = zip(self.samples["image_path"], self.samples["frame"], strict=True)
        return [path if frame == WHOLE_FILE else f"{path}#{frame}" for path, frame in rows]

    def original(self, image_path: str) -> Tensor:
        """Read the image of an item again, at its own size: ``(3, H, W)`` in [0, 1]."""
        return read_image(self.ref(image_path), self.rule)

    def output_name(self, image_path: str) -> str:
        """Name the results of an item, with its folders and without a suffix."""
        return self.ref(image_path).name


class AnomalyVolumes(Callback):
    """Writes the anomaly map of each predicted NIfTI volume in the voxel grid of the volume.

    ``<name>_anomaly.nii.gz`` lies beside the heatmaps. Its values are those of the maps, in [0, 1] with the threshold
    at one half once a model is calibrated; slices that were left out are 0. Of several processes the first writes,
    with the slices of all.
    """

    def __init__(self) -> None:
        self._parts: dict[ImageRef, str] = {}  # files of this process's slices, where there are several processes
        self._folder = tempfile.TemporaryDirectory(prefix="anomalib-mvfa-")
        self._ref: ImageRef | None = None
        self._scores: NDArray[np.float32] = np.zeros(0, dtype=np.float32)
        self._names: dict[Path, str] = {}

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401 - an ImageBatch; Lightning says otherwise
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Fill the slices of a batch in; write a volume when the next file begins."""
        del pl_module, args, kwargs
        dataset = loaded_dataset(trainer)
        if not isinstance(dataset, MedicalDataset) or outputs.anomaly_map is None:
            return
        for item in outputs:
            ref = dataset.ref(item.image_path)
            if self._ref is not None and ref.path != self._ref.path:
                self._write(trainer)
            if is_volume(ref.path) and not item.explanation:
                if self._ref is None:
                    self._ref, self._scores = ref, np.zeros_like(read_volume(ref.path)[0])
                view = volume_slice(self._scores, ref.frame or 0, ref.axis)
                anomaly_map = item.anomaly_map.detach().float().cpu()[None, None]
                size = (view.shape[0], view.shape[1])
                resized = functional.interpolate(anomaly_map, size, mode="bilinear", align_corners=False)
                view[...] = resized[0, 0].numpy()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last volume, or bring together what several processes have."""
        del pl_module
        if self._ref is not None:
            self._write(trainer)
        volumes = {ref for refs in gather_objects(set(self._parts)) for ref in refs}
        for ref in sorted(volumes, key=lambda ref: ref.path):
            own = self._parts.pop(ref, None)
            parts = gather_objects(None if own is None else np.load(own))
            if trainer.is_global_zero:
                self._save(trainer, ref, sum(part for part in parts if part is not None))

    def _write(self, trainer: Trainer) -> None:
        ref, self._ref = self._ref, None
        if ref is None:
            return
        if trainer.world_size == 1:
            self._save(trainer, ref, self._scores)
            return
        ref = replace(ref, frame=None)
        self._parts[ref] = f"{self._folder.name}/{len(self._parts)}.npy"
        np.save(self._parts[ref], self._scores)

    def _save(self, trainer: Trainer, ref: ImageRef, scores: NDArray[np.float32]) -> None:
        name = ImageRef(ref.path, root=ref.root).name
        target = claim_name(results_dir(trainer) / f"{name}_anomaly.nii.gz", str(ref.path), self._names)
        write_volume(target, scores, like=ref.path)


class _Entry(NamedTuple):
    """The images of one file, or of one line of a list, with what was said about them."""

    refs: list[ImageRef]
    label: LabelName
    mask: Path | None = None
    group: str | None = None  # of the images; without one each file is its own
    split: str = ""


class MedicalFolder(AnomalibDataModule):
    """Images in any readable format: PNG, JPEG, BMP, TIFF, WebP of 8, 16 or 32 bits, DICOM, NIfTI.

    With ``path`` alone it serves prediction: every image of a file, or of a folder and its sub-folders. A file that
    cannot be read is reported in ``predictions.csv`` and the others are predicted.

    For training, ``normal_dir`` (and ``abnormal_dir``, ``mask_dir``) or ``image_list`` say what the images are. Before
    the first step every file is read once, and all that cannot be used are listed in one error. The images are split
    by groups, none of which is in two parts; a file with several slices is always one group at least. Shares count
    groups. Normal groups go to all three parts; groups with an abnormal image to validation and test, in the
    proportion of their shares, unless ``train_abnormal``.

    Slices of an abnormal volume that has a mask are abnormal where the mask has a pixel; without a mask all are.

    Args:
        path: File or folder.
        normal_dir: Folder of normal images, in ``path``.
        abnormal_dir: Folder of abnormal images, in ``path``.
        mask_dir: Folder of masks with the names of the abnormal images, in any readable format; NIfTI masks for NIfTI
            volumes.
        image_list: CSV file with the columns ``path`` and ``label`` (``normal``, ``good`` or 0; ``abnormal``,
            ``anomalous``, ``ungood`` or 1), and if wanted ``mask``, ``group`` and ``split`` (``train``, ``val``,
            ``test``). Paths are relative to ``path``; a path may be a folder of slices.
        group_by: What must not be torn apart. ``"patient"``: DICOM files of one PatientID; ``"folder"``: the files
            below one sub-folder of ``normal_dir`` and ``abnormal_dir`` (of the same name in both), or in one folder for
            ``image_list``; ``"csv"``: rows of one ``group``; ``None``: the column ``group`` where there is one, else
            each file stands for itself.
        train_abnormal: Whether abnormal images are trained on. For ``FewShot``, which draws its abnormal supports
            from the validation part, it is not needed.
        val_split_ratio: Share of the groups to validate on.
        test_split_ratio: Share of the groups to test on.
        intensity: How stored values become grey levels: ``"auto"``, ``"dicom"``, ``"percentile"``, a CT window by name
            (``"brain"``), or ``[centre, width]``; see :class:`~anomalib_mvfa.data.readers.IntensityRule`. By default
            the checkpoint's rule in prediction, otherwise ``"auto"``.
        axis: Axis along which volumes are cut: 0 sagittal, 1 coronal, 2 axial.
        slices: Range ``[start, stop]`` of slices or frames to use of each volume or multi-frame file.
        name: Name of the data, for the folder of results. Defaults to that of ``path``.
        class_name: What the images show, for the prompts.
        train_batch_size: Images a training step.
        eval_batch_size: Images a step of validation, test and prediction.
        num_workers: Number of processes that read ahead of the model.
        train_augmentations: Augmentations of training images.
        val_augmentations: Augmentations of validation images.
        test_augmentations: Augmentations of test images.
        augmentations: Augmentations where none of the three was given.
        seed: Seed of the split.

    Raises:
        ValueError: If arguments do not fit each other, in ``setup`` also if the images do not.

    Example:
        >>> MedicalFolder("scans", intensity=[40, 80]).intensity
        'brain'
    """

    def __init__(
        self,
        path: str | Path,
        normal_dir: str | None = None,
        abnormal_dir: str | None = None,
        mask_dir: str | None = None,
        image_list: str | Path | None = None,
        group_by: str | None = None,
        train_abnormal: bool = False,
        val_split_ratio: float = 0.2,
        test_split_ratio: float = 0.2,
        intensity: str | Sequence[float] | Mapping[str, Sequence[float]] | None = None,
        axis: int = 2,
        slices: tuple[int, int] | None = None,
        name: str | None = None,
        class_name: str | None = None,
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 2,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        seed: int | None = None,
    ) -> None:
        if image_list is not None and (normal_dir or abnormal_dir or mask_dir):
            msg = "Give either image_list or normal_dir, abnormal_dir and mask_dir, not both."
            raise ValueError(msg)
        if (abnormal_dir or mask_dir) and not normal_dir:
            msg = "abnormal_dir and mask_dir need normal_dir: training is on normal images."
            raise ValueError(msg)
        if mask_dir and not abnormal_dir:
            msg = "mask_dir needs abnormal_dir: masks are of abnormal images."
            raise ValueError(msg)
        if group_by is not None and group_by not in GROUPINGS:
            msg = f"group_by must be one of {', '.join(GROUPINGS)}, or nothing; got '{group_by}'."
            raise ValueError(msg)
        if group_by == "csv" and image_list is None:
            msg = "group_by='csv' takes the groups from the column 'group' of image_list: give that file."
            raise ValueError(msg)
        if min(val_split_ratio, test_split_ratio) < 0 or val_split_ratio + test_split_ratio >= 1:
            msg = (
                "val_split_ratio and test_split_ratio are shares of 1 and must leave some for training; "
                f"got {val_split_ratio} and {test_split_ratio}."
            )
            raise ValueError(msg)
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            val_split_mode=ValSplitMode.FROM_DIR,
            seed=seed,
        )
        self.path = Path(path)
        self.normal_dir = normal_dir
        self.abnormal_dir = abnormal_dir
        self.mask_dir = mask_dir
        self.image_list = image_list
        self.group_by = group_by
        self.train_abnormal = train_abnormal
        # The base class would take a share of 0 for one that was not given.
        self.val_split_ratio = val_split_ratio
        self.test_split_ratio = test_split_ratio
        self.axis = axis
        self.slices = slices
        self.class_name = class_name
        self._name = name or ImageRef(self.path.resolve()).name
        self._rule = None if intensity is None else IntensityRule.parse(intensity)

    @property
    def name(self) -> str:  # type: ignore[override]  # as anomalib's own datamodules
        """Name of the data."""
        return self._name

    @property
    def root(self) -> Path:
        """Folder of the images."""
        return self.path

    @property
    def intensity(self) -> str:
        """The intensity rule as text, the one given, in prediction otherwise the model's, or ``"auto"``."""
        if self._rule is None and self.trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING:
            return getattr(self.trainer.lightning_module, "intensity", None) or "auto"
        return str(self._rule or IntensityRule())

    @property
    def labelled(self) -> bool:
        """Whether it was said what the images are."""
        return self.image_list is not None or self.normal_dir is not None

    def setup(self, stage: str | None = None) -> None:
        """List the images; before training and testing also read each once.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``; ``None`` lists only.

        Raises:
            FileNotFoundError: If a file or folder does not exist.
            ValueError: If images cannot be used or do not suffice.
            ImportError: If the reader of a format that is there is not installed.
        """
        super().setup(stage)
        trainer = self.trainer
        if stage == TrainerFn.PREDICTING and trainer is not None:
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning
            if not any(isinstance(callback, AnomalyVolumes) for callback in callbacks):
                callbacks.append(AnomalyVolumes())

    def _setup(self, _stage: str | None = None) -> None:
        if not self.labelled and _stage == TrainerFn.VALIDATING:  # which precedes the prediction by given adapters
            return
        if not self.labelled and _stage == TrainerFn.PREDICTING:
            self.predict_data = self._unlabelled()
            return
        if not self.labelled:
            msg = (
                "MedicalFolder was given no labels. To train or test, say what the images are with normal_dir (and "
                "abnormal_dir, mask_dir), or with image_list; to get predictions alone use `anomalib predict`."
            )
            raise ValueError(msg)
        samples = self._samples_of(list(self._listed() if self.image_list else self._in_folders()))
        parts = {split: samples[samples["split"] == split.value] for split in (Split.TRAIN, Split.VAL, Split.TEST)}
        rule = IntensityRule.parse(self.intensity)
        root = self.path if self.path.is_dir() else self.path.parent
        datasets = {split: MedicalDataset(part, rule, self.axis, root) for split, part in parts.items()}
        self.train_data = datasets[Split.TRAIN]
        self.test_data: MedicalDataset = datasets[Split.TEST]
        if len(datasets[Split.VAL]):
            self.val_data = datasets[Split.VAL]
        if _stage == TrainerFn.PREDICTING:
            self.test_data.report = True
        elif _stage is not None:
            check_images(*datasets.values(), num_workers=self.num_workers)

    def _create_test_split(self) -> None:
        """The groups are split already."""

    def _create_val_split(self) -> None:
        """The groups are split already."""

    def _update_augmentations(self) -> None:
        super()._update_augmentations()
        data = getattr(self, "predict_data", None)
        if data is not None:
            pre_processor = getattr(getattr(self.trainer, "lightning_module", None), "pre_processor", None)
            transform = getattr(pre_processor, "transform", None)
            data.augmentations = self.test_augmentations
            if transform is not None:
                self._update_subset_augmentations(data, self.test_augmentations, transform)

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Give the validation images; nothing if there are none."""
        return super().val_dataloader() if hasattr(self, "val_data") else []

    def predict_dataloader(self) -> EVAL_DATALOADERS:
        """Give every image of ``path``, or the test images where labels were given."""
        data: Any = self.test_data if self.labelled else self.predict_data
        data.rule = IntensityRule.parse(self.intensity)  # the checkpoint, and with it the rule, has been read by now
        return DataLoader(
            data,
            batch_size=self.eval_batch_size,
            num_workers=min(self.num_workers, len(data) - 1),
            collate_fn=self.external_collate_fn or data.collate_fn,
        )

    def _unlabelled(self) -> MedicalDataset:
        refs = list_images(self.path, axis=self.axis, slices=self.slices)
        samples = pd.DataFrame(
            {
                "image_path": [str(ref.path) for ref in refs],
                "frame": [WHOLE_FILE if ref.frame is None else ref.frame for ref in refs],
                "label_index": LabelName.UNKNOWN.value,
                "mask_path": "",
                "split": Split.TEST.value,
                "problem": "",
            }
        )
        samples.attrs["task"] = TaskType.CLASSIFICATION.value
        return MedicalDataset(samples, IntensityRule(), self.axis, refs[0].root, report=True)

    # Labelled images

    def _in_folders(self) -> Iterator[_Entry]:
        """Name the files of the folders."""
        masks = {}
        if self.mask_dir:
            folder = self.path / self.mask_dir
            files = (file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.startswith("."))
            masks = {ImageRef(file, root=folder).name: file for file in files}
            if not masks:
                msg = f"No mask in {folder}. Put masks with the names of the abnormal images there, or omit mask_dir."
                raise FileNotFoundError(msg)
        for name, label in ((self.normal_dir, LabelName.NORMAL), (self.abnormal_dir, LabelName.ABNORMAL)):
            if name is None:
                continue
            folder = self.path / name
            loose = []
            refs: dict[Path, list[ImageRef]] = {}
            for ref in list_images(folder, axis=self.axis, slices=self.slices):
                refs.setdefault(ref.path, []).append(ref)
            for file, images in refs.items():
                inner = file.relative_to(folder).parts
                loose += [str(file)] if len(inner) == 1 else []
                mask = masks.get(ImageRef(file, root=folder).name) if label == LabelName.ABNORMAL else None
                yield _Entry(images, label, mask, inner[0] if self.group_by == "folder" else None)
            if loose and self.group_by == "folder":
                msg = (
                    f"group_by='folder' needs one folder a patient in {folder}, but {len(loose)} images lie in it "
                    f"directly: {enumerate_some(loose, 5)}. Move them into folders, or choose another group_by."
                )
                raise ValueError(msg)

    def _listed(self) -> Iterator[_Entry]:
        """Name the files of the list."""
        path = Path(self.image_list or "")
        table = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True)
        columns = {"path", "label"} | ({"group"} if self.group_by == "csv" else set())
        if not columns <= set(table.columns):
            msg = f"{path} needs the columns {', '.join(sorted(columns))}; it has {', '.join(table.columns)}."
            raise ValueError(msg)
        wrong = [
            f"line {number + 2}: {column} '{value}'"
            for column, known in (("label", LABELS), ("split", SPLITS))
            if column in table
            for number, value in enumerate(table[column])
            if value.strip().lower() not in known
        ]
        if wrong:
            msg = (
                f"{path} has values that are not understood: {enumerate_some(wrong, 5)}. "
                f"Labels are {', '.join(LABELS)}; splits are train, val, test, in every line or in none."
            )
            raise ValueError(msg)
        lone = [line + 2 for line, group in enumerate(table["group"]) if not group] if "group" in table else []
        if lone:
            msg = f"{path} has lines without a group: {enumerate_some(list(map(str, lone)), 5)}. Fill the column in."
            raise ValueError(msg)
        for row in table.to_dict("records"):
            file = self.path / row["path"]
            yield _Entry(
                # one that does not exist is listed, so that reading it tells
                list_images(file, axis=self.axis, slices=self.slices) if file.exists() else [ImageRef(file)],
                LABELS[row["label"].strip().lower()],
                self.path / row["mask"] if row.get("mask") else None,
                str(file.parent) if self.group_by == "folder" else row.get("group"),
                SPLITS[row["split"].strip().lower()].value if "split" in row else "",
            )

    def _samples_of(self, entries: Sequence[_Entry]) -> pd.DataFrame:
        """Make the table of all images."""
        has_masks = any(entry.mask for entry in entries)
        salt = secrets.token_bytes(16)
        numbers: dict[str, int] = {}  # what a group is called is not kept
        nameless = []
        rows = []
        for entry in entries:
            for ref in entry.refs:
                group = entry.group or str(ref.path)
                if self.group_by == "patient":
                    group = _patient(ref.path, salt) or ""
                    nameless += [] if group else [str(ref.path)]
                label, problem = _slice_label(entry, ref, has_masks)
                rows.append(
                    {
                        "image_path": str(ref.path),
                        "frame": WHOLE_FILE if ref.frame is None else ref.frame,
                        "label_index": label.value,
                        "mask_path": str(entry.mask or "") if label == LabelName.ABNORMAL else "",
                        "group": numbers.setdefault(group, len(numbers)),
                        "split": entry.split,
                        "problem": problem,
                    }
                )
        if nameless:
            msg = (
                "group_by='patient' needs DICOM files with a PatientID; there is none in "
                f"{enumerate_some(list(dict.fromkeys(nameless)), 5)}. "
                "Group by 'folder', or give the groups in image_list with group_by='csv'."
            )
            raise ValueError(msg)
        lone = self.group_by is None and all(entry.group is None for entry in entries)
        if lone and any(is_dicom(ref.path) for entry in entries for ref in entry.refs):
            logger.warning(
                "The DICOM files are split file by file, so that images of one patient may be in several parts; "
                "group_by='patient' keeps them together.",
            )
        samples = pd.DataFrame(rows)
        samples["label"] = samples["label_index"].map({0: "normal", 1: "abnormal"})
        samples.attrs["task"] = (TaskType.SEGMENTATION if has_masks else TaskType.CLASSIFICATION).value
        return self._split(samples)

    def _split(self, samples: pd.DataFrame) -> pd.DataFrame:
        """Fill the column ``split`` in, group by group, or check the one that was given."""
        groups = samples.groupby("group", sort=True)
        if (samples["split"] != "").any():
            torn = [str(part["image_path"].iloc[0]) for _, part in groups if len(set(part["split"])) > 1]
            if torn:
                msg = (
                    f"{len(torn)} groups are in more than one split of {self.image_list}: those of "
                    f"{enumerate_some(torn, 5)}. Put all rows of a group into one split."
                )
                raise ValueError(msg)
        else:
            abnormal = groups["label_index"].max() == LabelName.ABNORMAL.value
            generator = torch.Generator().manual_seed(self.seed or 0)
            splits: dict[int, str] = {}
            for with_abnormal in (False, True):
                members = abnormal.index[abnormal == with_abnormal].to_numpy()
                order = members[torch.randperm(len(members), generator=generator).numpy()]
                counts = self._counts(len(order), train=self.train_abnormal or not with_abnormal)
                names = np.repeat([split.value for split in counts], list(counts.values()))
                splits.update(zip(order.tolist(), names.tolist(), strict=True))
            samples["split"] = samples["group"].map(splits)
        training = samples[samples["split"] == Split.TRAIN.value]
        if not (training["label_index"] == LabelName.NORMAL.value).any():
            msg = (
                f"No normal image is left to train on: {self.path} gives {groups.ngroups} groups, none of which comes "
                "into the training part with normal images alone. Add images, or group more finely."
            )
            raise ValueError(msg)
        return samples

    def _counts(self, count: int, train: bool) -> dict[Split, int]:
        """Share groups out: one at least for each part with a share, as long as there are enough."""
        shares = {Split.VAL: self.val_split_ratio, Split.TEST: self.test_split_ratio}
        if not train:
            whole = sum(shares.values()) or 1.0
            shares = {split: share / whole for split, share in shares.items()}
        counts = {Split.TRAIN: 0, **{split: max(1, round(share * count)) for split, share in shares.items() if share}}
        if train:
            counts[Split.TRAIN] = min(count, max(1, count - sum(counts.values())))
        counts[Split.VAL] = min(counts.get(Split.VAL, 0), count - counts[Split.TRAIN])
        counts[Split.TEST] = count - counts[Split.VAL] - counts[Split.TRAIN]
        return counts


def _patient(path: Path, salt: bytes) -> str | None:
    """Give the key of a file's patient, or ``None`` for a file that tells none."""
    try:
        return patient_key(path, salt)
    except (UnreadableImageError, FileNotFoundError):
        return None


def _slice_label(entry: _Entry, ref: ImageRef, has_masks: bool) -> tuple[LabelName, str]:
    """Give the label of an image and what is wrong with it, as far as that can be told without reading it."""
    label, mask = entry.label, entry.mask
    if label == LabelName.NORMAL or not has_masks:
        return label, ""
    if mask is None:
        return label, "abnormal, but without a mask of the same stem, while the set has masks"
    if not is_volume(ref.path) or ref.frame is None:
        return label, ""
    try:
        if not is_volume(mask) or not same_grid(ref.path, mask):
            return label, f"its mask {mask} is no NIfTI volume of the same voxel grid; resample it"
        filled = read_mask(ImageRef(mask, ref.frame, ref.axis)).any()
    except (UnreadableImageError, FileNotFoundError):
        return label, ""  # reading it tells
    return (LabelName.ABNORMAL if filled else LabelName.NORMAL), ""
