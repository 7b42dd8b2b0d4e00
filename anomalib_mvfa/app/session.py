# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""What one person does on the page: supports, trainings, images looked at. Its files go when it is closed."""

import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from anomalib_mvfa.data.readers import ImageRef, UnreadableImageError, read_mask
from anomalib_mvfa.data.splits import pixel_digest
from anomalib_mvfa.demo.phantoms import write_phantoms
from anomalib_mvfa.deploy.live import Options, Progress, Trained, fit

from .intake import Note, Source, list_sources, read_source, save_pixels, unpack

__all__ = ["EXAMPLES", "Picture", "Session"]

SUPPORT_SLICES, LOOK_SLICES = 8, 128  # of a volume, that become supports, or are looked at
SHOTS, LOOKED_AT, EXAMPLE_SIZE = 4, 3, 224
EXAMPLES = {"brain_mri": "brain MRI", "breast_ultrasound": "breast ultrasound", "chest_xray": "chest X-ray"}

Reading = Iterator[tuple[float, list[Note]]]


@dataclass(eq=False)
class Picture:
    """A support, or an image that is looked at.

    ``file`` is its PNG of 8 bits under a number, and so is the ``mask`` of an abnormal support. ``score`` and ``map``
    ``(h, w)`` are in [0, 1], 0.5 is the threshold of the model ``by`` which they are.
    """

    source: Source
    file: Path
    digest: str | None  # of its pixels as stored
    abnormal: bool = False
    mask: Path | None = None
    by: Trained | None = None
    score: float = 0.0
    map: NDArray[np.float32] = field(default_factory=lambda: np.zeros((1, 1), np.float32))


