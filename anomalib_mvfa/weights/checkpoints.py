# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Checkpoints: written as a whole, read without executing code, completed with the state of a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile, ZipFile

import torch
from anomalib.engine.plugins import AnomalibCheckpointIO
from anomalib.utils.serialization import anomalib_safe_globals
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from anomalib_mvfa.files import replacing

if TYPE_CHECKING:
    from anomalib_mvfa.model import MVFA

__all__ = [
    "AtomicCheckpointIO",
    "checkpoint_facts",
    "checkpoint_folder",
    "is_fitting",
    "keep_trained_state",
    "read_checkpoint",
    "restore_state",
    "save_state",
    "write_whole_checkpoints",
]

CHECKPOINT_KEY = "mvfa"
FORMAT = 2
"""Of checkpoints; those of version 0.1 have none."""
TOWER = "model.tower."
BANKS = ("model.seg_memory.", "model.det_memory.")


def checkpoint_folder(trainer: Trainer) -> Path:
    """Return the folder of a run's checkpoints."""
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    return Path(folder or Path(trainer.default_root_dir) / "weights" / "lightning")


class AtomicCheckpointIO(AnomalibCheckpointIO):
    """anomalib's input and output of checkpoints, with files that are complete under their own name.

    Lightning writes to the system's temporary folder and copies from there, which an interruption can truncate.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint to a file; Lightning writes to addresses of object stores."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(path) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint as :func:`read_checkpoint` does, without executing code from it."""
        if weights_only is False or "://" in str(path):  # Lightning passes None where nothing was given
            contents: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only is not False)
            return contents
        return read_checkpoint(path, self.extra_safe_globals, map_location=map_location or "cpu")


def write_whole_checkpoints(trainer: Trainer) -> None:
    """Replace anomalib's input and output of checkpoints, unless a user has chosen another."""
    checkpoint_io = trainer.strategy.checkpoint_io
    if type(checkpoint_io) is AnomalibCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO(checkpoint_io.extra_safe_globals)


def read_checkpoint(path: str | Path, safe_globals: Any, **options: Any) -> dict[str, Any]:
    """Read a checkpoint of tensors, plain data and ``safe_globals``, without executing code from it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read.
    """
    if not Path(path).is_file():
        msg = f"No checkpoint at {path}. Give the path of a .ckpt that `anomalib train --model MVFA` has written."
        raise FileNotFoundError(msg)
    try:
        with anomalib_safe_globals(extra=safe_globals):
            return _load(path, **{"map_location": "cpu", **options})
    except Exception as error:
        msg = (
            f"{path} could not be read as a checkpoint ({type(error).__name__}). It may be damaged, or hold Python "
            "objects, which are not loaded. Give a .ckpt that `anomalib train --model MVFA` has written."
        )
        raise ValueError(msg) from error


def _load(path: str | Path, **options: Any) -> dict[str, Any]:
    with ZipFile(path) as archive:
        if archive.testzip():  # torch does not compare checksums
            raise BadZipFile
    contents: dict[str, Any] = torch.load(path, weights_only=True, **options)
    if not all(isinstance(contents[part], dict) for part in ("state_dict", "hyper_parameters")):
        raise TypeError
    return contents


def checkpoint_facts(checkpoint: dict[str, Any], path: str | Path = "This checkpoint") -> dict[str, Any]:
    """Return the facts in a checkpoint of MVFA.

    Raises:
        ValueError: If it is not one of MVFA, or of a version that is not read any more.
    """
    facts = checkpoint.get(CHECKPOINT_KEY)
    if not isinstance(facts, dict) or "fingerprint" not in facts:
        msg = f"{path} was not made by MVFA. Give one that `anomalib train --model MVFA` has written."
        raise ValueError(msg)
    if facts.get("format") != FORMAT:
        msg = f"{path} was made by another version of anomalib-mvfa (0.1 or later than this one). Train again."
        raise ValueError(msg)
    return facts


def _check_tensors(state: dict[str, Any], model: nn.Module) -> None:
    """Check that the tensors of a checkpoint are those of a model, but for the length of the bank."""
    expected = {name: value.shape for name, value in model.state_dict().items() if not name.startswith(TOWER)}
    found = {name: value.shape for name, value in state.items() if isinstance(value, Tensor)}
    wrong = sorted(expected.keys() ^ state.keys() | expected.keys() - found.keys())
    wrong += [
        name for name in expected.keys() & found.keys() if expected[name] != found[name] and not name.startswith(BANKS)
    ]
    if wrong:
        msg = (
            f"The checkpoint does not fit this model: {len(wrong)} of its tensors are missing, unknown or of another "
            f"shape, such as '{str(wrong[0])[:80]}'. It may be damaged or of another version; train again."
        )
        raise ValueError(msg)


def is_fitting(module: "MVFA") -> bool:
    """Return whether a trainer is training the model."""
    return module._trainer is not None and module.trainer.state.fn == TrainerFn.FITTING


def keep_trained_state(module: "MVFA", checkpoint: dict[str, Any]) -> bool:
    """Return whether a training was resumed from this checkpoint; its contents then become those of the trained model.

    ``anomalib train --ckpt_path`` loads the same file once more for the test that follows the training.
    """
    testing = module._trainer is not None and module.trainer.state.fn == TrainerFn.TESTING
    if not testing or module.resumed_from is None or module.trainer.ckpt_path != module.resumed_from:
        return False
    checkpoint.update(state_dict=module.state_dict(), callbacks={})
    return True


def save_state(module: "MVFA", checkpoint: dict[str, Any]) -> None:
    """Complete a checkpoint of Lightning's in place: without the frozen backbone, with the bank in half precision."""
    state = checkpoint["state_dict"]
    for name in list(state):
        if name.startswith(TOWER):
            del state[name]
        elif name.startswith(BANKS):
            state[name] = state[name].half()
    arguments = {**module.arguments, "adapters": None}  # the checkpoint holds them
    # Lightning writes the arguments of `load_from_checkpoint` over its own copy before they can be compared.
    checkpoint["hyper_parameters"] = dict(arguments)
    own = {"format": FORMAT, "arguments": arguments, "calibration": module.calibration.state()}
    checkpoint[CHECKPOINT_KEY] = {**module.facts(), **own}


def restore_state(module: "MVFA", checkpoint: dict[str, Any]) -> None:
    """Restore what a checkpoint holds beside its tensors, and add the tensors of the backbone to it in place.

    Raises:
        ValueError: If it was made with other weights of the backbone, or its tensors are not those of the model.
    """
    facts, network = checkpoint_facts(checkpoint), module.model
    if network.fingerprint != facts["fingerprint"]:
        msg = (
            f"The checkpoint was made with other weights of backbone '{module.option('backbone')}' than those at hand "
            f"(pretrained={module.option('pretrained')!r}). Name the right ones with --model.pretrained."
        )
        raise ValueError(msg)
    _check_tensors(checkpoint["state_dict"], module)
    module.trained = True
    module.resumed_from = module.trainer.ckpt_path if is_fitting(module) else None
    module.intensity = facts["intensity"]
    module.history = {name: facts[name] for name in module.history}
    network.has_masks = facts["has_masks"]
    network.set_class_name(facts["class_name"], encode=False)
    tower = {TOWER + name: value for name, value in network.tower.state_dict().items()}
    checkpoint["state_dict"].update(tower)
