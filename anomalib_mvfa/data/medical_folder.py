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
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anomalib import TaskType
from anomalib.data.utils import LabelName, Split, TestSplitMode, ValSplitMode
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import EVAL_DATALOADERS
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from anomalib_mvfa.processes import gather_objects
from anomalib_mvfa.visualization import claim_name, loaded_dataset, results_dir

from .base import SplitDataModule, enumerate_some
from .medical_dataset import WHOLE_FILE, MedicalDataset
from .readers import ImageRef, IntensityRule, fill_slice, list_images, read_mask, read_volume, write_volume
from .readers.dicom import dicom_header, patient_key
from .readers.files import MAX_PIXELS, is_dicom, is_volume
from .readers.volumes import same_grid
from .splits import drop_copies, parse_pattern, pattern_groups, split_groups

__all__ = ["MedicalFolder"]

logger = logging.getLogger(__name__)

GROUPINGS = ("folder", "patient", "csv")
LABELS = {
    **dict.fromkeys(("normal", "good", "0"), LabelName.NORMAL),
    **dict.fromkeys(("abnormal", "anomalous", "ungood", "1"), LabelName.ABNORMAL),
}
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class _Entry(NamedTuple):  # one file, or one line of a list
    refs: list[ImageRef]
    label: LabelName
    mask: Path | None = None  # of a folder of slices a folder of masks of the same names
    group: str | None = None  # of all images; without one it follows from each file
    split: str = ""