class Session:
    """State of one open page, with files in a folder of its own below ``root``."""

    def __init__(self, root: Path) -> None:
        self.folder = root / f"session-{secrets.token_hex(16)}"
        self.folder.mkdir(parents=True)
        self.rule = "auto"
        self.supports: list[Picture] = []
        self.studies: dict[str, list[Picture]] = {}  # images that are looked at, by volume or series
        self.trained: Trained | None = None
        self.before: tuple[Trained, dict[str, float]] | None = None  # the model before, and the scores of the studies
        self.support: Any = None  # the support, study and slice that are chosen on the page
        self.study: Any = None
        self.slice = 0
        self._count = 0
        self.stopping = threading.Event()

    def close(self) -> None:
        """Stop a training and delete all files."""
        self.stopping.set()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _new(self, kind: str) -> Path:
        self._count += 1
        return self.folder / kind / f"{self._count:03d}"

    @property
    def views(self) -> list[Picture]:
        """All images that are looked at."""
        return [view for study in self.studies.values() for view in study]

    def set_rule(self, rule: str) -> None:
        """Show all images by another intensity rule; an UnreadableImageError leaves everything as it was."""
        again = [(one, one.source._replace(rule=rule)) for one in (*self.supports, *self.views)]
        read = [read_source(source) for _, source in again]
        for (one, source), image in zip(again, read, strict=True):
            one.source = source
            save_pixels(image, one.file)
        self.rule = rule

    def _read(self, uploads: Sequence[str | Path], slices: int, work: Callable[[Source], list[Note]]) -> Reading:
        """Do something with each uploaded image, and yield the part that is done with notes on files left out."""
        folder = self._new("uploads")
        notes = unpack(uploads, folder)
        sources, left_out = list_sources(folder, slices, self.rule)
        notes += left_out
        for number, source in enumerate(sources):
            yield number / len(sources), notes
            try:
                notes += work(source)
            except UnreadableImageError as error:
                reason = error.reason.replace("raise max_pixels to read it", "crop or resample it")
                notes.append(Note(source.name, f"cannot be used: {reason}."))
        yield 1.0, notes

    # Supports

    def add_supports(self, uploads: Sequence[str | Path], *, abnormal: bool) -> Reading:
        """Add uploaded images to the supports."""
        return self._read(uploads, SUPPORT_SLICES, partial(self._add, abnormal=abnormal))

    def _add(self, source: Source, *, abnormal: bool, mask: Tensor | None = None) -> list[Note]:
        image = read_source(source)
        key = pixel_digest(source.ref)
        for other in self.supports:
            if other.digest == key:
                kind = "abnormal" if other.abnormal else "normal"
                return [Note(source.name, f"is the same image as the {kind} {other.source.name}: it was left out.")]
        support = Picture(source, save_pixels(image, self._new("supports").with_suffix(".png")), key, abnormal)
        self.supports.append(support)
        return [] if mask is None else self.set_mask(support, mask)

    def set_mask(self, support: Picture, mask: Tensor, name: str = "") -> list[Note]:
        """Set the mask ``(H, W)`` of an abnormal support, unless it is empty or of another size."""
        with Image.open(support.file) as image:
            width, height = image.size
        if not bool(mask.any()):
            return [
                Note(name or support.source.name, "has an empty mask: paint what is abnormal, or remove the image.")
            ]
        if mask.shape != (height, width):
            text = f"is {mask.shape[1]} x {mask.shape[0]} pixels, its image {width} x {height}: save it at that size."
            return [Note(name or support.source.name, text)]
        file = support.file.with_name(f"{support.file.stem}_mask_{self._new('').name}.png")
        support.mask = save_pixels(mask, file)
        return []

    def add_masks(self, uploads: Sequence[str | Path]) -> Reading:
        """Add uploaded masks to the abnormal supports of the same names."""
        folder = self._new("uploads")
        notes = unpack(uploads, folder)
        for file in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
            stem = ImageRef(file).name.removesuffix("_mask")
            own = [one for one in self.supports if one.abnormal and ImageRef(one.source.ref.path).name == stem]
            if not own:
                text = f"belongs to no abnormal image: add the image {stem} first, or name the mask as its image."
                notes.append(Note(file.name, text))
            try:
                for one in own:
                    mask = read_mask(replace(one.source.ref, path=file))
                    if one.source.ref.frame is not None and not bool(mask.any()):
                        self.supports.remove(one)  # a slice beside the finding
                    else:
                        notes += self.set_mask(one, mask, file.name)
            except ValueError as error:
                reason = getattr(error, "reason", "it has fewer slices than its image")
                notes.append(Note(file.name, f"cannot be used: {reason}."))
        yield 1.0, notes

    def add_examples(self, modality: str) -> None:
        """Add generated supports with masks, and generated images of both classes to look at."""
        counts = {"train": 0, "valid": SHOTS, "test": LOOKED_AT}
        root = write_phantoms(self._new("uploads"), [modality], counts, EXAMPLE_SIZE)
        for path in sorted(root.glob("*/*/*/img/*.png")):
            part, label = path.parts[-4:-2]
            number = int(path.stem) + 1 + SHOTS * (part == "test")
            name = f"{modality}_{'normal' if label == 'good' else 'abnormal'}_{number}.png"
            image = path.rename(path.with_name(name))
            source = Source(name, str(image), ImageRef(image), self.rule)
            if part == "test":
                self._look_at(source)
                continue
            mask = None if label == "good" else read_mask(path.parents[1] / "label" / path.name)
            self._add(source, abnormal=mask is not None, mask=mask)

    # Training

    def used_supports(self, options: Options) -> list[Picture]:
        """Return the supports of a training, which is on masks, or on labels where no abnormal support has a mask."""
        normal = [one for one in self.supports if not one.abnormal]
        abnormal = [one for one in self.supports if one.abnormal and options.abnormal]
        return [*normal, *([one for one in abnormal if one.mask] or abnormal)]

    def train(self, options: Options) -> Iterator[Progress]:
        """Train a model, and look at all images again; stopped, it leaves the model before it in place."""
        used = self.used_supports(options)
        count = sum(not one.abnormal for one in used)
        if count < 2:
            msg = f"Training needs at least two normal images, and there are {count}: add some in step 1."
            raise ValueError(msg)
        self.stopping = threading.Event()
        folder = self._new("trainings")
        images = folder / "supports"  # copies, since a support may be removed or read by another rule meanwhile
        images.mkdir(parents=True)
        for file in {file for one in used for file in (one.file, one.mask) if file}:
            shutil.copy(file, images)
        for step in fit(options, images, _write_lists(used, folder), folder, self.stopping):
            if isinstance(step, Progress):
                yield step
                continue
            self.before = (self.trained, self.scores()) if self.trained else None
            self.trained = step
        while stale := [view for view in self.views if view.by is not self.trained]:
            yield Progress("Looking at the images again", 1 - len(stale) / len(self.views))
            self._predict(stale[0])

    # Images that are looked at

    def look(self, uploads: Sequence[str | Path]) -> Reading:
        """Add uploaded images to those that are looked at."""
        return self._read(uploads, LOOK_SLICES, self._look_at)

    def _look_at(self, source: Source) -> list[Note]:
        image = read_source(source)
        key = pixel_digest(source.ref)
        if any(view.digest == key for view in self.views):
            return [Note(source.name, "is here already.")]
        view = Picture(source, save_pixels(image, self._new("looked-at").with_suffix(".png")), key)
        self._predict(view)
        self.studies.setdefault(source.study, []).append(view)
        is_support = any(support.digest == key for support in self.supports)
        return [Note(source.name, "is a support, too: its score says nothing about new images.")] if is_support else []

    def _predict(self, view: Picture) -> None:
        view.by = self.trained
        if view.by is not None:
            view.score, view.map = view.by.predict(self.as_trained(view))

    def as_trained(self, view: Picture) -> Tensor:
        """Read an image ``(3, H, W)`` in [0, 1] by the intensity rule of the model, not the one that it is shown by."""
        rule = view.source.rule if self.trained is None else self.trained.options.intensity
        return read_source(view.source._replace(rule=rule))

    def scores(self) -> dict[str, float]:
        """Return the highest score of each image, volume or series, by the name of its file."""
        return {views[0].source.ref.path.name: max(one.score for one in views) for views in self.studies.values()}

    def correct(self, view: Picture, *, abnormal: bool, mask: Tensor | None = None) -> list[Note]:
        """Make an image that is looked at a support, or change the label of the support that it is."""
        if mask is not None and not bool(mask.any()):
            return [Note(view.source.name, "has nothing painted on it: paint what is abnormal first.")]
        known = next((support for support in self.supports if support.digest == view.digest), None)
        if known is None:
            notes = self._add(view.source, abnormal=abnormal, mask=mask)
        else:
            known.abnormal, known.mask = abnormal, None
            notes = [] if mask is None else self.set_mask(known, mask)
        kind = "an abnormal" if abnormal else "a normal"
        return notes or [Note(view.source.name, f"is {kind} support now. Train again to see what changes.")]


def _write_lists(supports: Sequence[Picture], folder: Path) -> tuple[Path, Path]:
    """Write the lists that the datamodules read: a table with labels and masks, and the names of the supports."""
    names = {key: " ".join(one.file.name for one in supports if one.abnormal == (key == "a")) for key in "na"}
    (folder / "supports.txt").write_text("".join(f"{key}-0: {names[key]}\n" for key in names), encoding="utf-8")
    rows = [(one.file.name, int(one.abnormal), one.mask.name if one.mask else "", "train") for one in supports]
    pd.DataFrame(rows, columns=["path", "label", "mask", "split"]).to_csv(folder / "supports.csv", index=False)
    return folder / "supports.csv", folder / "supports.txt"
