# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""MVFA as an anomalib model: training, calibration, checkpoints.

The adapters learn from labelled supports (:class:`~anomalib_mvfa.data.FewShot`), or from normal images with synthetic
lesions when a datamodule has no abnormal training images. The memory bank and the ranges of the fusion are made from
the supports before each validation; nothing of the test set is used unless ``fusion_scale="test"`` asks for it.

Paper:
    Adapting Visual-Language Models for Generalizable Anomaly Detection in Medical Images (CVPR 2024),
    https://arxiv.org/abs/2403.12570
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from anomalib_mvfa.backbones.loading import resolve_backbone
from anomalib_mvfa.callbacks import surrounding_callbacks
from anomalib_mvfa.callbacks.loading import prepare_processes
from anomalib_mvfa.deploy.export import ExportMixin
from anomalib_mvfa.metrics import MVFAEvaluator
from anomalib_mvfa.post_processing import MVFAPostProcessor
from anomalib_mvfa.pre_processing import MVFAPreProcessor
from anomalib_mvfa.training.calibration import Calibration
from anomalib_mvfa.training.state import FitState, begin_training, prepare_evaluation, set_default_epochs
from anomalib_mvfa.visualization import MVFAVisualizer
from anomalib_mvfa.weights import checkpoints
from anomalib_mvfa.weights.adapter_files import check_facts, evaluation_facts, load_adapters, model_facts
from anomalib_mvfa.weights.arguments import CHOICES, DEFAULTS, NETWORK, settle

from .loss import training_losses
from .torch_model import MVFAModel
from .variant import Variant

__all__ = ["MVFA"]

ADAM_BETAS = (0.5, 0.999)


