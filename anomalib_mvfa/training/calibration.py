# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Calibration of a model: memory bank, ranges of the fusion, thresholds, and whether they still hold."""

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from anomalib.data import AnomalibDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from anomalib_mvfa.model.memory import Support
from anomalib_mvfa.model.torch_model import BranchOutput, MVFAModel, SupportOutput
from anomalib_mvfa.post_processing import MVFAPostProcessor
from anomalib_mvfa.pre_processing import MVFAPreProcessor
from anomalib_mvfa.processes import gather_objects
from anomalib_mvfa.training.state import training_data

if TYPE_CHECKING:
    from anomalib_mvfa.model import MVFA

__all__ = ["Calibration", "branch_extremes", "find_support"]

logger = logging.getLogger(__name__)

UNTRAINED = (
    "The adapters are untrained, so that there is nothing to export. Give --ckpt_path a checkpoint of `anomalib train "
    "--model MVFA`, or --model.adapters trained adapters."
)
EMPTY_BANK = (
    "The memory bank is empty: adapters alone have none. Export a checkpoint (--ckpt_path), or build the bank first "
    "with Engine().validate(model, datamodule=...), or export the language branch alone with --model.memory false."
)
NO_BANK = (
    "The checkpoint has no memory bank that fits: its training ended before it was validated, or an argument given "
    "beside it changes the bank. The data at hand have no normal images to build one from. Test with the data that the "
    "model was trained on (--data FewShot ...), leave the argument out, or use the language branch alone with "
    "--model.memory false."
)
NO_THRESHOLDS = (
    "The thresholds of the checkpoint do not fit: its training ended before it was validated, or an argument given "
    "beside it changes scores or thresholds. The data at hand have no validation part and no supports to set new ones. "
    "Leave the argument out, give data that have, or in Python: model = MVFA.load_from_checkpoint(path, ...), then "
    "Engine().validate(model, datamodule=...), then predict or export with that model."
)


class Calibration:
    """Records whether bank, ranges and thresholds fit the adapters and arguments in force, and computes them anew.

    Each training step invalidates it, a validation renews it, a test or a prediction completes what is missing from the
    data at hand.
    """

    def __init__(self, *, bank_holds: bool = False, thresholds_hold: bool = False) -> None:
        self.bank_holds, self.thresholds_hold = bank_holds, thresholds_hold
        self._data: weakref.ref[Any] | None = None  # the datamodule of the calibration

    def __getstate__(self) -> dict[str, Any]:
        """Leave the datamodule out of a pickled model."""
        return {**vars(self), "_data": None}

    def state(self) -> dict[str, bool]:
        """Return what a checkpoint keeps of it."""
        return {"bank_holds": self.bank_holds, "thresholds_hold": self.thresholds_hold}

    @property
    def holds(self) -> bool:
        """Whether everything fits."""
        return self.bank_holds and self.thresholds_hold

    def drop(self) -> None:
        """Record that nothing fits any more."""
        self.bank_holds = self.thresholds_hold = False

    def check(self, module: "MVFA") -> None:
        """Raise a ``ValueError`` before the export of a model that is not trained or not calibrated."""
        if not module.trained and module.option("adapters") is None:
            raise ValueError(UNTRAINED)
        if module.option("memory") and module.model.memory.is_empty:
            raise ValueError(EMPTY_BANK)
        if module.trained and not self.holds:
            raise ValueError(NO_THRESHOLDS if self.bank_holds else NO_BANK)

    def begin(self, module: "MVFA") -> None:
        """Build bank and ranges, and provide the supports for the thresholds, before a validation."""
        output = self._remember(module)
        if module.option("fusion_scale") == "test":
            _scale_by(module, module.trainer.val_dataloaders)
        _offer(module, output)

    def end(self, module: "MVFA") -> None:
        """Record that thresholds were set by a validation."""
        datamodule = getattr(module.trainer, "datamodule", None)
        self.thresholds_hold = True
        self._data = None if datamodule is None else weakref.ref(datamodule)

    def complete(self, module: "MVFA") -> None:
        """Compute what is missing before a test or a prediction, and in a training that is not validated.

        Raises:
            ValueError: If a trained model lacks a bank or thresholds, and the data at hand cannot replace them.
        """
        trainer = module.trainer
        if not module.trained and getattr(trainer, "datamodule", None) is not (self._data and self._data()):
            self.drop()  # given adapters are calibrated for the present data
        transductive = module.option("fusion_scale") == "test" and trainer.testing
        if self.holds and not transductive:
            return
        output = self._remember(module)
        if module.trained and not self.bank_holds:
            raise ValueError(NO_BANK)
        if transductive:
            logger.warning("fusion_scale='test': the ranges of both branches are taken from the whole test set.")
            _scale_by(module, trainer.test_dataloaders)
        loader = None if module.fit_state is not None else _validation_loader(module)
        if loader is not None or output is not None:
            _set_thresholds(module, loader, output)
        elif module.trained and module.fit_state is None and not self.thresholds_hold:
            raise ValueError(NO_THRESHOLDS)
        self.end(module)

    def _remember(self, module: "MVFA") -> SupportOutput | None:
        """Build bank and ranges, if that is due, from the supports of the data at hand, if there are any."""
        if module.fit_state is None and module.trained and self.bank_holds:
            return None
        if not module.option("memory"):
            self.bank_holds = True
            return None
        datamodule, data = getattr(module.trainer, "datamodule", None), training_data(module.trainer)
        support = find_support(datamodule, data, module.option("max_support"), module.pre_processed)
        # A training without normal images has no bank; what is evaluated must have the one that it was trained with.
        self.bank_holds = support is not None or module.fit_state is not None
        return None if support is None else module.model.remember(support)


