# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""anomalib's WinCLIP with the backbone, the pre-processing and the prompts as arguments.

anomalib fixes all three, so that its WinCLIP cannot run on the tower of another method. Everything computed from
the tower's embeddings is anomalib's own.

Paper:
    WinCLIP: Zero-/Few-Shot Anomaly Classification and Segmentation (CVPR 2023), https://arxiv.org/abs/2303.14814
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.models.image.winclip import WinClip, WinClipModel
from anomalib.models.image.winclip.prompting import ANOMALOUS_STATES, NORMAL_STATES, TEMPLATES
from anomalib.models.image.winclip.torch_model import TEMPERATURE
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose, Normalize

from anomalib_mvfa.backbones.loading import BackboneConfig, load_clip, resolve_backbone
from anomalib_mvfa.backbones.towers import image_tower
from anomalib_mvfa.metrics import MVFAEvaluator
from anomalib_mvfa.model.prompts import class_prompts, prompt_name
from anomalib_mvfa.pre_processing import EightBitResize, ExportableResize
from anomalib_mvfa.visualization import MVFAVisualizer

__all__ = ["WinClipAny", "WinClipAnyModel"]

logger = logging.getLogger(__name__)

TEXT_BATCH = 64
ENSEMBLES: dict[str, Mapping[str, Sequence[str]] | None] = {
    "winclip": {"normal_states": NORMAL_STATES, "abnormal_states": ANOMALOUS_STATES, "templates": TEMPLATES},
    "mvfa": None,
}