class MVFA(ExportMixin, AnomalibModule):  # type: ignore[misc]  # to_onnx, as in anomalib
    """Multi-level adapted CLIP for anomaly detection in medical images.

    An argument of ``None`` is not given: it takes the value of the checkpoint that is loaded, or its default. Beside a
    checkpoint an argument that its weights fix is refused where it differs, one that concerns evaluation is honoured.

    Args:
        backbone: Vision transformer of open_clip, ``hf-hub:owner/name``, a JSON configuration, or ``"tiny"``, the small
            demonstration model inside this package. Defaults to ``"ViT-L-14-336"``.
        pretrained: Tag, local file or ``"random"``. Defaults to the backbone's own, or ``"openai"``.
        image_size: Input size in pixels. Defaults to 240 for ``ViT-L-14-336``, otherwise to the backbone's own.
        levels: One-based blocks to read, or ``"half"`` or ``"middle"`` of the default ones at half the cost:
            :func:`~anomalib_mvfa.model.tower.resolve_levels`. Defaults to the ends of the quarters.
        class_name: What the images show, for the prompts. Defaults to the name that the datamodule has, the published
            one for the sets of BMAD, or ``"object"``.
        adapters: Trained adapters: a file (``.pth`` in the released format, or ``.safetensors``), or
            ``hf-hub:owner/name``. The model then is not trained any more.
        memory: Whether to use the memory branch; without it the model is zero-shot. Defaults to ``True``.
        max_support: Normal training images in the bank, for datamodules without supports. Defaults to ``32``.
        learning_rate: Step size of Adam. Published: 1e-3 in few-shot, 1e-4 in zero-shot. Defaults to ``1e-3``.
        selection: ``"last"`` keeps the last epoch; ``"best"`` the one with the greatest image AUROC (plus pixel AUROC
            where there are masks) on the datamodule's validation part. The published protocol is ``"best"`` with a
            validation part that is the test part. Defaults to ``"last"``.
        fusion_scale: ``"support"`` takes the ranges of the two branches from the supports; ``"test"`` from the whole
            evaluated set, as in the published protocol. Defaults to ``"support"``.
        language_weight: Share of the language branch in the fusion. Defaults to ``0.5``.
        coreset: Share of the memory bank that is kept, in (0, 1]: the entries that cover the others best. A smaller
            bank is searched faster. Defaults to ``1.0``.
        threshold: ``"f1"`` sets the thresholds of images and pixels from labelled validation images, ``"fpr"`` from
            normal images alone: those of the validation part, or the supports. Where abnormal validation images lack,
            ``"fpr"`` is used. Defaults to ``"f1"``.
        target_fpr: For ``"fpr"``: share of normal images, and of their pixels, that may be called abnormal. With n
            normal images no less than 1 / (n + 1) can be promised. Defaults to ``0.01``.
        variant: ``"released"``, ``"paper"``, or single choices: :class:`~anomalib_mvfa.model.variant.Variant`.
            Defaults to ``"released"``.
        pre_processor: Pre-processor, or whether to use the default.
        post_processor: Post-processor, or whether to use the default.
        evaluator: Evaluator, or whether to use the default.
        visualizer: Visualizer, or whether to use the default.

    Raises:
        ValueError: If backbone, sizes or choices are unknown or do not fit.

    Example:
        >>> model = MVFA(backbone="tiny")
        >>> model.learning_type
        <LearningType.ONE_CLASS: 'one_class'>
    """

    model: MVFAModel

    def __init__(
        self,
        backbone: str | None = None,
        pretrained: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        levels: Sequence[int] | str | None = None,
        class_name: str | None = None,
        adapters: str | Path | None = None,
        memory: bool | None = None,
        max_support: int | None = None,
        learning_rate: float | None = None,
        selection: str | None = None,
        fusion_scale: str | None = None,
        language_weight: float | None = None,
        coreset: float | None = None,
        threshold: str | None = None,
        target_fpr: float | None = None,
        variant: Variant | str | None = None,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        size = resolve_backbone(backbone or DEFAULTS["backbone"], pretrained, image_size).image_size
        super().__init__(
            pre_processor=self.configure_pre_processor(size) if pre_processor is True else pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        for name, choices in CHOICES.items():
            if self.option(name) not in choices:
                msg = f"{name} must be one of {', '.join(choices)}, got '{self.option(name)}'."
                raise ValueError(msg)
        Variant.of(variant)  # refuses unknown choices before anything is loaded
        self.explicit = {name for name, value in self.hparams.items() if value is not None}
        self._built: list[Any] = []  # arguments of the network
        self._untouched = False  # whether the network was built by hand and no trainer has run it
        self.trained = False  # in this object, or as a checkpoint holds it
        self.resumed_from: str | Path | None = None
        self.adapter_facts: dict[str, Any] = {}
        self.calibration = Calibration()
        self.fit_state: FitState | None = None
        self.intensity: str | None = None  # rule by which the training images were read, where the datamodule has one
        self.history: dict[str, Any] = {"training": {}, "figures": {}}

    def option(self, name: str) -> Any:
        """Return an argument as given, as the loaded checkpoint holds it, or its default."""
        value = self.hparams[name]
        return DEFAULTS.get(name) if value is None else value

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments in force, in what JSON can hold but for paths."""
        found = {name: self.option(name) for name in self.hparams}
        if "model" in self._modules:
            sizes = {"image_size": list(self.model.image_size), "levels": list(self.model.levels)}
            found |= {**sizes, "variant": self.model.variant.plain()}
        return found

    def configure_model(self) -> None:
        """Build the network for training, or from given adapters, unless it is there.

        A fit starts with new adapters, unless the network was built by hand and is trained for the first time, or the
        fit goes on from a checkpoint. Validation, testing and prediction may still be given a checkpoint, which has the
        name of the backbone: they build when they start.

        Raises:
            FileNotFoundError: If the backbone's weights are not there.
            ValueError: If adapters do not fit.
        """
        if self._trainer is None:
            self.ensure_model()
            self._untouched = True
            return
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self.hparams.update(self.hparams_initial)
        used = "model" in self._modules and not self._untouched
        self._untouched = False
        # Adapters files hold the intensity rule of their images, which is checked when data are loaded.
        if (fitting or self.option("adapters")) and not self.ensure_model() and fitting and used:
            self.model.reset()

    def ensure_model(self) -> bool:
        """Build the network that the arguments describe, unless it is there; return whether it was built."""
        build = "model" not in self._modules or self._built != [self.option(name) for name in NETWORK]
        if build:
            self._build()
            if self._trainer is not None:
                self.trainer.precision_plugin.convert_module(self.model)
                self.model.to(self.device)
        self.model.use_memory = self.option("memory")
        self.model.fusion.language_weight = self.option("language_weight")
        self.model.seg_memory.coreset = self.model.det_memory.coreset = self.option("coreset")
        return build

    @torch.inference_mode(mode=False)  # a model that is built for an evaluation may be trained later
    def _build(self) -> None:
        self._built = [self.option(name) for name in NETWORK]
        others = ("class_name", "language_weight", "coreset")
        model = MVFAModel(**{name: self.option(name) for name in (*NETWORK, *others)})
        source = self.option("adapters")
        if source is not None:
            self.adapter_facts = facts = load_adapters(source, model.seg_adapters, model.det_adapters)
            check_facts(source, facts, model)
            self.intensity = str(facts["intensity"]) if facts.get("intensity") else None
            self.history = {name: facts.get(name) or {} for name in self.history}
        if isinstance(self.pre_processor, MVFAPreProcessor):
            self.pre_processor.load_checkpoint_config({"image_size": model.image_size})
        self.model = model

    def forward(self, batch: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Pre-process, predict and post-process images ``(B, 3, H, W)`` in [0, 1]."""
        self.ensure_model()
        return super().forward(batch, *args, **kwargs)

    @property
    def learning_type(self) -> LearningType:
        """One-class while adapters have to be trained; zero- or few-shot once they were given."""
        if self.option("adapters") is None:
            return LearningType.ONE_CLASS
        return LearningType.FEW_SHOT if self.option("memory") else LearningType.ZERO_SHOT

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """No validation before the first training step, as there is nothing to validate yet."""
        return {"num_sanity_val_steps": 0}

    @AnomalibModule.trainer.setter  # type: ignore[attr-defined,untyped-decorator]  # a property of Lightning
    def trainer(self, trainer: Trainer | None) -> None:
        """Attach a trainer, and set the published number of epochs where it has no limit."""
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            set_default_epochs(trainer)
        AnomalibModule.trainer.fset(self, trainer)  # type: ignore[attr-defined]

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> MVFAPreProcessor:
        """Configure the default pre-processor: the published resize to 240 x 240 pixels or another size."""
        return MVFAPreProcessor(image_size or (240, 240))

    def configure_post_processor(self) -> MVFAPostProcessor:
        """Configure the default post-processor: the chosen threshold, normalisation that keeps the order of scores."""
        return MVFAPostProcessor(self.option("threshold"), self.option("target_fpr"))

    @staticmethod
    def configure_evaluator() -> MVFAEvaluator:
        """Configure the default metrics: AUROC, AUPR and F1 of images and of pixels, and AUPRO."""
        return MVFAEvaluator()

    @classmethod
    def configure_visualizer(cls) -> MVFAVisualizer:
        """Configure the default visualizer: each panel at the size of its image."""
        return MVFAVisualizer()

    def configure_callbacks(self) -> Sequence[Callback]:
        """Add the callbacks of the run to anomalib's components."""
        components = super().configure_callbacks()
        return [*(components if isinstance(components, Sequence) else [components]), *surrounding_callbacks(self)]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over the adapters, as published."""
        adapters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.optim.Adam(adapters, lr=self.option("learning_rate"), betas=ADAM_BETAS)

    # Training

    def setup(self, stage: str) -> None:
        """Make the state of a fit, and prepare loaders and checkpoints."""
        prepare_processes(self.trainer)
        checkpoints.write_whole_checkpoints(self.trainer)
        self.fit_state = FitState() if stage == TrainerFn.FITTING else None

    def on_fit_start(self) -> None:
        """Drop calibration and thresholds of an earlier fit."""
        self.trained, self.adapter_facts = True, {}
        self.calibration = Calibration()
        if isinstance(self.post_processor, MVFAPostProcessor):
            self.post_processor.reset()
            self._apply_threshold_rule()

    def on_fit_end(self) -> None:
        """Drop the state of the fit."""
        self.fit_state = None

    def _apply_threshold_rule(self) -> None:
        """Set the rule of the thresholds where one was given here."""
        if isinstance(self.post_processor, MVFAPostProcessor) and self.explicit & {"threshold", "target_fpr"}:
            self.post_processor.set_rule(self.option("threshold"), self.option("target_fpr"))

    def on_train_start(self) -> None:
        """Prepare the training for the data."""
        begin_training(self)

    def on_train_epoch_end(self) -> None:
        """Calibrate with the supports when a checkpoint may follow that no validation precedes."""
        if not self.validates:
            self.calibration.complete(self)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Compute the mean loss of a batch: images ``(B, 3, H, W)``, labels ``(B,)``, masks ``(B, H, W)`` if any."""
        images: Tensor = batch.image  # type: ignore[assignment]  # a batch always has images
        masks: Tensor | None = batch.gt_mask
        labels: Tensor | None = batch.gt_label
        state = self.fit_state or FitState()
        self.calibration.drop()  # the adapters are about to change
        if state.lesions is not None:
            number = batch_idx * self.trainer.world_size + self.trainer.global_rank
            images, masks, labels = state.lesions.draw_on_half(images, self.current_epoch, number)
        if labels is None:
            msg = "MVFA learns from labelled images, but this batch has no labels."
            raise ValueError(msg)
        terms = training_losses(
            self.model,
            images,
            labels,
            masks if self.model.has_masks else None,
            getattr(batch, "has_mask", None),
            state.text_features(batch),
            state.token_cache,
        )
        for name, values in terms.items():
            self.log(f"train_{name}", values.mean(), batch_size=len(images), on_step=False, on_epoch=True)
        loss = torch.stack(list(terms.values())).sum(dim=0).mean()
        self.log("train_loss", loss, batch_size=len(images), on_step=False, on_epoch=True, prog_bar=True)
        return loss

    # Memory bank, ranges of the fusion, thresholds

    @property
    def validates(self) -> bool:
        """Whether the training has anything to validate on; Lightning counts the batches only when it does so."""
        datamodule = getattr(self.trainer, "datamodule", None)
        is_empty = isinstance(datamodule, AnomalibDataModule) and not len(getattr(datamodule, "val_data", ()))
        return self.trainer.enable_validation and not is_empty

    def on_validation_start(self) -> None:
        """Build the bank with the present adapters."""
        if self.fit_state is None:
            prepare_evaluation(self)
        self.calibration.begin(self)

    def on_validation_epoch_end(self) -> None:
        """Note that the thresholds fit the present adapters."""
        self.calibration.end(self)

    def on_test_start(self) -> None:
        """Warn of untrained adapters, and calibrate what was not calibrated before."""
        prepare_evaluation(self)
        self.calibration.complete(self)

    on_predict_start = on_test_start

    def on_test_end(self) -> None:
        """Keep the metrics of the test, which go into an adapters file."""
        self.history["figures"] = evaluation_facts(self.trainer, self.option("fusion_scale"))

    def pre_processed(self, image: Tensor) -> Tensor:
        """Resize an image ``(3, H, W)`` in [0, 1], or a batch, to the size that the model reads."""
        if self.pre_processor is not None and self.pre_processor.transform is not None:
            image = self.pre_processor.transform(image)  # type: ignore[operator]  # a torchvision transform
        return image.as_subclass(Tensor)

    def validation_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> Any:
        """Predict a batch for thresholds and normalisation."""
        images: Tensor = batch.image  # type: ignore[assignment]  # a batch always has images
        features = None if self.fit_state is None else self.fit_state.text_features(batch)
        predictions = self.model.fuse(*self.model.branches(images, features))
        return batch.update(**predictions._asdict())

    # Checkpoints

    def facts(self) -> dict[str, Any]:
        """Return what the adapters fit and how they were trained, in types of JSON, without any path."""
        return {**model_facts(self.model), "intensity": self.intensity, **self.history}

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # the arguments are anomalib's
        cls, checkpoint_path: str | Path, map_location: Any = None, weights_only: bool = True, **kwargs: Any
    ) -> "MVFA":
        """Load a model from a checkpoint, without executing code from it.

        Args:
            checkpoint_path: File that ``anomalib train --model MVFA`` has written.
            map_location: Where to put the tensors, as for any Lightning module.
            weights_only: Whether objects other than tensors and plain data are refused.
            **kwargs: As for any Lightning module, and arguments for evaluation in the place of the checkpoint's.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it cannot be read, was not made by MVFA, or does not fit the arguments.
        """
        if weights_only:
            contents = checkpoints.read_checkpoint(checkpoint_path, cls.checkpoint_safe_globals(), mmap=True)
            checkpoints.checkpoint_facts(contents, checkpoint_path)
        options = {"map_location": map_location, "weights_only": weights_only, **kwargs}
        model: MVFA = super().load_from_checkpoint(checkpoint_path, **options)  # type: ignore[assignment]
        model.explicit = {name for name, value in kwargs.items() if value is not None} & model.hparams.keys()
        return model

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen backbone out and store the bank in half precision."""
        super().on_save_checkpoint(checkpoint)
        checkpoints.save_state(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the network that the checkpoint describes, and settle its arguments with those given here."""
        if checkpoints.keep_trained_state(self, checkpoint):
            return
        self._untouched = False
        settled = settle(self, checkpoint)
        self.hparams.update(settled.arguments)
        self.adapter_facts = {}
        self.ensure_model()
        super().on_load_checkpoint(checkpoint)  # its components
        self._apply_threshold_rule()
        checkpoints.restore_state(self, checkpoint)
        saved = checkpoints.checkpoint_facts(checkpoint)["calibration"]
        self.calibration = Calibration(**{name: held and getattr(settled, name) for name, held in saved.items()})