class MedicalFolder(SplitDataModule):
    r"""Images in any readable format: PNG, JPEG, BMP, TIFF, WebP of 8, 16 or 32 bits, DICOM, NIfTI, MetaImage, NRRD.

    With ``path`` alone it serves prediction: every image of a file, or of a folder and its sub-folders. A file that
    cannot be read is reported in ``predictions.csv`` and the others are predicted.

    For training, ``normal_dir`` (and ``abnormal_dir``, ``mask_dir``) or ``image_list`` say what the images are. They
    are split by groups, none of which is in two parts. Shares count groups. Normal groups go to all three parts;
    groups with an abnormal image to validation and test, in the proportion of their shares, unless ``train_abnormal``.
    Images with the same pixels as one of the training part are left out of validation and test.

    An abnormal image whose mask is empty, such as a slice beside the lesion, has label 0; without masks all images of
    an abnormal file are abnormal.

    Args:
        path: File or folder.
        normal_dir: Folder of normal images, in ``path``.
        abnormal_dir: Folder of abnormal images, in ``path``.
        mask_dir: Folder of masks with the names of the abnormal images, in any readable format; volumes for volumes.
        image_list: CSV file with the columns ``path`` and ``label`` (``normal``, ``good`` or 0; ``abnormal``,
            ``anomalous``, ``ungood`` or 1), and if wanted ``mask``, ``group`` and ``split`` (``train``, ``val``,
            ``test``). Paths are relative to ``path``; one may be a folder of slices, a group with a folder of masks.
        group_by: What must not be split. ``"patient"``: DICOM files of one PatientID; ``"folder"``: files in one
            folder, with ``normal_dir`` below one sub-folder (of the same name in ``abnormal_dir``); ``"csv"``: rows of
            one ``group``; a regular expression such as ``"(?P<patient>\d+)_\d+"``: files whose names share the text of
            its first group; ``None``: the column ``group``, else each listed folder, DICOM series and other file.
        train_abnormal: Whether abnormal images are trained on. For ``FewShot``, which draws its abnormal supports
            from the validation part, it is not needed.
        val_split_ratio: Share of the groups to validate on.
        test_split_ratio: Share of the groups to test on.
        intensity: How stored values become grey levels: ``"auto"``, ``"dicom"``, ``"percentile"``, a CT window by name
            (``"brain"``), or ``[centre, width]``; see :class:`~anomalib_mvfa.data.readers.IntensityRule`. By default
            the checkpoint's rule in prediction, otherwise ``"auto"``.
        axis: Axis along which volumes are cut: 0 sagittal, 1 coronal, 2 axial.
        slices: Range ``[start, stop]`` of slices or frames to use of each volume or multi-frame file.
        volume: Which volume of a file of four or more dimensions, from 0; without it such files are refused.
        max_pixels: Largest number of voxels of a volume, or of pixels over all frames of a DICOM file, that is read.
        blackout: Rectangles ``[left, top, width, height]`` in pixels that are set to black in every image, for text
            that is burned into the pixels.
        name: Name of the data in results and checkpoints, by default ``"MedicalFolder"``, without labels
            ``"Prediction"``.
        class_name: What the images show, for the prompts.
        train_batch_size: Images per training step.
        eval_batch_size: Images per step of validation, test and prediction.
        num_workers: Number of processes that read ahead of the model.
        seed: Seed of the split.
        **kwargs: The four arguments on augmentations of every datamodule of anomalib.

    Raises:
        ValueError: If arguments do not fit each other, in ``setup`` also if the images do not.

    Example:
        >>> MedicalFolder("scans", intensity=[40, 80]).intensity
        'brain'
    """

    def __init__(
        self,
        path: str | Path,
        normal_dir: str | Path | None = None,
        abnormal_dir: str | Path | None = None,
        mask_dir: str | Path | None = None,
        image_list: str | Path | None = None,
        group_by: str | None = None,
        train_abnormal: bool = False,
        val_split_ratio: float = 0.2,
        test_split_ratio: float = 0.2,
        intensity: str | Sequence[float] | Mapping[str, Sequence[float]] | None = None,
        axis: int = 2,
        slices: tuple[int, int] | None = None,
        volume: int | None = None,
        max_pixels: int = MAX_PIXELS,
        blackout: Sequence[Sequence[int]] = (),
        name: str | None = None,
        class_name: str | None = None,
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 2,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        if image_list is not None and (normal_dir or abnormal_dir or mask_dir):
            msg = "Give either image_list or normal_dir, abnormal_dir and mask_dir, not both."
            raise ValueError(msg)
        if (abnormal_dir and not normal_dir) or (mask_dir and not abnormal_dir):
            msg = "abnormal_dir needs normal_dir beside it, and mask_dir needs abnormal_dir: add the folder."
            raise ValueError(msg)
        pattern = None if group_by in GROUPINGS else group_by
        if pattern and "(" not in pattern:
            choices = ", ".join(GROUPINGS)
            msg = f"group_by must be one of {choices}, or a pattern of file names with a group; got '{group_by}'."
            raise ValueError(msg)
        if pattern:
            parse_pattern(pattern)
        if any(len(box) != 4 or min(box) < 0 for box in blackout):
            msg = f"blackout takes rectangles [left, top, width, height] in pixels, got {list(blackout)}."
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
            val_split_mode=ValSplitMode.FROM_DIR,
            test_split_mode=TestSplitMode.FROM_DIR,
            # The base class would take a share of 0 for one that was not given.
            val_split_ratio=None,
            test_split_ratio=None,
            seed=seed,
            **kwargs,
        )
        self.path = Path(path)
        self.normal_dir = normal_dir
        self.abnormal_dir = abnormal_dir
        self.mask_dir = mask_dir
        self.image_list = image_list
        self.group_by = group_by
        self._pattern = pattern
        self.train_abnormal = train_abnormal
        self.val_split_ratio = val_split_ratio
        self.test_split_ratio = test_split_ratio
        self.axis = axis
        self.slices = slices
        self.volume = volume
        self.max_pixels = max_pixels
        self.blackout = blackout
        self.class_name = class_name
        # Never that of a folder, which may be a patient's. anomalib's folders of training and prediction do not mix.
        self._name = name or (type(self).__name__ if self.labelled else "Prediction")
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

    @property
    def _like(self) -> ImageRef:
        """How images are read, and where their names begin."""
        root = self.path if self.path.is_dir() else self.path.parent
        return ImageRef(self.path, None, self.axis, root, self.volume, self.max_pixels)

    def setup(self, stage: str | None = None) -> None:
        """List the images, check those of the stage, and in prediction write anomaly maps of volumes."""
        predicting = stage == TrainerFn.PREDICTING
        if not self.labelled and not predicting:
            if stage == TrainerFn.VALIDATING:  # which precedes the prediction by given adapters
                return
            msg = (
                "MedicalFolder was given no labels. To train or test, say what the images are with normal_dir (and "
                "abnormal_dir, mask_dir), or with image_list; to get predictions alone use `anomalib predict`."
            )
            raise ValueError(msg)
        super().setup(stage)
        if predicting and self.trainer is not None:
            callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning
            if not any(isinstance(callback, AnomalyVolumes) for callback in callbacks):
                callbacks.append(AnomalyVolumes())

    def _setup(self, _stage: str | None = None) -> None:
        rule = IntensityRule.parse(self.intensity)
        read = partial(MedicalDataset, rule=rule, like=self._like, blackout=self.blackout)
        samples = self._table(list(self._listed() if self.image_list else self._in_folders()))
        if not self.labelled:
            self.test_data = read(samples)
            return
        samples = self._split(samples)
        train, test, val = (samples[samples["split"] == split] for split in (Split.TRAIN, Split.TEST, Split.VAL))
        if _stage is not None:  # FewShot, which asks for no stage, looks for copies of its supports
            of = "images of other parts"
            test = test.iloc[drop_copies(test, train, Split.TEST, of, self._like)]
            val = val.iloc[drop_copies(val, pd.concat([train, test]), Split.VAL, of, self._like)]
        self.train_data, self.test_data = read(train), read(test)
        if len(val):
            self.val_data = read(val)

    def predict_dataloader(self) -> EVAL_DATALOADERS:
        """Return every image of ``path``, or the test images where labels were given."""
        data: Any = self.test_data
        data.report = True
        data.rule = IntensityRule.parse(self.intensity)  # the checkpoint, and with it the rule, has been read by now
        return DataLoader(
            data,
            batch_size=self.eval_batch_size,
            num_workers=min(self.num_workers, len(data) - 1),
            collate_fn=self.external_collate_fn or data.collate_fn,
        )

    def _images_in(self, path: Path) -> list[ImageRef]:
        """List the images of a file or folder."""
        refs = list_images(path, axis=self.axis, slices=self.slices, volume=self.volume, max_pixels=self.max_pixels)
        return [replace(ref, root=self._like.root) for ref in refs]

    def _in_folders(self) -> Iterator[_Entry]:
        """Yield the files of the folders."""
        masks = _masks_in(self.path / self.mask_dir) if self.mask_dir else {}
        if self.mask_dir and not masks:
            msg = (
                f"No mask in {self.path / self.mask_dir}. Put masks with the names of the abnormal images there, "
                "or omit mask_dir."
            )
            raise FileNotFoundError(msg)
        given: Sequence[tuple[Any, LabelName]] = (("", LabelName.UNKNOWN),)
        if self.labelled:
            given = ((self.normal_dir, LabelName.NORMAL), (self.abnormal_dir, LabelName.ABNORMAL))
        for folder, label in ((self.path / name, label) for name, label in given if name is not None):
            loose = []
            for file, images in groupby(self._images_in(folder), key=lambda ref: ref.path):
                inner = file.relative_to(folder).parts
                loose += [] if inner[1:] else [str(file)]
                mask = masks.get(ImageRef(file, root=folder).name) if label == LabelName.ABNORMAL else None
                yield _Entry(list(images), label, mask, inner[0] if inner[1:] and self.group_by == "folder" else None)
            if loose and self.group_by == "folder" and self.labelled:
                msg = (
                    f"group_by='folder' needs one folder per patient in {folder}, but {len(loose)} images lie in it "
                    f"directly: {enumerate_some(loose)}. Move them into folders, or choose another group_by."
                )
                raise ValueError(msg)

    def _listed(self) -> Iterator[_Entry]:
        """Yield the files of the list."""
        path = Path(self.image_list or "")
        table = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True)
        columns = {"path", "label"} | ({"group"} if self.group_by == "csv" else set())
        if not columns <= set(table.columns):
            msg = f"{path} needs the columns {', '.join(sorted(columns))}; it has {', '.join(table.columns)}."
            raise ValueError(msg)
        wrong = []
        for column, known in (("label", LABELS), ("split", SPLITS)):
            if column in table:
                given, table[column] = table[column], table[column].str.strip().str.lower().map(known)
                unknown = table.index[table[column].isna()]
                wrong += [f"line {row + 2}: {column} '{given[row]}'" for row in unknown]
        if wrong:
            msg = (
                f"{path} has values that are not understood: {enumerate_some(wrong)}. "
                f"Labels are {', '.join(LABELS)}; splits are train, val, test, in every line or in none."
            )
            raise ValueError(msg)
        lone = [str(line + 2) for line, group in enumerate(table.get("group", ())) if not group]
        if lone:
            msg = f"{path} has lines without a group: {enumerate_some(lone)}. Fill the column in."
            raise ValueError(msg)
        for row in table.to_dict("records"):
            file = self.path / row["path"]
            # One that does not exist is listed, so that reading it reports it.
            refs = self._images_in(file) if file.exists() else [replace(self._like, path=file)]
            mask = self.path / row["mask"] if row.get("mask") else None
            group = row.get("group") or (str(file) if file.is_dir() else None)
            if self.group_by == "folder":
                group = str(file if file.is_dir() else file.parent)
            yield _Entry(refs, LabelName(row["label"]), mask, group, row.get("split", ""))

    def _table(self, entries: Sequence[_Entry]) -> pd.DataFrame:
        """Build the table of all images."""
        has_masks = any(entry.mask for entry in entries)
        rows = []
        for entry in entries:
            masks = _masks_in(entry.mask) if entry.mask and entry.mask.is_dir() else None
            for ref in entry.refs:
                mask = entry.mask if masks is None else masks.get(ImageRef(ref.path).name)
                label, problem = _slice_label(entry.label, mask, ref, has_masks)
                rows.append(
                    {
                        "image_path": str(ref.path),
                        "frame": WHOLE_FILE if ref.frame is None else ref.frame,
                        "label_index": label.value,
                        "abnormal": entry.label == LabelName.ABNORMAL,
                        "mask_path": str(mask or "") if label == LabelName.ABNORMAL else "",
                        "given_group": entry.group,
                        "split": entry.split,
                        "problem": problem,
                    }
                )
        samples = pd.DataFrame(rows)
        empty = samples["abnormal"] & (samples["label_index"] == LabelName.NORMAL.value)
        if empty.any():
            logger.info("%d images of abnormal files have an empty mask and are labelled normal.", empty.sum())
        samples["group"] = self._groups(samples)
        samples["label"] = samples["label_index"].map({0: "normal", 1: "abnormal"})
        samples.attrs["task"] = (TaskType.SEGMENTATION if has_masks else TaskType.CLASSIFICATION).value
        return samples.drop(columns="given_group")

    def _groups(self, samples: pd.DataFrame) -> list[int]:
        """Return a number for the group of each image; what a group is called is not kept."""
        files = samples["image_path"].unique()
        keys: dict[str, str | None] = dict.fromkeys(files)
        if self.group_by == "patient":
            salt = secrets.token_bytes(16)
            keys = {file: patient_key(file, salt) for file in files}
            nameless = [file for file, key in keys.items() if key is None]
            if nameless and self.labelled:
                msg = (
                    "group_by='patient' needs DICOM files with a PatientID; there is none in "
                    f"{enumerate_some(nameless)}. "
                    "Group by 'folder', or give the groups in image_list with group_by='csv'."
                )
                raise ValueError(msg)
        elif self._pattern:
            keys = dict(zip(files, pattern_groups(files, self._pattern), strict=True))
        elif self.labelled and samples["given_group"].isna().all() and any(map(is_dicom, files)):
            logger.warning(
                "The DICOM files are split series by series, so that series of one patient may be in several parts; "
                "group_by='patient' keeps them together.",
            )
        names = []
        for file, given in zip(samples["image_path"], samples["given_group"], strict=True):
            series = dicom_header(ImageRef(Path(file))).series
            names.append(keys[file] or given or (f"{Path(file).parent}\0{series}" if series else file))
        return pd.factorize(pd.Series(names))[0].tolist()

    def _split(self, samples: pd.DataFrame) -> pd.DataFrame:
        """Fill in the column ``split``, group by group, or check the one that was given."""
        if (samples["split"] != "").any():
            several = samples.groupby("group").filter(lambda group: len(set(group["split"])) > 1)
            torn = several.drop_duplicates("group")["image_path"].tolist()
            if torn:
                msg = (
                    f"{len(torn)} groups are in more than one split of {self.image_list}: those of "
                    f"{enumerate_some(torn)}. Put all rows of a group into one split."
                )
                raise ValueError(msg)
        else:
            shares = {Split.VAL: self.val_split_ratio, Split.TEST: self.test_split_ratio}
            shares[Split.TRAIN] = 1 - sum(shares.values())
            remedy = "Add some, group more finely, or set val_split_ratio or test_split_ratio to 0."
            samples["split"] = split_groups(samples, shares, self.seed or 0, self.train_abnormal, remedy)
        training = samples[samples["split"] == Split.TRAIN.value]
        if not (training["label_index"] == LabelName.NORMAL.value).any():
            msg = (
                f"No normal image is left to train on: {self.path} has {samples['group'].nunique()} groups, none of "
                "which comes into the training part with normal images alone. Add images, or group more finely."
            )
            raise ValueError(msg)
        return samples


