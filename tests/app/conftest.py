# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Generated images for the page, and a session with a model that was trained once."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_mvfa.app.session import Session
from anomalib_mvfa.demo.phantoms import draw_phantom
from anomalib_mvfa.deploy.live import Options

SIZE = 112


def save_phantom(path: Path, seed: int, *, abnormal: bool = False) -> np.ndarray:
    """Save a generated image, and return its mask."""
    phantom = draw_phantom("brain_mri", SIZE, "bright" if abnormal else None, np.random.default_rng(seed), 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(phantom.image).save(path)
    return phantom.mask


def save_mask(path: Path, mask: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    return path


def fill(session: Session, folder: Path, shots: int = 2) -> None:
    """Add normal supports, and abnormal ones with masks."""
    normal, abnormal, masks = [], [], []
    for number in range(shots):
        normal.append(folder / f"normal_{number}.png")
        save_phantom(normal[-1], number)
        abnormal.append(folder / f"abnormal_{number}.png")
        mask = save_phantom(abnormal[-1], 100 + number, abnormal=True)
        masks.append(save_mask(folder / "masks" / abnormal[-1].name, mask))
    added = [session.add_supports(paths, abnormal=kind) for kind, paths in ((False, normal), (True, abnormal))]
    for reading in (*added, session.add_masks(masks)):
        assert notes(reading) == []


def notes(reading: Iterator) -> list:
    """Return the notes at the end of a reading."""
    *_, (done, found) = reading
    assert done == 1.0
    return found


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    session = Session(tmp_path / "root")
    yield session
    session.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """A session with two supports of each class and a model; tests must leave its supports as they are."""
    folder = tmp_path_factory.mktemp("trained")
    session = Session(folder / "root")
    fill(session, folder)
    session.texts = [progress.text for progress in session.train(Options(epochs=1, class_name="brain"))]
    yield session
    session.close()
