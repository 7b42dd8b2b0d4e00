# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""PyTorch model of MVFA: images in, anomaly maps and scores out.

Read :meth:`MVFAModel.forward` first: adapt the tokens of a frozen CLIP at several levels, compare the hidden vectors
with text (language branch) and with normal patches (memory branch), fuse the two.

Paper:
    Adapting Visual-Language Models for Generalizable Anomaly Detection in Medical Images (CVPR 2024),
    https://arxiv.org/abs/2403.12570
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from anomalib.data import InferenceBatch
from open_clip import CLIP
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as image_functional

from anomalib_mvfa.backbones.loading import fingerprint, load_clip, resolve_backbone
from anomalib_mvfa.backbones.towers import image_tower

from .adapters import ResidualAdapter
from .alignment import abnormal_map, abnormal_score, patch_windows, state_logits, upsample
from .fusion import Fusion
from .memory import MemoryBank, Support, bank_distance
from .prompts import encode_states
from .tower import FrozenTower
from .variant import Variant

if TYPE_CHECKING:
    from anomalib_mvfa.training.token_cache import TokenCache

__all__ = ["BranchOutput", "HiddenTokens", "MVFAModel", "SupportOutput"]

logger = logging.getLogger(__name__)


class HiddenTokens(NamedTuple):
    """Hidden vectors of both kinds of adapters, one ``(B, L, E)`` a level, the patches last."""

    segmentation: list[Tensor]
    detection: list[Tensor]


class BranchOutput(NamedTuple):
    """Map ``(B, H, W)`` and score ``(B,)`` of one branch, levels reduced."""

    anomaly_map: Tensor
    score: Tensor


class SupportOutput(NamedTuple):
    """Outputs of the branches for the supports: the normal ones first, each compared with the others.

    ``labels`` ``(K,)`` are true for abnormal supports.
    """

    language: BranchOutput
    memory: BranchOutput
    labels: Tensor