def _masks_in(folder: Path) -> dict[str, Path]:
    """Return the files of a folder by their relative names without suffix."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.startswith("."))
    return {ImageRef(file, root=folder).name: file for file in files}


def _slice_label(label: LabelName, mask: Path | None, ref: ImageRef, has_masks: bool) -> tuple[LabelName, str]:
    """Return the label of an image, and what is wrong with it as far as that is known without reading the image."""
    if label != LabelName.ABNORMAL or not has_masks or mask is None:  # reading it reports a missing mask
        return label, ""
    try:
        if is_volume(ref.path) and ref.frame is not None and not (is_volume(mask) and same_grid(ref.path, mask)):
            return label, f"its mask {mask} is no volume of the same voxel grid; resample it"
        filled = read_mask(replace(ref, path=mask)).any()
    except (ValueError, FileNotFoundError):
        return label, ""  # reading it reports the reason
    return (LabelName.ABNORMAL if filled else LabelName.NORMAL), ""


class AnomalyVolumes(Callback):
    """Writes the anomaly map of each predicted volume in the voxel grid of the volume, as NIfTI.

    ``<name>_anomaly.nii.gz`` is written beside the heatmaps. Its values are those of the maps, in [0, 1] with the
    threshold at one half once a model is calibrated; slices that were left out are 0. Of several processes the first
    writes, with the slices of all.
    """

    def __init__(self) -> None:
        self._parts: dict[ImageRef, str] = {}  # files of this process's slices, where there are several processes
        self._folder = tempfile.TemporaryDirectory(prefix="anomalib-mvfa-")
        self._ref: ImageRef | None = None
        self._scores: NDArray[np.float32] = np.zeros(0, dtype=np.float32)
        self._names: dict[Path, str] = {}

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Fill in the slices of a batch; write a volume when the next file begins."""
        del pl_module
        dataset = loaded_dataset(trainer)
        if not isinstance(dataset, MedicalDataset) or outputs.anomaly_map is None:
            return
        for item in outputs:
            ref = dataset.ref(item.image_path)
            if self._ref is None or ref.path != self._ref.path:
                self._write(trainer)
            if is_volume(ref.path) and not item.explanation:
                if self._ref is None:
                    self._ref = replace(ref, frame=None)
                    self._scores = np.zeros_like(read_volume(ref.path, ref.volume, ref.max_pixels)[0])
                fill_slice(self._scores, ref.frame or 0, ref.axis, item.anomaly_map.detach().float().cpu())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last volume, or merge the slices of several processes."""
        del pl_module
        self._write(trainer)
        volumes = {ref for refs in gather_objects(set(self._parts)) for ref in refs}
        for ref in sorted(volumes, key=lambda ref: ref.path):
            own = self._parts.pop(ref, None)
            parts = gather_objects(None if own is None else np.load(own))
            if trainer.is_global_zero:
                self._save(trainer, ref, sum(part for part in parts if part is not None))

    def _write(self, trainer: Trainer) -> None:
        ref, self._ref = self._ref, None
        if ref is not None and trainer.world_size == 1:
            self._save(trainer, ref, self._scores)
        elif ref is not None:
            self._parts[ref] = f"{self._folder.name}/{len(self._parts)}.npy"
            np.save(self._parts[ref], self._scores)

    def _save(self, trainer: Trainer, ref: ImageRef, scores: NDArray[np.float32]) -> None:
        target = claim_name(results_dir(trainer) / f"{ref.name}_anomaly.nii.gz", str(ref.path), self._names)
        write_volume(target, scores, like=ref.path)