class WinClipAnyModel(WinClipModel):
    """anomalib's WinCLIP network on a given CLIP.

    Args:
        config: Resolved backbone.
        scales: Side lengths of the windows, in patches.
        ensemble: See :func:`~anomalib_mvfa.model.prompts.class_prompts`.
    """

    def __init__(
        self,
        config: BackboneConfig,
        scales: Sequence[int] = (2, 3),
        ensemble: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super(WinClipModel, self).__init__()  # anomalib's own constructor would download its own backbone
        self.temperature = TEMPERATURE
        self.scales = tuple(scales)
        self.ensemble = ensemble
        self.class_name: str | None = None
        self.reference_images: Tensor | None = None
        self.apply_transform = False
        self.k_shot = 0
        self.clip, self.tokenizer = load_clip(config)
        self.grid_size = image_tower(self.clip.visual).grid_size
        self.register_buffer_list("masks", self._generate_masks(), persistent=False)
        self.register_buffer("_text_embeddings", torch.empty(0))
        self.register_buffer_list("_visual_embeddings", [torch.empty(0) for _ in self.scales])
        self.register_buffer("_patch_embeddings", torch.empty(0))

    def encode_image(self, batch: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Encode images, windows and patches.

        anomalib's own finds the windows by the inner layout of open_clip's towers, which changes between releases.

        Args:
            batch: ``(B, 3, H, W)``, pre-processed.

        Returns:
            Embeddings of the images ``(B, E)``, of the windows ``(B, W, E)`` for each scale, and the last tokens of the
            patches ``(B, P, D)``.
        """
        tower = image_tower(self.clip.visual)
        tokens = tower.embed(batch)
        prefix, patches = tokens[:, : tower.prefix], tokens[:, tower.prefix :]

        def run(selected: Tensor | None) -> tuple[Tensor, Tensor]:
            chosen = tokens if selected is None else torch.cat([prefix, patches[:, selected]], dim=1)
            for block in tower.blocks:
                chosen = tower.run_block(block, chosen, selected)
            return tower.pool(chosen)

        images, last = run(None)
        scales: list[Tensor] = self.masks  # type: ignore[assignment]  # window indices (side * side, W)
        windows = [torch.stack([run(window)[0] for window in masks.T], dim=1) for masks in scales]
        return images, windows, last[:, tower.prefix :]

    @torch.no_grad()
    def _collect_text_embeddings(self, class_name: str) -> None:  # type: ignore[override]  # decorated there, too
        """Average the embeddings of the sentences of each state: ``(2, E)``, normal first, of any length."""
        device = next(self.parameters()).device
        means = []
        for sentences in class_prompts(class_name, self.ensemble):
            chunks = [sentences[start : start + TEXT_BATCH] for start in range(0, len(sentences), TEXT_BATCH)]
            embeddings = [self.clip.encode_text(self.tokenizer(chunk).to(device)) for chunk in chunks]
            means.append(torch.cat(embeddings).mean(dim=0))
        self._text_embeddings = torch.stack(means)


class WinClipAny(WinClip, AnomalibModule):  # type: ignore[misc]  # directly, or `get_model` would not find it
    """WinCLIP on any backbone, zero-shot or few-shot. It is not trained.

    Unlike anomalib's, whose references skip the normalisation that all other images pass, the reference images here are
    pre-processed like any other image.

    Args:
        backbone: As of :class:`~anomalib_mvfa.MVFA`. Defaults to ``"ViT-B-16-plus-240"``, WinCLIP's own.
        pretrained: Tag, local file or ``"random"``. Defaults to ``"laion400m_e31"`` for WinCLIP's own backbone,
            otherwise to the backbone's own, or ``"openai"``.
        image_size: Input size in pixels. Defaults to that of MVFA on the same backbone.
        k_shot: Number of normal reference images; 0 is zero-shot. They are the normal supports of ``FewShot``
            unchanged, or the first training images of any other datamodule. Defaults to ``0``.
        scales: Side lengths of the windows, in patches. Defaults to ``(2, 3)``.
        class_name: What the images show, for the prompts. Defaults to the name in the datamodule, or
            ``"object"``.
        prompts: ``"winclip"`` for anomalib's ensemble, ``"mvfa"`` for that of the released MVFA, or a mapping with the
            lists ``normal_states``, ``abnormal_states`` and ``templates``. Defaults to ``"winclip"``.
        quick_gelu: Whether the tower runs QuickGELU. Defaults to what the weights were trained with: nothing in WinCLIP
            could learn around another activation.
        normalize_input: Whether images are normalised by the backbone's mean and standard deviation. Defaults to
            ``True``.
        pre_processor: Pre-processor, or whether to use the default. Defaults to ``True``.
        post_processor: Post-processor, or whether to use the default. Defaults to ``True``.
        evaluator: Evaluator, or whether to use the default. Defaults to ``True``.
        visualizer: Visualizer, or whether to use the default. Defaults to ``True``.

    Raises:
        ValueError: If an argument is unknown or does not fit the backbone.
        FileNotFoundError: If the backbone's weights are not there.

    Example:
        >>> model = WinClipAny(backbone="tiny", k_shot=4)
        >>> model.learning_type
        <LearningType.FEW_SHOT: 'few_shot'>
    """

    model: WinClipAnyModel

    def __init__(
        self,
        backbone: str = "ViT-B-16-plus-240",
        pretrained: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        k_shot: int = 0,
        scales: Sequence[int] = (2, 3),
        class_name: str | None = None,
        prompts: str | dict[str, list[str]] = "winclip",
        quick_gelu: bool | None = None,
        normalize_input: bool = True,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        if backbone == "ViT-B-16-plus-240" and pretrained is None:
            pretrained = "laion400m_e31"
        config = resolve_backbone(backbone, pretrained, image_size, quick_gelu)
        ensemble = _ensemble(prompts)
        grid = [side // config.patch_size for side in config.image_size]
        if not scales or not 0 < min(scales) <= max(scales) <= min(grid):
            msg = f"scales must be side lengths of windows within the grid of {grid[0]} x {grid[1]}, got {scales}."
            raise ValueError(msg)
        if k_shot < 0:
            msg = f"k_shot is a number of images, 0 for zero-shot, got {k_shot}."
            raise ValueError(msg)
        if pre_processor is True:
            facts = (config.mean, config.std) if normalize_input else None
            pre_processor = self.configure_pre_processor(config.image_size, facts)
        super(WinClip, self).__init__(  # anomalib's own constructor would download its own backbone
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.model = WinClipAnyModel(config, scales, ensemble)
        self.class_name = class_name
        self.k_shot = k_shot
        self.is_setup = False

    @classmethod
    def configure_pre_processor(
        cls,
        image_size: tuple[int, int] | None = None,
        normalization: tuple[Sequence[float], Sequence[float]] | None = (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD),
    ) -> PreProcessor:
        """Configure the default pre-processor: anomalib's, at a given size, with the resize of MVFA.

        References, validation and test images all pass it, so that they are resized in one way.

        Args:
            image_size: Height and width in pixels; 240 x 240 by default.
            normalization: Mean and standard deviation, a number a channel each; ``None`` for neither.
        """
        size = image_size or (240, 240)
        normalize = [Normalize(*normalization)] if normalization else []
        pre_processor = PreProcessor(transform=Compose([EightBitResize(size), *normalize]))
        pre_processor.export_transform = nn.Sequential(ExportableResize(size), *normalize)
        return pre_processor

    @staticmethod
    def configure_evaluator() -> MVFAEvaluator:
        """Configure the default metrics: those of MVFA."""
        return MVFAEvaluator()

    @classmethod
    def configure_visualizer(cls) -> MVFAVisualizer:
        """Configure the default visualizer: that of MVFA, which keeps the results of images with equal names apart."""
        return MVFAVisualizer()

    def setup(self, stage: str) -> None:
        """Encode the prompts, and in few-shot the references, once.

        Args:
            stage: Not used.

        Raises:
            ValueError: If the datamodule has fewer normal supports than ``k_shot``.
        """
        del stage
        if self.is_setup:
            return
        datamodule = getattr(self.trainer, "datamodule", None)
        category = getattr(datamodule, "category", None)
        from_data = getattr(datamodule, "class_name", None) or (prompt_name(category) if category else None)
        self.class_name = self.class_name or from_data or "object"
        logger.info("Prompts are written for the class '%s'.", self.class_name)
        self.model.setup(self.class_name, self._references(datamodule) if self.k_shot else None)
        self.is_setup = True

    def _references(self, datamodule: Any) -> Tensor:
        """Return the reference images ``(K, 3, H, W)`` as the network reads them."""
        support = getattr(datamodule, "support", None)
        if support is None:
            images = self.collect_reference_images(datamodule.train_dataloader())
        else:
            images = support.normal[0, : self.k_shot]  # the unchanged version
        if len(images) < self.k_shot:
            msg = (
                f"{self.k_shot} reference images were asked for, but the datamodule has {len(images)}. "
                "Lower --model.k_shot or raise --data.k_shot."
            )
            raise ValueError(msg)
        transform = getattr(self.pre_processor, "transform", None)
        return images if transform is None else transform(images)


def _ensemble(prompts: str | Mapping[str, Sequence[str]]) -> Mapping[str, Sequence[str]] | None:
    """Find an ensemble of prompts by its name, or check a given one."""
    if isinstance(prompts, str):
        if prompts not in ENSEMBLES:
            msg = f"prompts must be one of {', '.join(ENSEMBLES)} or a mapping of lists, got '{prompts}'."
            raise ValueError(msg)
        return ENSEMBLES[prompts]
    missing = [name for name in ("normal_states", "abnormal_states", "templates") if not prompts.get(name)]
    if missing:
        msg = f"prompts lacks {', '.join(missing)}: give lists of phrases with {{}} where the name or the state goes."
        raise ValueError(msg)
    return prompts
