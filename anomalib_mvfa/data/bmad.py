# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The BMAD sets, in the three folder layouts in which they are handed on.

BMAD (Bao et al., "BMAD: Benchmarks for Medical Anomaly Detection", https://arxiv.org/abs/2306.11876, CC BY-NC-SA 4.0)
gathers six sets: Brain, Liver and Retina_RESC come with lesion masks, Retina_OCT2017, Chest and Histopathology with
image labels only::

    <root>/<Set>/{train/good, valid|test/{good,Ungood}/{img,label}}           the download of anomalib
    <root>/<Set>/{train/good, valid|test/{good,Ungood}/{img,anomaly_mask}}    BMAD's own description
    <root>/<Set>_AD/{valid,test}/{good,Ungood}/{img,anomaly_mask}             the archives of MVFA, no train split

Which one lies under ``root`` is found by looking. Folder names match in any letter case, the ``img`` level may be
absent, and any set that is laid out like one of these is read, whatever its name. BMAD asks that the test split stay
untouched until the final evaluation, so validation uses the ``valid`` split.
"""

import re
from pathlib import Path

import pandas as pd
from anomalib.data import BMAD
from anomalib.data.utils import LabelName, Split, ValSplitMode
from lightning.pytorch.trainer.states import TrainerFn
from pandas import DataFrame

from anomalib_mvfa.model.prompts import prompt_name, published_class_names

from .base import CheckedDataModule, enumerate_some
from .medical_dataset import MedicalDataset
from .readers import ImageRef
from .splits import drop_copies

__all__ = ["MedicalBMAD", "available_sets", "find_set", "read_samples", "read_set"]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})
# Where a set has both, `anomaly_mask` outlines the lesion and `label` may outline the organ, so the former goes first.
MASK_FOLDERS = ("anomaly_mask", "label")
# The split folders of a set, each with the label folders that are read.
_BOTH = ("good", "Ungood")
_PARTS = {Split.TRAIN: ("train", "good"), Split.VAL: ("valid", *_BOTH), Split.TEST: ("test", *_BOTH)}


def available_sets(root: Path | str) -> list[str]:
    """Names of the sets under ``root``, or of the set that it is, in any of the layouts, sorted, without ``_AD``."""
    root = Path(root)
    folders = [root.absolute()] if _is_set(root) else filter(_is_set, _subfolders(root))
    return sorted({_set_name(folder.name) for folder in folders})


def find_set(root: Path | str, category: str) -> Path:
    """Find the folder of a set; ``<root>/<category>`` is preferred to ``<root>/<category>_AD``.

    ``root`` may also be the set's own folder. Case and ``_AD`` do not matter in ``category``.

    Raises:
        FileNotFoundError: If no such set lies under ``root``. The message lists what was looked for and what is there.
        ValueError: If ``root`` is the folder of another BMAD set than ``category``.
    """
    root, name = Path(root), _set_name(category)
    matches = [folder for folder in _subfolders(root) if _set_name(folder.name).lower() == name.lower()]
    matches.sort(key=lambda folder: folder.name.lower() != category.lower())
    folder = next(filter(_is_set, (root, *matches)), None)
    if folder is None:
        msg = (
            f"No set '{category}' under {root}: looked for {name}/ and {name}_AD/ (or {root} itself) "
            "with the folders test/good and test/Ungood. "
            f"{' '.join(_contents(candidate) for candidate in (root, *matches))} "
            f"Sets found: {', '.join(available_sets(root)) or 'none'}. "
            "Pass the folder that holds the sets as root and the name of one of them as category."
        )
        raise FileNotFoundError(msg)
    own_name = _set_name(folder.absolute().name)
    if own_name.lower() in published_class_names() and own_name.lower() != name.lower():
        msg = (
            f"{folder} is the set {own_name}, but category is '{category}': "
            f"pass category='{own_name}', or the parent folder as root."
        )
        raise ValueError(msg)
    return folder


def read_samples(folder: Path) -> DataFrame:
    """List the images of a set, each abnormal one with the mask of the same stem.

    Returns:
        One row an image: ``image_path``, ``split`` (``"train"``, ``"val"``, ``"test"``), ``label`` (``"good"``,
        ``"Ungood"``), ``label_index`` (0, 1) and ``mask_path`` (``""`` for none). ``attrs["task"]`` is
        ``"segmentation"`` for a set with masks in ``test/Ungood``, otherwise ``"classification"``.

    Raises:
        FileNotFoundError: If ``test/good`` or ``test/Ungood`` has no image.
    """
    rows = []
    has_masks = bool(_images(_find(folder, "test", "Ungood"), *MASK_FOLDERS))
    for split, label in ((split, label) for split, (_, *labels) in _PARTS.items() for label in labels):
        part = _find(folder, _PARTS[split][0], label)
        images = _images(_find(part, "img") or part)
        if split == Split.TEST and part and not images:
            msg = (
                f"No image in {part}, nor in an img folder there (read: {', '.join(sorted(IMAGE_SUFFIXES))}). "
                f"{_contents(part)} Put the images of the test split there."
            )
            raise FileNotFoundError(msg)
        abnormal = label == "Ungood"
        masks = {mask.stem: str(mask) for mask in _images(part, *MASK_FOLDERS)} if has_masks and abnormal else {}
        rows += [(str(image), split.value, label, int(abnormal), masks.get(image.stem, "")) for image in images]
    samples: DataFrame = DataFrame(rows, columns=["image_path", "split", "label", "label_index", "mask_path"])
    samples.attrs["task"] = "segmentation" if has_masks else "classification"
    return samples


class MedicalBMAD(CheckedDataModule, BMAD):
    """BMAD datamodule that reads the published sets, and sets laid out like them, in every layout.

    The arguments are those of :class:`anomalib.data.BMAD`. ``root`` is the folder that holds the sets, or the folder of
    one set; ``category`` is any set name under it. ``val_split_mode="from_dir"`` (default) validates on the set's own
    ``valid`` split, the other modes are those of anomalib.

    A set without a train split (the archives of MVFA) trains on the normal images of ``valid``, the only ones outside
    the test split. With ``"from_dir"`` these are then the normal images of the validation split too.

    Attributes:
        support_pool: Once set up, the rows of the ``valid`` split, from which few-shot supports are taken.

    Example:
        >>> datamodule = MedicalBMAD(root="./datasets/BMAD", category="Retina_RESC", eval_batch_size=8)
        >>> datamodule.class_name
        'retinal OCT'
    """

    @property
    def class_name(self) -> str:
        """What the text prompts call the images of this set."""
        return prompt_name(self.category)

    def prepare_data(self) -> None:
        """Download the six BMAD sets if ``root`` does not exist and ``category`` is one of them."""
        if not self.root.exists() and self.category.lower() in published_class_names():
            super().prepare_data()
        find_set(self.root, self.category)

    def setup(self, stage: str | None = None) -> None:
        """List the images, check those of the stage, and report copies between the parts before training."""
        super().setup(stage)
        if stage != TrainerFn.FITTING:
            return
        taken, of = self.train_data.samples, "training images"
        for name, data in (("validation", getattr(self, "val_data", None)), ("test", self.test_data)):
            if data is not None:
                drop_copies(data.samples, taken, name, of, then="stay, as in the published split")
                taken, of = pd.concat([taken, data.samples]), "training or validation images"

    def _setup(self, _stage: str | None = None) -> None:
        folder = find_set(self.root, self.category)
        samples = read_samples(folder)
        train, valid, test = (samples[samples["split"] == split] for split in (Split.TRAIN, Split.VAL, Split.TEST))
        if train.empty:
            train = valid[valid["label_index"] == LabelName.NORMAL.value]
        if train.empty:
            msg = (
                f"No normal image to train on in {folder}: looked for train/good and valid/good. "
                f"{_contents(folder)} Add one of them."
            )
            raise FileNotFoundError(msg)
        self.support_pool = valid
        self.train_data, self.test_data = read_set(train, folder), read_set(test, folder)
        if self.val_split_mode == ValSplitMode.FROM_DIR:
            if valid.empty:
                msg = (
                    f"No image in valid/good or valid/Ungood of {folder}, read by val_split_mode='from_dir'. "
                    f"{_contents(folder)} Add the split, or pass another val_split_mode, such as 'from_test'."
                )
                raise FileNotFoundError(msg)
            self.val_data = read_set(valid, folder)


def read_set(samples: DataFrame, folder: Path) -> MedicalDataset:
    """Return the data set of some samples of a set, in the order of their paths."""
    return MedicalDataset(samples.sort_values("image_path"), like=ImageRef(folder, root=folder))


def _set_name(folder_name: str) -> str:
    return re.sub("_AD$", "", folder_name, flags=re.IGNORECASE)


def _is_set(folder: Path) -> bool:
    return all(_find(folder, "test", label) for label in _BOTH)


def _subfolders(folder: Path | None) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir()) if folder and folder.is_dir() else []


def _find(folder: Path | None, *names: str) -> Path | None:
    """Folder at ``folder/<names[0]>/<names[1]>/...``, each name in any letter case, or ``None``."""
    for name in names:
        folder = next((entry for entry in _subfolders(folder) if entry.name.lower() == name.lower()), None)
    return folder


def _images(folder: Path | None, *inner: str) -> list[Path]:
    """Images of a folder, or of the first of some inner folders that has any."""
    for name in inner or ("",):
        found = _find(folder, name) if name else folder
        files = found.iterdir() if found else ()
        images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")]
        if images:
            return sorted(images)
    return []


def _contents(folder: Path) -> str:
    """Sentence on what a folder holds, up to 20 entries."""
    if not folder.is_dir():
        return f"{folder} does not exist."
    return f"{folder} holds {enumerate_some(sorted(entry.name for entry in folder.iterdir()), 20) or 'nothing'}."