def _offer(module: "MVFA", output: SupportOutput | None) -> None:
    """Pass the supports to the post-processor, in case the validation part has no normal images."""
    if output is not None and isinstance(module.post_processor, MVFAPostProcessor):
        module.post_processor.set_support(module.model.fuse(output.language, output.memory), output.labels)


def _validation_loader(module: "MVFA") -> Any:
    datamodule = getattr(module.trainer, "datamodule", None)
    if isinstance(datamodule, AnomalibDataModule) and len(getattr(datamodule, "val_data", None) or ()):
        return datamodule.val_dataloader()
    return None


@torch.no_grad()
def _set_thresholds(module: "MVFA", loader: Any, output: SupportOutput | None) -> None:
    """Set thresholds as a validation would; the processes share the batches."""
    trainer, post_processor = module.trainer, module.post_processor
    if not isinstance(post_processor, MVFAPostProcessor):
        return
    post_processor.on_validation_start(trainer, module)
    _offer(module, output)
    for number, batch in enumerate(loader or ()):
        if number % trainer.world_size != trainer.global_rank:
            continue
        moved = trainer.strategy.batch_to_device(batch)
        if isinstance(module.pre_processor, MVFAPreProcessor):
            module.pre_processor.on_validation_batch_start(trainer, module, moved, number)
        with trainer.precision_plugin.val_step_context():
            predictions = module.validation_step(moved)
        post_processor.on_validation_batch_end(trainer, module, predictions)
    post_processor.on_validation_epoch_end(trainer, module)


def _scale_by(module: "MVFA", loaders: Any) -> None:
    outputs = branch_extremes(module.model, loaders, module.pre_processed, module.device)
    if outputs:
        module.model.set_fusion_range(outputs)


def find_support(
    datamodule: object, train_data: Any, max_support: int, pre_process: Callable[[Tensor], Tensor]
) -> Support | None:
    """Return the attribute ``support`` of a datamodule, or a sample of its normal training images if there are any.

    At most ``max_support`` are taken, evenly over them, and ``pre_process`` resizes them to the size of the model.
    """
    if hasattr(datamodule, "support"):
        support: Support | None = datamodule.support
        return support
    samples = getattr(train_data, "samples", None)
    if samples is None:
        logger.warning("The training data have no samples to remember: the memory branch is off.")
        return None
    normal = [position for position, label in enumerate(samples.label_index) if label == 0]
    if not normal:
        return None
    count = min(len(normal), max_support)
    chosen = [normal[position * len(normal) // count] for position in range(count)]
    images = torch.stack([pre_process(train_data[position].image) for position in chosen])
    return Support(images.unsqueeze(0), images[:0])


@torch.no_grad()
def branch_extremes(
    model: MVFAModel,
    loaders: DataLoader[Any] | Sequence[DataLoader[Any]] | None,
    pre_process: Callable[[Tensor], Tensor],
    device: torch.device,
) -> list[tuple[BranchOutput, BranchOutput]]:
    """Compute the least and the largest values of both branches over all images of a set, in all processes.

    Returns:
        Language and memory branch of each batch, least and largest value in each field; nothing with an empty bank.
    """
    extremes: list[tuple[BranchOutput, BranchOutput]] = []
    for loader in [loaders] if isinstance(loaders, DataLoader) else loaders or []:
        for batch in loader:
            language, memory = model.branches(pre_process(batch.image).to(device))
            if memory is None:
                return []
            extremes.append((_extremes(language), _extremes(memory)))
    return [pair for part in gather_objects(extremes) for pair in part]


def _extremes(output: BranchOutput) -> BranchOutput:
    return BranchOutput(*(torch.stack([values.min(), values.max()]).cpu() for values in output))
