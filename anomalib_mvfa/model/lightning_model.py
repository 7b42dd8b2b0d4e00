# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""MVFA as an anomalib model: training, calibration, checkpoints.

The adapters learn from labelled supports (:class:`~anomalib_mvfa.data.FewShot`), or from normal images with synthetic
lesions when a datamodule has no abnormal training images. The memory bank and the ranges of the fusion are made from
the supports before each validation and at the end of training; nothing of the test set is used unless
``fusion_scale="test"`` asks for it.

Paper:
    Adapting Visual-Language Models for Generalizable Anomaly Detection in Medical Images (CVPR 2024),
    https://arxiv.org/abs/2403.12570
"""

import logging
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any, NoReturn

import torch
from anomalib import LearningType
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.deploy import CompressionType
from anomalib.engine.plugins import AnomalibCheckpointIO
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric

from anomalib_mvfa.backbones.loading import resolve_backbone
from anomalib_mvfa.callbacks.loading import prepare_processes, withhold
from anomalib_mvfa.callbacks.non_finite import all_finite, diagnosis
from anomalib_mvfa.callbacks.prediction_table import PredictionTable
from anomalib_mvfa.callbacks.resuming import ResumePoint
from anomalib_mvfa.callbacks.run_record import data_fingerprint, run_record, write_run_record
from anomalib_mvfa.metrics import MVFAEvaluator, SelectionScore
from anomalib_mvfa.post_processing import MVFAPostProcessor
from anomalib_mvfa.pre_processing import MVFAPreProcessor, check_intensity
from anomalib_mvfa.processes import gather_objects
from anomalib_mvfa.training.calibration import branch_extremes, find_support
from anomalib_mvfa.training.lesions import LesionSynthesizer
from anomalib_mvfa.training.token_cache import TokenCache
from anomalib_mvfa.visualization import MVFAVisualizer
from anomalib_mvfa.weights.adapter_files import check_facts, load_adapters, write_adapters
from anomalib_mvfa.weights.checkpoints import (
    AtomicCheckpointIO,
    check_state,
    checkpoint_folder,
    read_checkpoint,
)
from anomalib_mvfa.weights.facts import evaluation_facts, model_facts, training_facts
from anomalib_mvfa.weights.hub import upload

from .loss import dice_loss, focal_loss, score_loss
from .prompts import prompt_name
from .torch_model import MVFAModel, SupportOutput
from .variant import Variant

__all__ = ["MVFA"]

logger = logging.getLogger(__name__)

ADAM_BETAS = (0.5, 0.999)
PUBLISHED_EPOCHS = 50
LIGHTNING_EPOCHS = 1000  # what Lightning sets when nobody gave a number
CACHE_IMAGES = 1000
CACHE_BYTES = 2**30
FUSION_SCALES = ("support", "test")
SELECTIONS = ("last", "best")
SELECTION_SCORE = "selection_score"
BEST_SO_FAR = ("best_model_path", "best_model_score", "best_k_models", "kth_best_model_path", "kth_value")
CHECKPOINT_KEY = "mvfa"
RESUME_KEY = "mvfa_resume"
FACTS = {"fingerprint", "class_name", "has_masks"}
TOWER = "model.tower."
BANKS = ("model.seg_memory.", "model.det_memory.")
KEEP_NETWORK = {"adapters", "learning_rate", "class_name", "threshold", "target_fpr"}
"""Arguments that may differ between a model and its checkpoint without the network being built again."""


class MVFA(AnomalibModule):
    """Multi-level adapted CLIP for anomaly detection in medical images.

    Args:
        backbone: Vision transformer of open_clip, ``hf-hub:owner/name``, a JSON configuration, or ``"tiny"``, the small
            demonstration model inside this package. Defaults to ``"ViT-L-14-336"``.
        pretrained: Tag, local file or ``"random"``. Defaults to the backbone's own, or ``"openai"``.
        image_size: Input size in pixels. Defaults to 240 for ``ViT-L-14-336``, otherwise to the backbone's own.
        levels: One-based blocks to read. ``"half"`` reads the first two of the default ones and ``"middle"`` the second
            alone, at half the cost. Defaults to the ends of the quarters, ``[6, 12, 18, 24]`` for ViT-L.
        class_name: What the images show, for the prompts. Defaults to the name that the datamodule gives, the published
            one for the sets of BMAD, or ``"object"``.
        adapters: Trained adapters: a file (``.pth`` in the released format, or ``.safetensors``), or
            ``hf-hub:owner/name``. The model then is not trained any more. Defaults to ``None``.
        memory: Whether to use the memory branch. Without it the model is zero-shot. Defaults to ``True``.
        max_support: For datamodules that know no supports: how many normal training images go into the bank.
            Defaults to ``32``.
        learning_rate: Step size of Adam. Published: 1e-3 in few-shot, 1e-4 in zero-shot. Defaults to ``1e-3``.
        selection: ``"last"`` keeps the last epoch; ``"best"`` the one with the greatest image AUROC (plus pixel AUROC
            where there are masks) on the datamodule's validation part. The published protocol is ``"best"`` with a
            validation part that is the test part. Defaults to ``"last"``.
        fusion_scale: ``"support"`` takes the ranges of the two branches from the supports; ``"test"`` from the whole
            evaluated set, as in the published protocol. Defaults to ``"support"``.
        language_weight: Share of the language branch in the fusion. Defaults to ``0.5``.
        coreset: Share of the memory bank that is kept, in (0, 1]; a smaller bank is searched faster.
            Defaults to ``1.0``.
        threshold: How the thresholds of images and pixels are set: ``"f1"`` and ``"youden"`` from labelled validation
            images, ``"fpr"`` from normal images alone: those of the validation part, or the supports. Where abnormal
            validation images lack, ``"fpr"`` is used. Defaults to ``"f1"``.
        target_fpr: For ``"fpr"``: share of normal images, and of their pixels, that may be called abnormal. With n
            normal images no less than 1 / (n + 1) can be promised. Defaults to ``0.01``.
        variant: ``"released"`` or ``"paper"``; sets the following choices, each of which can be given by itself.
            See :class:`~anomalib_mvfa.model.variant.Variant`.
        quick_gelu: Activation of the tower.
        normalize_input: Whether to apply CLIP's mean and standard deviation.
        activation: Non-linearity of the adapters.
        residual: Shares of token, segmentation output and detection output.
        last_level_projector: Whether the last level's hidden vector is linear.
        pooling: ``"mean"`` or ``"max"`` over positions for the image score.
        level_reduction: ``"sum"`` or ``"mean"`` over levels.
        bce_as_logits: Whether the cross-entropy takes the score for a logit.
        residual_norm: Whether adapters' outputs are rescaled to the token's length.
        window_sizes: Side lengths of windows in which patches are averaged.
        map_blur: Standard deviation in pixels of a blur of the map.
        background_dice: Whether to add a Dice term on the normal state.
        pre_processor: Pre-processor, or whether to use the default. Defaults to ``True``.
        post_processor: Post-processor, or whether to use the default. Defaults to ``True``.
        evaluator: Evaluator, or whether to use the default. Defaults to ``True``.
        visualizer: Visualizer, or whether to use the default. Defaults to ``True``.

    Raises:
        ValueError: If backbone, sizes or choices are unknown or do not fit.

    Example:
        >>> model = MVFA(backbone="tiny")
        >>> model.learning_type
        <LearningType.ONE_CLASS: 'one_class'>
    """

    model: MVFAModel
    _zero_shot: bool

    def __init__(
        self,
        backbone: str = "ViT-L-14-336",
        pretrained: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        levels: Sequence[int] | str | None = None,
        class_name: str | None = None,
        adapters: str | Path | None = None,
        memory: bool = True,
        max_support: int = 32,
        learning_rate: float = 1e-3,
        selection: str = "last",
        fusion_scale: str = "support",
        language_weight: float = 0.5,
        coreset: float = 1.0,
        threshold: str = "f1",
        target_fpr: float = 0.01,
        variant: str = "released",
        quick_gelu: bool | None = None,
        normalize_input: bool | None = None,
        activation: str | None = None,
        residual: Sequence[float] | None = None,
        last_level_projector: bool | None = None,
        pooling: str | None = None,
        level_reduction: str | None = None,
        bce_as_logits: bool | None = None,
        residual_norm: bool | None = None,
        window_sizes: Sequence[int] | None = None,
        map_blur: float | None = None,
        background_dice: bool | None = None,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        for name, value, choices in (
            ("fusion_scale", fusion_scale, FUSION_SCALES),
            ("selection", selection, SELECTIONS),
        ):
            if value not in choices:
                msg = f"{name} must be one of {', '.join(choices)}, got '{value}'."
                raise ValueError(msg)
        own_size = resolve_backbone(backbone, pretrained, image_size).image_size
        # anomalib's constructor asks for the learning type and writes the arguments down as hyper-parameters.
        object.__setattr__(self, "_given_adapters", adapters is not None)
        object.__setattr__(self, "_zero_shot", not memory)
        super().__init__(
            pre_processor=self.configure_pre_processor(own_size) if pre_processor is True else pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self._variant()  # refuses unknown choices before anything is loaded
        self._lesions: LesionSynthesizer | None = None
        self._memory_step = -1
        self._class_features: dict[str, Tensor] = {}
        self._token_cache: TokenCache | None = None
        self._adapters_class: str | None = None
        self._selection_score = SelectionScore() if selection == "best" else None
        self._support_output: SupportOutput | None = None
        self._resumed: dict[str, Any] = {}
        self._data_digest: str | None = None
        self._good_adapters: dict[str, Tensor] = {}  # those that the present epoch began with
        self.intensity: str | None = None  # rule by which the training images were read, where the datamodule has one
        self.history: dict[str, Any] = {"training": {}, "figures": {}}  # what an adapters file tells of its making

    def _variant(self) -> Variant:
        names = Variant.__dataclass_fields__
        return Variant.from_name(self.hparams["variant"], **{name: self.hparams[name] for name in names})

    # The network is built late, so that `anomalib predict --model MVFA --ckpt_path ...` needs no argument but the
    # checkpoint, which knows the backbone.

    def configure_model(self) -> None:
        """Build the network for training, or from given adapters, unless it is there.

        Validation, testing and prediction may otherwise still be given a checkpoint: they build when they start.

        Raises:
            FileNotFoundError: If the backbone's weights are not there.
            ValueError: If adapters do not fit.
        """
        # Adapters know how their images were read, which is asked when the data are loaded.
        if self._trainer is None or self.trainer.state.fn == TrainerFn.FITTING or self._given_adapters:
            self._ensure_model()

    def _ensure_model(self) -> None:
        if "model" in self._modules:
            return
        self._build()
        if self._trainer is not None:
            self.trainer.precision_plugin.convert_module(self.model)
            self.model.to(self.device)

    def _build(self) -> None:
        arguments = ("backbone", "pretrained", "image_size", "levels", "class_name", "language_weight", "coreset")
        model = MVFAModel(variant=self._variant(), **{name: self.hparams[name] for name in arguments})
        source = self.hparams["adapters"]
        if source is not None:
            facts: dict[str, Any] = load_adapters(source, model.seg_adapters, model.det_adapters)
            check_facts(source, facts, model.fingerprint, model.levels, model.variant)
            model.has_masks = bool(facts.get("has_masks", True))
            self.intensity = str(facts["intensity"]) if facts.get("intensity") else None
            self.history = {name: facts.get(name) or {} for name in self.history}
            self._adapters_class = facts.get("class_name")
        self.model = model

    def forward(self, batch: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - anomalib's signature
        """Pre-process, predict and post-process images ``(B, 3, H, W)`` in [0, 1]."""
        self._ensure_model()
        return super().forward(batch, *args, **kwargs)

    @property
    def learning_type(self) -> LearningType:
        """One-class while adapters have to be trained; zero- or few-shot once they were given."""
        if not self._given_adapters:
            return LearningType.ONE_CLASS
        return LearningType.ZERO_SHOT if self._zero_shot else LearningType.FEW_SHOT

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """No validation before the first training step, as there is nothing to validate yet."""
        return {"num_sanity_val_steps": 0}

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> MVFAPreProcessor:
        """Configure the default pre-processor: the published resize, nothing else.

        Args:
            image_size: Height and width; 240 x 240 by default.
        """
        return MVFAPreProcessor(image_size or (240, 240))

    def configure_post_processor(self) -> MVFAPostProcessor:
        """Configure the default post-processor: the chosen threshold, normalisation that keeps the order of scores."""
        return MVFAPostProcessor(self.hparams["threshold"], self.hparams["target_fpr"])

    @staticmethod
    def configure_evaluator() -> MVFAEvaluator:
        """Configure the default metrics: AUROC, AUPR and F1 of images and of pixels, and AUPRO."""
        return MVFAEvaluator()

    @classmethod
    def configure_visualizer(cls) -> MVFAVisualizer:
        """Configure the default visualizer: each panel at the size of its image."""
        return MVFAVisualizer()

    def configure_callbacks(self) -> Sequence[Callback]:
        """Add the table of predictions to anomalib's components, and in training the choice of the best epoch."""
        callbacks = super().configure_callbacks()
        own: list[Callback] = [PredictionTable()]
        if self._selection_score is not None and self.trainer.state.fn == TrainerFn.FITTING:
            # Takes the place of anomalib's callback of the same class.
            own.append(
                ModelCheckpoint(
                    dirpath=Path(self.trainer.default_root_dir) / "weights" / "lightning",
                    filename="model",
                    monitor=SELECTION_SCORE,
                    mode="max",
                    save_on_train_epoch_end=False,
                ),
            )
        if self.trainer.state.fn == TrainerFn.FITTING and self.trainer.checkpoint_callback is not None:
            own.append(ResumePoint())
        return [*(callbacks if isinstance(callbacks, Sequence) else [callbacks]), *own]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over the adapters, as published."""
        adapters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.optim.Adam(adapters, lr=self.hparams["learning_rate"], betas=ADAM_BETAS)

    # Training

    def setup(self, stage: str) -> None:
        """Take the published number of epochs where none was given, and see that the last epoch is validated.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        """
        prepare_processes(self.trainer)
        checkpoint_io = self.trainer.strategy.checkpoint_io
        if type(checkpoint_io) is AnomalibCheckpointIO:
            self.trainer.strategy.checkpoint_io = AtomicCheckpointIO(checkpoint_io.extra_safe_globals)
        loop = self.trainer.fit_loop
        if stage != TrainerFn.FITTING:
            return
        if loop.max_epochs == LIGHTNING_EPOCHS and self.trainer.max_steps == -1:
            loop.max_epochs = PUBLISHED_EPOCHS
            logger.info("Training for %d epochs, as published; --trainer.max_epochs changes it.", PUBLISHED_EPOCHS)
            if self.trainer.check_val_every_n_epoch == 1 and self._selection_score is None:
                self.trainer.check_val_every_n_epoch = PUBLISHED_EPOCHS
                logger.info("Validating after the last epoch; --trainer.check_val_every_n_epoch changes it.")
        every, epochs = self.trainer.check_val_every_n_epoch, loop.max_epochs or -1
        if self._selection_score is None and every and epochs > 0 and epochs % every:
            # The last epoch is the one that is kept: it needs thresholds, and the checkpoint follows its validation.
            self.trainer.check_val_every_n_epoch = epochs
            logger.info("Validating after the last of %d epochs instead of every %d.", epochs, every)

    def on_fit_start(self) -> None:
        """Go on where an interrupted training stopped: random numbers, and the best epoch so far."""
        states = self._resumed.get("random_states", [])
        if len(states) == self.trainer.world_size:
            torch.set_rng_state(states[self.trainer.global_rank].cpu())
        best = self.trainer.checkpoint_callback
        kept = self._resumed.get("callbacks", {}).get(getattr(best, "state_key", None), {})
        if self._selection_score is not None and kept:  # Lightning forgets the score when the folder is another one
            for name in BEST_SO_FAR:
                setattr(best, name, kept[name])

    def on_train_start(self) -> None:
        """Learn from the data what the images show, whether they have masks, and whether lesions must be drawn.

        Raises:
            ValueError: If ``threshold="fpr"`` would find no normal images at the end.
        """
        if self.hparams["threshold"] == "fpr" and self._zero_shot and not self._validates:
            msg = (
                "threshold='fpr' is set by normal images that the model was not trained on, but there is no validation "
                "part, and no supports as memory=False. Add normal validation images, or take another threshold."
            )
            raise ValueError(msg)
        self._encode_classes()
        self._take_class_name()
        if self._selection_score is not None:
            self._announce_selection()
        rule = getattr(getattr(self.trainer, "datamodule", None), "intensity", None)
        if self._resumed:
            check_intensity(self.intensity, rule)
        self.intensity = rule
        data = self._train_data()
        has_anomalous = bool(getattr(data, "has_anomalous", True))
        samples = getattr(data, "samples", None)
        with_masks = samples is None or samples.attrs.get("task", "segmentation") == "segmentation"
        self.model.has_masks = with_masks or not has_anomalous
        facts = training_facts(self.trainer, self.hparams["learning_rate"], drawn_lesions=not has_anomalous)
        facts["classes"] = facts["classes"] or [self.model.class_name]
        self.history = {"training": facts, "figures": {}}
        if not has_anomalous:
            self._lesions = LesionSynthesizer()
            logger.info("No abnormal training images: lesions are drawn on half of the normal ones.")
        elif isinstance(data, Sized) and len(data) <= CACHE_IMAGES:
            self._token_cache = TokenCache(CACHE_BYTES, max_images=len(data))
            caches = self._resumed.get("token_caches", [])
            if len(caches) == self.trainer.world_size and caches[self.trainer.global_rank]:
                self._token_cache.restore(caches[self.trainer.global_rank])
        self._record_run()
        self._resumed = {}

    def _record_run(self) -> None:
        """Write down how to repeat this training, and see that all processes have the same data.

        Raises:
            ValueError: If processes have different data.
        """
        datamodule = getattr(self.trainer, "datamodule", None)
        parts = {name: getattr(datamodule, f"{name}_data", None) for name in ("train", "val", "test")}
        if datamodule is None:
            parts["train"] = self._train_data()
        prints = {name: data_fingerprint(part) for name, part in parts.items()}
        self._data_digest = (prints["train"] or {}).get("digest")
        if len({str(found) for found in gather_objects(prints)}) > 1:
            msg = (
                "The processes have different images: their datamodule splits at random. Give it a seed, or set "
                "--seed_everything."
            )
            raise ValueError(msg)
        if self._resumed.get("data", self._data_digest) != self._data_digest:
            logger.warning("The training images are not those that the checkpoint was made with.")
        saves = self.trainer.checkpoint_callback is not None and not self.trainer.fast_dev_run  # type: ignore[attr-defined]
        if saves and self.trainer.is_global_zero:
            write_run_record(checkpoint_folder(self.trainer), run_record(self.trainer, self, prints))

    def on_train_epoch_start(self) -> None:
        """Keep the adapters, to go back to should this epoch fail."""
        self._good_adapters = {
            name: value.detach().to("cpu", copy=True)
            for name, value in self.model.state_dict().items()
            if name.startswith(("seg_adapters.", "det_adapters."))
        }

    def _stop_diverged(self, reason: str) -> NoReturn:
        """Go back to the adapters that the epoch began with, save them, and end the training.

        Raises:
            FloatingPointError: Always.
        """
        self.model.load_state_dict(self._good_adapters, strict=False)
        msg = f"The training has diverged in epoch {self.current_epoch + 1}, step {self.global_step + 1}. {reason}"
        if self.current_epoch:
            path = checkpoint_folder(self.trainer) / "last_good.safetensors"
            if self.trainer.is_global_zero:
                self.save_adapters(path)
            msg += f" The adapters of {self.current_epoch} complete epochs are in {path}."
        raise FloatingPointError(msg)

    def _check_adapters(self) -> None:
        if not all_finite(self.model):
            self._stop_diverged(self._diagnosis({}, None, ()))

    def _diagnosis(self, terms: dict[str, Tensor], images: Tensor | None, paths: Sequence[str]) -> str:
        return diagnosis(
            terms,
            images,
            paths,
            weights_are_finite=all_finite(self.model),
            precision=str(self.trainer.precision),
            learning_rate=self.hparams["learning_rate"],
        )

    def on_test_end(self) -> None:
        """Keep the figures of the test, which go into an adapters file."""
        self.history["figures"] = evaluation_facts(self.trainer, self.hparams["fusion_scale"])

    def _train_data(self) -> Any:  # noqa: ANN401 - any dataset
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None:
            return getattr(datamodule, "train_data", None)
        return getattr(self.trainer.train_dataloader, "dataset", None)

    def _take_class_name(self) -> None:
        """Choose the class name: the argument, what is known, the datamodule's, the adapters', or ``"object"``."""
        datamodule = getattr(self._trainer, "datamodule", None)
        category = getattr(datamodule, "category", None)
        from_data = getattr(datamodule, "class_name", None) or (prompt_name(category) if category else None)
        name = self.hparams["class_name"] or self.model.class_name or from_data or self._adapters_class or "object"
        if name != self.model.class_name:
            logger.info("Prompts are written for the class '%s'.", name)
            self.model.set_class_name(name)

    def _encode_classes(self) -> None:
        """Encode the classes of a datamodule that trains on several, for prompts of each image's own."""
        names = getattr(getattr(self.trainer, "datamodule", None), "class_names", ())
        if names:
            logger.info("Prompts of the training images are written for %s.", ", ".join(f"'{name}'" for name in names))
            self._class_features = self.model.encode_classes(names)

    def _text_features_of(self, batch: ImageBatch) -> Tensor | None:
        """Give the text features ``(B, E, 2)`` of a batch that names its classes, else ``None``."""
        names = getattr(batch, "class_name", None)
        if names is None or not self._class_features:
            return None
        return torch.stack([self._class_features[name] for name in names]).to(self.device)

    def _announce_selection(self) -> None:
        """Say on which images the epoch is chosen, loudly where those are the test images."""
        datamodule = getattr(self.trainer, "datamodule", None)
        val, test = (getattr(datamodule, f"{part}_data", None) for part in ("val", "test"))
        paths = [set(getattr(part, "samples", {}).get("image_path", ())) for part in (val, test)]
        if paths[0] & paths[1]:
            logger.warning(
                "selection='best' on a validation part that shares %d images with the test part, as in the published "
                "protocol: the test figures are those of the epoch that suits the test images best.",
                len(paths[0] & paths[1]),
            )

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Compute the loss of a batch.

        Args:
            batch: Images ``(B, 3, H, W)``, labels ``(B,)``, and masks ``(B, H, W)`` for sets that have them.
            batch_idx: Number of the batch in the epoch.

        Returns:
            Mean loss over the samples.

        Raises:
            ValueError: If the batch has no labels.
            FloatingPointError: If the loss is no finite number.
        """
        images: Tensor = batch.image  # type: ignore[assignment]  # a batch always has images
        masks: Tensor | None = batch.gt_mask
        labels: Tensor | None = batch.gt_label
        if self._lesions is not None:
            number = batch_idx * self.trainer.world_size + self.trainer.global_rank
            images, masks, labels = self._lesions.draw_on_half(images, self.current_epoch, number)
        if labels is None:
            msg = "MVFA learns from labelled images, but this batch has no labels."
            raise ValueError(msg)
        terms = self.losses(
            images,
            labels,
            masks if self.model.has_masks else None,
            getattr(batch, "has_mask", None),
            self._text_features_of(batch),
        )
        if not all(bool(values.isfinite().all()) for values in terms.values()):
            self._stop_diverged(self._diagnosis(terms, images, batch.image_path or ()))
        for name, values in terms.items():
            self.log(f"train_{name}", values.mean(), batch_size=len(images), on_step=False, on_epoch=True)
        loss = torch.stack(list(terms.values())).sum(dim=0).mean()
        self.log("train_loss", loss, batch_size=len(images), on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def losses(
        self,
        images: Tensor,
        labels: Tensor,
        masks: Tensor | None,
        has_mask: Tensor | None = None,
        text_features: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the terms of the loss, summed over the levels.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1].
            labels: ``(B,)``.
            masks: ``(B, H, W)``; ``None`` for sets without masks, whose images do not move the segmentation adapters.
            has_mask: ``(B,)``, false for the images of sets without masks in a batch of several sets; ``None`` when
                all have masks.
            text_features: ``(B, E, 2)`` when each image has a class of its own; ``None`` takes the model's own.

        Returns:
            ``bce`` and, with masks, ``focal`` and ``dice``, one value ``(B,)`` each.
        """
        if has_mask is not None and masks is not None:
            masks = masks if bool(has_mask.any()) else None
            has_mask = None if bool(has_mask.all()) else has_mask
        frozen = masks is None if has_mask is None or masks is None else ~has_mask
        hidden = self.model.hidden_tokens(images, frozen_segmentation=frozen, cache=self._token_cache)
        scores = [self.model.level_probabilities(tokens, text_features)[1] for tokens in hidden.detection]
        terms = {"bce": _sum(score_loss(score, labels, self.model.variant.bce_as_logits) for score in scores)}
        if masks is not None:
            maps = [self.model.level_probabilities(tokens, text_features)[0] for tokens in hidden.segmentation]
            on_masks = {
                "focal": _sum(focal_loss(state_map, masks) for state_map in maps),
                "dice": _sum(dice_loss(state_map[:, 1], masks) for state_map in maps),
            }
            if self.model.variant.background_dice:
                background = ~masks.bool()
                on_masks["background_dice"] = _sum(dice_loss(state_map[:, 0], background) for state_map in maps)
            terms |= on_masks if has_mask is None else {name: term * has_mask for name, term in on_masks.items()}
        return terms

    # Memory bank, ranges of the fusion, thresholds

    @property
    def _validates(self) -> bool:
        """Whether the training has anything to validate on; Lightning counts the batches only when it does so."""
        datamodule = getattr(self.trainer, "datamodule", None)
        is_empty = isinstance(datamodule, AnomalibDataModule) and not len(getattr(datamodule, "val_data", ()))
        return self.trainer.enable_validation and not is_empty

    def on_train_epoch_end(self) -> None:
        """Remember the supports when a checkpoint may follow that no validation precedes.

        Raises:
            FloatingPointError: If the adapters hold numbers that are not finite.
        """
        self._check_adapters()
        if not self._validates:
            self._calibrate_without_validation()

    def on_train_end(self) -> None:
        """Leave a bank that fits the final adapters."""
        self._remember()
        self._support_output = None
        self._token_cache = None

    def _calibrate_without_validation(self) -> None:
        self._remember()
        self._offer_support()
        if isinstance(self.post_processor, MVFAPostProcessor):
            self.post_processor.on_validation_epoch_end(self.trainer, self)

    def _offer_support(self) -> None:
        """Show the post-processor the supports, in case the validation part has no normal images."""
        if self._support_output is not None and isinstance(self.post_processor, MVFAPostProcessor):
            language, memory, labels = self._support_output
            self.post_processor.set_support(self.model.fuse(language, memory), labels)

    def on_fit_end(self) -> None:
        """Go back to the best epoch, if that was asked for."""
        checkpointing = self.trainer.checkpoint_callback
        path = getattr(checkpointing, "best_model_path", "")
        if self._selection_score is None or not path:
            return
        checkpoint = self.trainer.strategy.load_checkpoint(path, weights_only=True)
        self.on_load_checkpoint(checkpoint)
        self.load_state_dict(checkpoint["state_dict"])
        score = float(getattr(checkpointing, "best_model_score", None) or 0)
        logger.info("Kept epoch %d of %d, selection score %.4f.", checkpoint["epoch"] + 1, self.current_epoch, score)

    def on_validation_start(self) -> None:
        """Remember the supports with the present adapters."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._check_adapters()
        else:
            self._prepare_evaluation()
        self._remember()
        if self.hparams["fusion_scale"] == "test":
            self._scale_by(self.trainer.val_dataloaders)
        self._offer_support()

    def on_test_start(self) -> None:
        """Warn of untrained adapters and see that there is a bank; as published, take the ranges from the test set."""
        self._check_ready()
        if self._given_adapters and self._memory_step < 0:  # neither validated before nor from a checkpoint
            self._calibrate_without_validation()
        if self.hparams["fusion_scale"] == "test":
            logger.warning("fusion_scale='test': the ranges of both branches are taken from the whole test set.")
            self._scale_by(self.trainer.test_dataloaders)

    def on_predict_start(self) -> None:
        """Warn of untrained adapters."""
        self._check_ready()

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:  # noqa: ANN401
        """Predict a batch; images that could not be read get NaN.

        Args:
            batch: Images ``(B, 3, H, W)`` in [0, 1].
            batch_idx: Number of the batch.
            dataloader_idx: Number of the loader.

        Returns:
            The batch with scores and maps.
        """
        predictions = super().predict_step(batch, batch_idx, dataloader_idx)
        withhold(batch)  # updated in place, as anomalib does
        return predictions

    def _prepare_evaluation(self) -> None:
        """Build the network, and see that prompts and images are those that it was made for."""
        self._ensure_model()
        self._take_class_name()
        check_intensity(self.intensity, getattr(getattr(self.trainer, "datamodule", None), "intensity", None))

    def _check_ready(self) -> None:
        self._prepare_evaluation()
        if self._memory_step < 0 and not self._given_adapters:
            logger.warning(
                "The adapters are untrained: train first, or give --ckpt_path or --model.adapters. "
                "The predictions mean nothing.",
            )

    def _remember(self) -> None:
        """Build the bank, unless it fits the present adapters already."""
        if self._memory_step == self.global_step and not self._given_adapters:
            return
        self._memory_step = self.global_step
        if self._zero_shot:
            return
        datamodule = getattr(self.trainer, "datamodule", None)
        support = find_support(datamodule, self._train_data(), self.hparams["max_support"], self._pre_processed)
        if support is not None:
            self._support_output = self.model.remember(support)

    def _pre_processed(self, image: Tensor) -> Tensor:
        if self.pre_processor is not None and self.pre_processor.transform is not None:
            image = self.pre_processor.transform(image)  # type: ignore[operator]  # a torchvision transform
        return image.as_subclass(Tensor)

    def _scale_by(self, loaders: DataLoader[Any] | Sequence[DataLoader[Any]] | None) -> None:
        """Take the fusion's ranges from all images of a loader, those of the other processes included."""
        outputs = branch_extremes(self.model, loaders, self._pre_processed, self.device)
        if outputs:
            self.model.set_fusion_range(outputs)

    def validation_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Predict a batch for thresholds and normalisation."""
        del args, kwargs
        images: Tensor = batch.image  # type: ignore[assignment]  # a batch always has images
        predictions = self.model.fuse(*self.model.branches(images, self._text_features_of(batch)))
        batch.update(**predictions._asdict())
        if self._selection_score is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._selection_score.update(batch)
        return batch

    def on_validation_epoch_end(self) -> None:
        """Log the score by which the best epoch is chosen."""
        if self._selection_score is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self.log(SELECTION_SCORE, self._selection_score.compute(), prog_bar=True)
            self._selection_score.reset()

    # Files

    def facts(self) -> dict[str, Any]:
        """Tell what the adapters fit and how they were made, in what JSON can hold; no path is among it."""
        return {**model_facts(self.model), "intensity": self.intensity, **self.history}

    def save_adapters(self, path: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Save the adapters alone, without memory bank and thresholds.

        Args:
            path: ``.safetensors``, with :meth:`facts` as metadata, or ``.pth`` for the released format.
            dtype: Storage type; ``None`` keeps float32.

        Returns:
            The path.
        """
        return write_adapters(path, self.model.seg_adapters, self.model.det_adapters, self.facts(), dtype)

    def push_to_hub(self, repository: str, licence: str, private: bool = True) -> str:
        """Upload the adapters in half precision, with a model card made of :meth:`facts`.

        ``adapters="hf-hub:owner/name"`` then loads them. Neither images nor the memory bank are uploaded.

        Args:
            repository: ``owner/name``; made unless it exists.
            licence: Identifier of the licence, such as ``"cc-by-nc-sa-4.0"``. That of the training data counts.
            private: Whether a new repository can be seen by its owner alone.

        Returns:
            Address of the repository.
        """
        facts = self.facts()
        return upload(
            repository,
            facts,
            licence,
            lambda path: write_adapters(path, self.model.seg_adapters, self.model.det_adapters, facts, torch.float16),
            private=private,
        )

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export as a torch file.

        Args:
            export_root: Folder.
            model_file_name: Name of the file without its suffix.

        Returns:
            Path of the file.

        Raises:
            ValueError: If the adapters are untrained, or the memory bank is empty where one is wanted.
        """
        self._check_exportable()
        return super().to_torch(export_root, model_file_name)

    def to_onnx(  # type: ignore[override]  # as anomalib's own
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Path:
        """Export as an ONNX graph from images in [0, 1] to normalised maps and scores, labels and masks.

        The graph resizes images of any size to the model's own, as training did. OpenVINO models are made of it.

        Args:
            export_root: Folder.
            model_file_name: Name of the file without its suffix.
            input_size: Fixed height and width of the images. Defaults to ``None``: they are dynamic, as the batch is.
            **kwargs: Arguments of ``torch.onnx.export``.

        Returns:
            Path of the file.

        Raises:
            ValueError: If the adapters are untrained, or the memory bank is empty where one is wanted.
        """
        self._check_exportable()
        return super().to_onnx(export_root, model_file_name, input_size, **{"opset_version": 18, **kwargs})

    def _compress_ov_model(  # anomalib's hook for its compression types
        self,
        model: Any,  # noqa: ANN401 - a model of OpenVINO
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        metric: Metric | None = None,
        task: Any = None,  # noqa: ANN401 - follows from the data
        max_drop: float = 0.01,
    ) -> Any:  # noqa: ANN401
        from anomalib_mvfa.deploy.quantisation import compress

        return compress(model, compression_type, datamodule, metric, max_drop)

    def _check_exportable(self) -> None:
        self._ensure_model()
        self._take_class_name()
        if not self._given_adapters and self._memory_step < 0 and self.model.memory.is_empty:
            msg = (
                "The adapters are untrained, so that there is nothing to export. Give --ckpt_path a checkpoint of "
                "`anomalib train --model MVFA`, or --model.adapters trained adapters."
            )
            raise ValueError(msg)
        if not self._zero_shot and self.model.memory.is_empty:
            msg = (
                "The memory bank is empty: adapters alone have none. Export a checkpoint (--ckpt_path), or build the "
                "bank first with Engine().validate(model, datamodule=...), or export the language branch alone with "
                "--model.memory false."
            )
            raise ValueError(msg)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # the arguments are anomalib's
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,  # noqa: ANN401
        weights_only: bool = True,
        **kwargs: Any,  # noqa: ANN401
    ) -> "MVFA":
        """Load a model from a checkpoint, without executing code from it.

        Args:
            checkpoint_path: File that ``anomalib train --model MVFA`` has written.
            map_location: Where to put the tensors, as for any Lightning module.
            weights_only: Whether objects other than tensors and plain data are refused.
            **kwargs: As for any Lightning module, and arguments that take the place of the checkpoint's.

        Returns:
            The model.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it cannot be read, was not made by MVFA, or does not fit.
        """
        if weights_only:
            read_checkpoint(checkpoint_path, cls.checkpoint_safe_globals())
        options = {"map_location": map_location, "weights_only": weights_only, **kwargs}
        model: MVFA = super().load_from_checkpoint(checkpoint_path, **options)  # type: ignore[assignment]
        return model

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen backbone out and store the bank in half precision."""
        super().on_save_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        for name in list(state):
            if name.startswith(TOWER):
                del state[name]
            elif name.startswith(BANKS):
                state[name] = state[name].half()
        checkpoint[CHECKPOINT_KEY] = self.facts()
        checkpoint[RESUME_KEY] = {
            "data": self._data_digest,
            "random_states": gather_objects(torch.get_rng_state()),
            "token_caches": gather_objects(None if self._token_cache is None else self._token_cache.state()),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the network that the checkpoint describes.

        Arguments of the checkpoint go before those of this object, except ``pretrained`` where one was given here.

        Raises:
            ValueError: If the checkpoint is not one of MVFA, or was made with other backbone weights.
        """
        facts = checkpoint.get(CHECKPOINT_KEY)
        if not isinstance(facts, dict) or not facts.keys() >= FACTS:
            msg = "This checkpoint was not made by MVFA. Give one that `anomalib train --model MVFA` has written."
            raise ValueError(msg)
        saved = dict(checkpoint["hyper_parameters"])
        if self.hparams["pretrained"] is not None:
            saved["pretrained"] = self.hparams["pretrained"]
        saved["adapters"] = None  # the checkpoint holds them
        changed = {name: value for name, value in saved.items() if name in self.hparams and self.hparams[name] != value}
        if "model" not in self._modules or changed.keys() - KEEP_NETWORK:
            self.hparams.update(changed)
            self._build()
        resuming = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        self._resumed = (
            {**checkpoint.get(RESUME_KEY, {}), "callbacks": checkpoint.get("callbacks", {})} if resuming else {}
        )
        object.__setattr__(self, "_zero_shot", not self.hparams["memory"])
        super().on_load_checkpoint(checkpoint)
        if self.model.fingerprint != facts["fingerprint"]:
            msg = (
                f"The checkpoint was made with other weights of backbone '{saved['backbone']}' than those at hand "
                f"(pretrained={saved['pretrained']!r}). Name the right ones with --model.pretrained."
            )
            raise ValueError(msg)
        check_state(checkpoint["state_dict"], self, skipped=(TOWER,), free=("_memory.", "normal_scores"))
        self.model.has_masks = facts["has_masks"]
        self.intensity = facts.get("intensity")
        self.history = {name: facts.get(name) or {} for name in self.history}
        self.model.restore_class_name(facts["class_name"])
        self._memory_step = int(checkpoint.get("global_step", 0))
        tower = {TOWER + name: value for name, value in self.model.tower.state_dict().items()}
        checkpoint["state_dict"].update(tower)


def _sum(terms: Any) -> Tensor:  # noqa: ANN401 - any iterable of tensors
    return torch.stack(list(terms)).sum(dim=0)
