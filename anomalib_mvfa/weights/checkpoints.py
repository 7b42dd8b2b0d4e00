# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Checkpoints that survive interruptions, and clear errors for those that cannot be read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from anomalib.engine.plugins import AnomalibCheckpointIO
from anomalib.utils.serialization import anomalib_safe_globals
from lightning.pytorch import Trainer
from torch import Tensor, nn

from anomalib_mvfa.files import replacing

__all__ = ["AtomicCheckpointIO", "check_state", "checkpoint_folder", "read_checkpoint"]


def checkpoint_folder(trainer: Trainer) -> Path:
    """Give the folder of a run's checkpoints."""
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    return Path(folder or Path(trainer.default_root_dir) / "weights" / "lightning")


class AtomicCheckpointIO(AnomalibCheckpointIO):
    """anomalib's way to read and write checkpoints, with files that are complete under their own name.

    Lightning writes to the system's temporary folder and copies from there, which an interruption can cut short.
    """

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | Path,
        storage_options: Any | None = None,  # noqa: ANN401 - Lightning's signature
    ) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: Contents.
            path: File, or the address of an object store, which Lightning writes to itself.
            storage_options: Not used, as in Lightning.

        Raises:
            OSError: If it cannot be written. What was there before is left.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(path) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = None,  # noqa: ANN401 - Lightning's signature
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Read a checkpoint without executing code from it.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it cannot be read.
        """
        if weights_only is False or "://" in str(path):  # Lightning hands None on for what was not given
            contents: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only is not False)
            return contents
        with _readable(path), anomalib_safe_globals(extra=self.extra_safe_globals):
            return _as_checkpoint(torch.load(path, map_location=map_location or "cpu", weights_only=True))


@contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    """Turn what torch raises on damaged files into one error."""
    if not Path(path).is_file():
        msg = f"No checkpoint at {path}. Give the path of a .ckpt that `anomalib train --model MVFA` has written."
        raise FileNotFoundError(msg)
    try:
        yield
    except Exception as error:
        msg = (
            f"{path} could not be read as a checkpoint ({type(error).__name__}). It may be damaged, or hold Python "
            "objects, which are not loaded. Give a .ckpt that `anomalib train --model MVFA` has written."
        )
        raise ValueError(msg) from error


def _as_checkpoint(contents: Any) -> dict[str, Any]:  # noqa: ANN401 - whatever a file holds
    parts = ("state_dict", "hyper_parameters")
    if not isinstance(contents, dict) or not all(isinstance(contents.get(part), dict) for part in parts):
        msg = f"no {' and '.join(parts)} in it"
        raise TypeError(msg)
    return contents


def read_checkpoint(path: str | Path, safe_globals: Any) -> dict[str, Any]:  # noqa: ANN401 - anomalib's own type
    """Read a checkpoint without executing code from it; its tensors are read when they are used.

    Args:
        path: The file.
        safe_globals: Types that it may hold.

    Returns:
        Its contents.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read.
    """
    with _readable(path), anomalib_safe_globals(extra=safe_globals):
        return _as_checkpoint(torch.load(path, map_location="cpu", weights_only=True, mmap=True))


def check_state(state: dict[str, Any], model: nn.Module, skipped: tuple[str, ...], free: tuple[str, ...]) -> None:
    """Check that the tensors of a checkpoint are those of a model.

    Args:
        state: Tensors by name.
        model: The model.
        skipped: Beginnings of names that a checkpoint leaves out.
        free: Parts of names of tensors whose shape differs from one training to the next.

    Raises:
        ValueError: If tensors are missing, unknown, or of another shape.
    """
    expected = {name: value for name, value in model.state_dict().items() if not name.startswith(skipped)}
    wrong = []
    for name in sorted(expected.keys() | state.keys()):
        value = state.get(name)
        if name not in expected or not isinstance(value, Tensor):
            fits = False
        else:
            fits = value.shape == expected[name].shape or any(part in name for part in free)
        wrong += [] if fits else [name]
    if wrong:
        msg = (
            f"The checkpoint does not fit this model: {len(wrong)} of its tensors are missing, unknown or of another "
            f"shape, such as '{str(wrong[0])[:80]}'. It may be damaged or of another version; train again."
        )
        raise ValueError(msg)