class MVFAModel(nn.Module):
    """Multi-level visual feature adaptation of a frozen CLIP.

    The arguments are those of :class:`~anomalib_mvfa.model.lightning_model.MVFA`.

    Attributes:
        has_masks: Whether the training data had masks. With masks the map comes from the segmentation adapters, and
            in few-shot the image score is the maximum of the fused map. Without masks the segmentation adapters never
            learn, so that map and score come from the detection adapters.
        use_memory: Whether the bank, once built, is used; without it the model is zero-shot.
        text_features: ``(E, 2)``: normal, abnormal.

    Raises:
        ValueError: If backbone, image size, levels or a choice of the variant are unknown or do not fit.
        FileNotFoundError: If the backbone's weights are not there.

    Example:
        >>> model = MVFAModel(backbone="tiny", class_name="Brain").eval()
        >>> prediction = model(torch.rand(2, 3, 112, 112))
        >>> prediction.anomaly_map.shape, prediction.pred_score.shape
        (torch.Size([2, 112, 112]), torch.Size([2]))
    """

    def __init__(
        self,
        backbone: str = "ViT-L-14-336",
        pretrained: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        levels: Sequence[int] | str | None = None,
        class_name: str | None = "object",
        variant: Variant | Mapping[str, Any] | str | None = None,
        language_weight: float = 0.5,
        coreset: float = 1.0,
    ) -> None:
        super().__init__()
        known = resolve_backbone(backbone, pretrained, image_size)
        self.variant = Variant.of(variant).on(published_backbone=known.is_published, normalized=known.normalized)
        self.backbone = resolve_backbone(backbone, pretrained, image_size, self.variant.quick_gelu)
        self.image_size = self.backbone.image_size
        clip, tokenizer = load_clip(self.backbone)
        self.fingerprint = fingerprint(clip.visual)
        normalize = bool(self.variant.normalize_input)
        self.tower = FrozenTower(image_tower(clip.visual), levels, normalize, self.backbone.mean, self.backbone.std)
        self.levels = self.tower.levels
        width, text_width = self.tower.width, self.backbone.model["embed_dim"]
        self.seg_adapters, self.det_adapters = (self._make_adapters(width, text_width) for _ in range(2))
        self.seg_memory = MemoryBank(len(self.levels), coreset)
        self.det_memory = MemoryBank(len(self.levels), coreset)
        self.fusion = Fusion(language_weight)
        self.has_masks = True
        self.use_memory = True
        self.class_name: str | None = None
        self.register_buffer("text_features", torch.zeros(text_width, 2))
        self.text_features: Tensor
        # The text tower is kept, outside the module tree, only until the class is known.
        clip.visual = nn.Identity()
        self._text: tuple[CLIP, Callable[[list[str]], Tensor]] | None = (clip, tokenizer)
        if class_name is not None:
            self.set_class_name(class_name)

    def _make_adapters(self, width: int, text_width: int) -> nn.ModuleList:
        linear = [self.variant.last_level_projector and level == self.levels[-1] for level in self.levels]
        return nn.ModuleList(ResidualAdapter(width, text_width, self.variant.activation, each) for each in linear)

    def reset(self) -> None:
        """Reset to the state of a new object: random adapters, empty banks, unit ranges."""
        for module in (*self.seg_adapters.modules(), *self.det_adapters.modules()):
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        device = self.text_features.device
        for name in ("seg_memory", "det_memory"):
            setattr(self, name, MemoryBank(len(self.levels), self.memory.coreset).to(device))
        self.fusion = Fusion(self.fusion.language_weight).to(device)
        self.has_masks = True

    def set_class_name(self, class_name: str, *, encode: bool = True) -> None:
        """Encode the text features of a class, unless they come with a state dict, and drop the text tower."""
        if encode and class_name != self.class_name:
            self.text_features = self.encode_classes([class_name])[class_name]
        self.class_name, self._text = class_name, None

    @torch.inference_mode(mode=False)  # training may need them later
    def encode_classes(self, class_names: Sequence[str]) -> dict[str, Tensor]:
        """Encode the text features ``(E, 2)`` of several classes, by name; reads a dropped text tower again."""
        clip, tokenizer = self._text or load_clip(self.backbone)
        device = self.text_features.device
        return {name: encode_states(clip, tokenizer, name).to(device) for name in class_names}

    def forward(self, images: Tensor) -> InferenceBatch:
        """Compute anomaly maps and scores.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1], of the model's image size.

        Returns:
            ``anomaly_map`` ``(B, H, W)`` and ``pred_score`` ``(B,)``, both float32 and larger where more abnormal.

        Raises:
            ValueError: If the images have another size.
            RuntimeError: If no class name was given yet.
        """
        return self.fuse(*self.branches(images))

    def branches(self, images: Tensor, text_features: Tensor | None = None) -> tuple[BranchOutput, BranchOutput | None]:
        """Compute both branches of images ``(B, 3, H, W)`` in [0, 1], before they are scaled and fused.

        Text features are ``(B, E, 2)`` when each image has a class of its own; ``None`` takes the model's own. Without
        a bank (zero-shot) the memory branch is ``None``.
        """
        hidden = self.hidden_tokens(images)
        language = self.language_branch(self.map_tokens(hidden), text_features, hidden.detection)
        if self.memory.is_empty or not self.use_memory:
            return language, None
        return language, self.memory_branch(self.map_tokens(hidden), self.memory)

    def fuse(self, language: BranchOutput, memory: BranchOutput | None) -> InferenceBatch:
        """Blend the two branches, or in zero-shot the language branch alone, into maps and scores."""
        anomaly_map, score = language
        if memory is not None:
            anomaly_map = self.fusion(language.anomaly_map, memory.anomaly_map, kind="map")
            score = anomaly_map.amax(dim=(1, 2))
            if not self.has_masks:
                score = self.fusion(language.score, memory.score, kind="score")
        if self.variant.map_blur:
            kernel = 2 * round(3 * self.variant.map_blur) + 1
            anomaly_map = image_functional.gaussian_blur(anomaly_map, [kernel, kernel], [self.variant.map_blur])
        return InferenceBatch(pred_score=score, anomaly_map=anomaly_map)

    def first_level_tokens(self, images: Tensor) -> Tensor:
        """Compute the tokens ``(B, L, D)`` below the first adapters, which no training changes."""
        weight: Tensor = self.seg_adapters[0].fc1[0].weight  # type: ignore[index,union-attr]
        return self.tower.run_stage(self.tower.embed(images.to(weight.dtype)), 0)

    def hidden_tokens(
        self, images: Tensor, frozen_segmentation: Tensor | bool = False, cache: "TokenCache | None" = None
    ) -> HiddenTokens:
        """Run the tower with its adapters, and return the hidden vectors of every level.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1].
            frozen_segmentation: Compute no gradients of the segmentation adapters' weights, as for training images of
                sets without masks; for all images, or ``(B,)`` for those that are true.
            cache: Keeps the tokens below the first adapters.
        """
        tokens = cache(images, self.first_level_tokens) if cache is not None else self.first_level_tokens(images)
        segmentation, detection = [], []
        for stage, (seg_adapter, det_adapter) in enumerate(zip(self.seg_adapters, self.det_adapters, strict=True)):
            if stage:
                tokens = self.tower.run_stage(tokens, stage)
            last = stage == len(self.levels) - 1  # nothing reads what would be mixed behind it
            seg_hidden, seg_output = seg_adapter(tokens, frozen_segmentation, last)
            det_hidden, det_output = det_adapter(tokens, last=last)
            segmentation.append(seg_hidden)
            detection.append(det_hidden)
            if not last:
                tokens = self._mix(tokens, seg_output, det_output)
        return HiddenTokens(segmentation, detection)

    def _mix(self, tokens: Tensor, seg_output: Tensor, det_output: Tensor) -> Tensor:
        """Compute the input of the next stage: ``0.8 x + 0.1 seg + 0.1 det`` as released."""
        if self.variant.residual_norm:
            length = tokens.norm(dim=-1, keepdim=True)
            seg_output = nn.functional.normalize(seg_output, dim=-1) * length
            det_output = nn.functional.normalize(det_output, dim=-1) * length
        keep, seg_share, det_share = self.variant.residual
        return keep * tokens + seg_share * seg_output + det_share * det_output

    def map_tokens(self, hidden: HiddenTokens) -> list[Tensor]:
        """Return the hidden vectors that the map is made from: segmentation with masks, detection without."""
        return hidden.segmentation if self.has_masks else hidden.detection

    @property
    def memory(self) -> MemoryBank:
        """The bank in use, that of segmentation with masks, of detection without."""
        return self.seg_memory if self.has_masks else self.det_memory

    def level_map(self, hidden: Tensor, text_features: Tensor | None = None) -> Tensor:
        """Compute state probabilities ``(B, 2, H, W)`` of one level; arguments and errors of :meth:`level_logits`."""
        with self._full_precision(hidden):
            return abnormal_map(self.level_logits(hidden, text_features), self.tower.grid_size, self.image_size)

    def level_score(self, hidden: Tensor, text_features: Tensor | None = None) -> Tensor:
        """Compute image scores ``(B,)`` of one level; arguments and errors of :meth:`level_logits`."""
        with self._full_precision(hidden):
            return abnormal_score(self.level_logits(hidden, text_features), self.variant.pooling)

    def level_logits(self, hidden: Tensor, text_features: Tensor | None = None) -> Tensor:
        """Compare the patches of one level, last in ``hidden`` ``(B, L, E)``, with text: logits ``(B, P, 2)``, float32.

        Text features are ``(E, 2)`` or ``(B, E, 2)``; ``None`` takes the model's own.

        Raises:
            RuntimeError: If no class name was given yet.
        """
        if text_features is None:
            if self.class_name is None:
                msg = "No class name yet: give class_name, or call set_class_name('Brain'), so that there are prompts."
                raise RuntimeError(msg)
            text_features = self.text_features
        with self._full_precision(hidden):
            return state_logits(self._patches(hidden), text_features.float())

    def _patches(self, hidden: Tensor) -> Tensor:
        patches = hidden[:, self.tower.prefix :].float()
        return patch_windows(patches, self.tower.grid_size, self.variant.window_sizes)

    def language_branch(
        self, hidden: Sequence[Tensor], text_features: Tensor | None = None, scored: Sequence[Tensor] | None = None
    ) -> BranchOutput:
        """Compare the hidden vectors ``(B, L, E)`` of all levels with text, as in :meth:`level_logits`.

        Scores come from the vectors ``scored``; ``None`` takes those of the map.
        """
        maps = torch.stack([self.level_map(tokens, text_features)[:, 1] for tokens in hidden])  # (levels, B, H, W)
        scores = torch.stack([self.level_score(tokens, text_features) for tokens in scored or hidden])  # (levels, B)
        return BranchOutput(self._reduce_levels(maps), self._reduce_levels(scores))

    def memory_branch(
        self, hidden: Sequence[Tensor], bank: MemoryBank, excluded: Sequence[Tensor] | None = None
    ) -> BranchOutput:
        """Compute the distances of all levels from the bank of normal patches.

        Args:
            hidden: One ``(B, L, E)`` a level.
            bank: The bank.
            excluded: For each level ``(B, N)``, true for the entries that an image must not be compared with.
        """
        maps = []
        for level, tokens in enumerate(hidden):
            others = None if excluded is None else excluded[level]
            with self._full_precision(tokens):
                distance = bank_distance(self._patches(tokens), bank[level], others)  # (B, P)
                grid = distance.unflatten(1, self.tower.grid_size).unsqueeze(1)  # (B, 1, h, w)
                maps.append(upsample(grid, self.image_size).squeeze(1))
        stacked = torch.stack(maps)  # (levels, B, H, W)
        scores = stacked.amax(dim=(2, 3)) if self.variant.pooling == "max" else stacked.mean(dim=(2, 3))
        return BranchOutput(self._reduce_levels(stacked), self._reduce_levels(scores))

    def _reduce_levels(self, values: Tensor) -> Tensor:
        return values.sum(dim=0) if self.variant.level_reduction == "sum" else values.mean(dim=0)

    @staticmethod
    def _full_precision(tensor: Tensor) -> "torch.autocast | nullcontext[None]":
        """Disable autocast, so that scores are computed in float32."""
        kind = tensor.device.type
        return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()

    @torch.inference_mode(mode=False)  # the bank outlives the run that builds it
    @torch.no_grad()
    def remember(self, support: Support, batch_size: int = 8) -> SupportOutput | None:
        """Build the memory bank from the normal supports and take the fusion's ranges from all supports.

        A normal support is compared with the entries of the bank that come from the *other* normal supports (from its
        own changed versions when it is the only one), so that its distances are those of an image that is not in the
        bank.

        Args:
            support: Labelled images of the model's image size.
            batch_size: Images in one forward pass.

        Returns:
            Outputs of the branches for the supports; ``None`` if there is nothing to compare a normal one with.
        """
        count = support.normal.shape[1]
        normal = self._map_tokens_of(support.normal.flatten(0, 1), batch_size)  # (V * K, L, E) a level
        # Patches are averaged as those of a query are, so that a remembered image has distance 0.
        prefix = self.tower.prefix
        entries = [torch.cat([tokens[:, :prefix].float(), self._patches(tokens)], dim=1) for tokens in normal]
        kept = self.memory.remember(entries)
        sources = [positions // tokens.shape[1] for positions, tokens in zip(kept, normal, strict=True)]  # (N,) a level
        outputs: list[tuple[BranchOutput, BranchOutput]] = []
        for index in range(count):
            own = [(source == index) if count == 1 else (source % count == index) for source in sources]
            if any(bool(mask.all()) for mask in own):
                continue
            unchanged = [tokens[index : index + 1] for tokens in normal]  # (1, L, E)
            excluded = [mask.unsqueeze(0) for mask in own]
            outputs.append((self.language_branch(unchanged), self.memory_branch(unchanged, self.memory, excluded)))
        if not outputs:
            return None
        normal_count = len(outputs)
        if len(support.abnormal):
            abnormal = self._map_tokens_of(support.abnormal, batch_size)
            outputs.append((self.language_branch(abnormal), self.memory_branch(abnormal, self.memory)))
        self.set_fusion_range(outputs)
        language, memory = (
            BranchOutput(*(torch.cat(field) for field in zip(*branch, strict=True)))
            for branch in zip(*outputs, strict=True)
        )
        position = torch.arange(len(language.score), device=language.score.device)
        return SupportOutput(language, memory, position >= normal_count)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def set_fusion_range(self, outputs: Sequence[tuple[BranchOutput, BranchOutput]]) -> None:
        """Take the fusion's ranges from language and memory branch of some images, one pair a batch."""
        self.fusion.fit(
            **{
                f"{branch}_{kind}": torch.cat([getattr(pair[index], field).flatten() for pair in outputs])
                for index, branch in enumerate(("language", "memory"))
                for kind, field in (("map", "anomaly_map"), ("score", "score"))
            }
        )

    def _map_tokens_of(self, images: Tensor, batch_size: int) -> list[Tensor]:
        device = self.text_features.device
        batches = [self.map_tokens(self.hidden_tokens(batch.to(device))) for batch in images.split(batch_size)]
        return [torch.cat(level) for level in zip(*batches, strict=True)]
