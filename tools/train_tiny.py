# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Train a tiny CLIP on generated images and captions; no real image is used.

    python -m tools.train_tiny --output runs/tiny
    python -m tools.train_tiny --output runs/tiny          # goes on where it was stopped

The package carries the result of such a run as ``tiny``; ``anomalib_mvfa/backbones/README.md`` is its card. Another
result is used with ``--model.backbone runs/tiny/tiny.json --model.pretrained runs/tiny/tiny.safetensors``.

What it learns: whole images match their captions (modality, state, kind, size and place of the lesion), and patches
match sentences for the normal or the abnormal state, after every block, by linear heads that are thrown away. The
sentences of the two states are nearly the same at first, so that their match teaches the patches little; a linear
probe a block, which needs no text, asks the same of them. A second head a block learns the state of the whole image
in the form in which MVFA's detection adapters read it: as the mean over the patches of the probability of the
abnormal state.

What is meant to make it learn on a processor:

* the start is structured: patches are read through a cosine basis, and the heads of the attention begin by looking at
  fixed offsets, at wide surroundings and at the mirror side, through waves in the position embedding;
* most steps see windows of a quarter of the image, where lesions are frequent; the last ones see whole images;
* the table of words stays random: a few hundred words are used.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip import SimpleTokenizer
from open_clip.model import CLIP
from open_clip.transformer import VisionTransformer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import binary_auroc

from anomalib_mvfa.files import replacing
from anomalib_mvfa.model.prompts import class_prompts

from .views import CONFIG, GRID, NAMES, PATCH, SUBJECTS, Batch, ViewDataset, collate

__all__ = ["Settings", "TinyTraining", "export", "initialise_structured", "main", "train"]

CAPTION_STRIDE = 3
"""Every third view is compared with captions: the text tower costs as much as the image tower."""
STATE_SIMILARITY = 0.98
MIXED_KEEP = 0.8
"""What MVFA keeps of the tokens between the levels: half of the steps train with it."""
AVERAGE_DECAY = 0.998
"""Decay of the running average of the weights, which is what is exported."""
HELD_OUT_SEED = 10**9
HELD_OUT = 192

# The network


def _cosine_filters(count: int) -> Tensor:
    """Return patch filters ``(count, 3, PATCH, PATCH)``: grey in the whole cosine basis, two colour differences."""
    axis = torch.arange(PATCH, dtype=torch.float32)
    basis = torch.cos(math.pi / PATCH * (axis + 0.5)[None] * axis[:, None]) * (2 / PATCH) ** 0.5
    basis[0] *= 0.5**0.5
    order = sorted(((u, v) for u in range(PATCH) for v in range(PATCH)), key=lambda uv: (sum(uv), max(uv)))
    grey, red, blue = torch.tensor([1, 1, 1]) / 3, torch.tensor([1, -0.5, -0.5]), torch.tensor([-0.5, -0.5, 1])
    chosen = [(u, v, grey) for u, v in order]
    chosen += [(u, v, colour) for u, v in order[: (count - len(chosen)) // 2] for colour in (red, blue)]
    # High frequencies are weak in images, so they are amplified.
    return torch.stack(
        [
            colour[:, None, None] * basis[u][:, None] * basis[v][None] * min(0.25 * (1 + u + v), 1.5)
            for u, v, colour in chosen
        ],
    )


def _frequencies(count: int) -> Tensor:
    """Return the frequencies of `count` channels: sine and cosine of rows, then of columns."""
    return torch.arange(1, count // 4 + 1) * (math.pi / GRID)


def _waves(count: int) -> Tensor:
    """Return the waves of every grid position ``(GRID * GRID, count)``."""
    centred = torch.arange(GRID) - (GRID - 1) / 2
    phase = _frequencies(count) * centred[:, None]
    waves = torch.stack([phase.cos(), phase.sin()], dim=-1).flatten(1)  # (GRID, count / 2)
    return torch.cat([waves[:, None].expand(-1, GRID, -1), waves[None].expand(GRID, -1, -1)], dim=-1).flatten(0, 1)


def _looks(
    count: int,
    row: float = 0,
    column: float = 0,
    gain: float = 1,
    reach: float = 0,
    mirror: bool = False,
) -> Tensor:
    """Return a query matrix that turns the waves, so that a head looks elsewhere.

    Args:
        count: Channels of the waves.
        row: Offset in patches.
        column: Offset in patches.
        gain: Sharpness; 0 looks everywhere.
        reach: Damping of the short waves, which widens the view.
        mirror: Whether to look at the other side of the image.
    """
    query = torch.zeros(count, count)
    frequencies = _frequencies(count)
    damping = gain * torch.exp(-0.5 * (reach * frequencies) ** 2)
    for half, shift in enumerate((row, column)):
        for index, frequency in enumerate(frequencies.tolist()):
            cos, sin = math.cos(frequency * shift), math.sin(frequency * shift)
            turn = torch.tensor([[1.0, 0.0], [0.0, -1.0]] if mirror and half else [[cos, -sin], [sin, cos]])
            start = half * count // 2 + 2 * index
            query[start : start + 2, start : start + 2] = damping[index] * turn
    return query


@torch.no_grad()
def initialise_structured(visual: VisionTransformer, seed: int = 0) -> None:
    """Initialise an image tower so that it learns fast, in place.

    The first `head_width` channels of a token hold waves of its row and column, the others its patch in a cosine basis.
    Queries turn the waves, so that a head looks at an offset; the sum of many waves is narrow, that of few is wide.

    Args:
        visual: Tower of `CONFIG`.
        seed: Seed of what stays random.
    """
    generator = torch.Generator().manual_seed(seed)
    width = visual.conv1.out_channels
    place = width // visual.transformer.resblocks[0].attn.num_heads

    def noise(*shape: int, std: float) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    visual.conv1.weight.zero_()
    visual.conv1.weight[place:] = _cosine_filters(width - place)
    visual.positional_embedding.copy_(noise(*visual.positional_embedding.shape, std=0.01))
    visual.positional_embedding[1:] += noise(width, std=0.12)  # a constant part: the adapters have no bias
    visual.positional_embedding[1:, :place] += 0.35 * _waves(place)
    visual.class_embedding.copy_(noise(width, std=0.3))

    cross = [_looks(place, *offset) for offset in ((0, 1), (0, -1), (1, 0), (-1, 0))]
    far = [_looks(place, *offset, gain=0.9, reach=0.4) for offset in ((0, 2), (0, -2), (2, 0), (-2, 0))]
    near, wide = _looks(place, gain=1.2, reach=0.8), _looks(place, gain=1, reach=1.6)
    around = [near, _looks(place, mirror=True, gain=1, reach=0.7), wide, _looks(place, gain=0)]
    for block, queries in zip(visual.transformer.resblocks, (cross, around, far, around), strict=True):
        query, key, value = block.attn.in_proj_weight.chunk(3)
        query.copy_(noise(width, width, std=0.02))
        key.copy_(noise(width, width, std=0.02))
        value.copy_(noise(width, width, std=width**-0.5))
        value[:, :place] *= 0.2
        for index, matrix in enumerate(queries):
            query[index * place : (index + 1) * place, :place] += matrix
            key[index * place : (index + 1) * place, :place] += torch.eye(place)
        block.attn.out_proj.weight.copy_(noise(width, width, std=0.3 * width**-0.5))
        block.mlp.c_fc.weight.copy_(noise(*block.mlp.c_fc.weight.shape, std=width**-0.5))
        block.mlp.c_proj.weight.copy_(noise(*block.mlp.c_proj.weight.shape, std=0.2 * width**-0.5))
    visual.proj.copy_(noise(*visual.proj.shape, std=width**-0.5))


@torch.no_grad()
def initialise_text(clip: CLIP, seed: int = 0) -> None:
    """Initialise a text tower so that the words of a sentence reach its end, in place.

    Args:
        clip: Model of `CONFIG`.
        seed: Seed of the values.
    """
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(clip.token_embedding.weight, std=0.5, generator=generator)
    nn.init.normal_(clip.positional_embedding, std=0.05, generator=generator)
    for name, weight in clip.transformer.named_parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5, generator=generator)
            if name.endswith("in_proj_weight"):
                weight[: 2 * weight.shape[1]] *= 0.3  # even attention


def block_tokens(visual: VisionTransformer, images: Tensor, positions: Tensor, keep: float = 1.0) -> list[Tensor]:
    """Run the tower over windows of images.

    Args:
        visual: The tower.
        images: ``(B, 3, n, n)`` in [0, 1].
        positions: ``(B, P)``, the place of each patch in the tower's grid.
        keep: Factor on the tokens between the blocks, as MVFA applies it beside its adapters.

    Returns:
        Tokens ``(B, 1 + P, D)`` after each block, the class token first.
    """
    patches = visual.conv1(images).flatten(2).transpose(1, 2)  # (B, P, D)
    patches = patches + visual.positional_embedding[1:][positions]
    start = (visual.class_embedding + visual.positional_embedding[0]).expand(len(images), 1, -1)
    tokens = visual.ln_pre(torch.cat([start, patches], dim=1))
    outputs = []
    for block in visual.transformer.resblocks:
        # open_clip up to 2.24 attends over (L, B, D), later releases over (B, L, D).
        tokens = block(tokens) if block.attn.batch_first else block(tokens.transpose(0, 1)).transpose(0, 1)
        outputs.append(tokens)
        tokens = keep * tokens
    return outputs


@dataclass(frozen=True)
class Settings:
    """How to train.

    Args:
        steps: Optimiser steps in all.
        batch: Views a step while they are windows; whole images come in a quarter of that.
        window: Side of a window in patches.
        views: Views of each phantom.
        final: Share of the steps at the end that sees whole images.
        learning_rate: Step size of AdamW.
        seed: Seed of everything.
        start: Weights to start from instead of the structured start.
        freeze_text: Whether the text tower stays as it starts: that of exported weights, whose texts are close.
        bfloat16: Whether a processor computes in bfloat16, as a GPU does.
        keep_start: Share of the start in what is exported, with ``start``. Weights between those before and after a
            fine-tuning keep more of what the former can do on other images (Wortsman et al. 2022, arXiv 2109.01903).
    """

    steps: int = 4000
    batch: int = 32
    window: int = 7
    views: int = 4
    final: float = 0.4
    learning_rate: float = 1e-3
    seed: int = 0
    start: Path | None = None
    freeze_text: bool = False
    bfloat16: bool = False
    keep_start: float = 0.0

    @property
    def window_steps(self) -> int:
        """Steps before whole images begin."""
        return round(self.steps * (1 - self.final))

    def rate(self, step: int) -> float:
        """Return the factor on the step size: a rise over 200 steps, then half a cosine."""
        return min(1.0, (step + 1) / 200) * (1 + math.cos(math.pi * min(step / self.steps, 1))) / 2


class TinyTraining(nn.Module):
    """The tiny CLIP with one linear head a block, and its loss.

    Args:
        settings: Only the seed is used.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        torch.manual_seed(settings.seed)
        self.clip = CLIP(**CONFIG)
        initialise_structured(self.clip.visual, settings.seed)
        initialise_text(self.clip, settings.seed)
        if settings.start is not None:
            weights = {name: value.float() for name, value in load_file(settings.start).items()}
            self.clip.load_state_dict({**self.clip.state_dict(), **weights})
        nn.init.constant_(self.clip.logit_scale, math.log(100 if settings.freeze_text else 20))
        self.clip.requires_grad_(requires_grad=not settings.freeze_text)
        self.clip.visual.requires_grad_(requires_grad=True)
        self.clip.token_embedding.requires_grad_(requires_grad=False)
        vision = CONFIG["vision_cfg"]
        # Of the form of MVFA's adapters: what they can read is what is asked of the tokens.
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(vision["width"], CONFIG["embed_dim"], bias=False), nn.LeakyReLU())
            for _ in range(vision["layers"])
        )
        self.probes = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(vision["width"]), nn.Linear(vision["width"], 1)) for _ in range(vision["layers"])
        )
        # As MVFA's detection adapters: each patch says whether the image is abnormal, wherever the lesion is.
        self.image_heads = deepcopy(self.heads)
        self.tokenizer = SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])

    def encode(self, sentences: Sequence[str]) -> Tensor:
        """Encode sentences: ``(N, E)`` of unit length."""
        ids = self.tokenizer(list(sentences)).to(self.clip.logit_scale.device)
        features: Tensor = self.clip.encode_text(ids, normalize=True)
        return features

    def states(self, modalities: Tensor, rng: np.random.Generator, sentences: int = 1) -> Tensor:
        """Encode the two states of each image's modality by random sentences of MVFA's prompts.

        Args:
            modalities: ``(B,)``.
            rng: Chooses names and sentences.
            sentences: Sentences a state.

        Returns:
            ``(B, E, 2)``: normal, abnormal, of unit length.
        """
        present, index = modalities.unique(return_inverse=True)
        chosen = []
        for modality in present.tolist():
            for state in class_prompts(str(rng.choice(NAMES[SUBJECTS[modality]]))):
                chosen += [state[i] for i in rng.choice(len(state), sentences, replace=False)]
        features = self.encode(chosen).unflatten(0, (len(present), 2, sentences)).mean(2)
        return functional.normalize(features, dim=-1).transpose(1, 2)[index]

    def patch_logits(
        self, batch: Batch, states: Tensor, keep: float = 1.0
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
        """Compare patches with the two states.

        Args:
            batch: Views.
            states: ``(B, E, 2)``.
            keep: As for `block_tokens`.

        Returns:
            Logits ``(B, P)`` of the abnormal state after each block by the heads, then by CLIP's own projection;
            logits ``(B, P)`` after each block by the probes; logits ``(B, P)`` of the image's state as each patch shows
            it, after each block; image embeddings ``(B, E)`` of unit length.
        """
        visual = self.clip.visual
        outputs = block_tokens(visual, batch.images, batch.positions, keep)
        final = visual.ln_post(outputs[-1]) @ visual.proj
        axis = self.clip.logit_scale.exp() * (states[..., 1] - states[..., 0])[..., None]  # (B, E, 1)

        def margin(hidden: Tensor) -> Tensor:
            return (functional.normalize(hidden[:, 1:], dim=-1) @ axis)[..., 0]  # (B, P)

        logits = [margin(head(tokens)) for head, tokens in zip(self.heads, outputs, strict=True)]
        probed = [probe(tokens[:, 1:])[..., 0] for probe, tokens in zip(self.probes, outputs, strict=True)]
        whole = [margin(head(tokens)) for head, tokens in zip(self.image_heads, outputs, strict=True)]
        return [*logits, margin(final)], probed, whole, functional.normalize(final[:, 0], dim=-1)

    def forward(self, batch: Batch, rng: np.random.Generator) -> dict[str, Tensor]:
        """Compute the terms of the loss.

        Args:
            batch: Views.
            rng: Chooses sentences.

        Returns:
            ``patch``, ``probe`` and ``image``, each the mean over the blocks, and ``caption``. Half of the calls, by
            ``rng``, multiply the tokens between the blocks by `MIXED_KEEP`.
        """
        keep = MIXED_KEEP if rng.uniform() < 0.5 else 1.0
        logits, probed, whole, images = self.patch_logits(batch, self.states(batch.modalities, rng), keep)
        patch = torch.stack([patch_loss(level, batch.targets) for level in logits]).mean()
        probe = torch.stack([patch_loss(level, batch.targets) for level in probed]).mean()
        abnormal = (batch.targets.sum(1) > 0.25).float()
        image = torch.stack([image_loss(level, abnormal) for level in whole]).mean()
        captions = batch.captions[::CAPTION_STRIDE]
        unique = sorted(set(captions))
        own = torch.tensor([unique.index(caption) for caption in captions], device=images.device)
        similarity = self.clip.logit_scale.exp() * images[::CAPTION_STRIDE] @ self.encode(unique).T  # (B, U)
        to_image = (similarity.T.log_softmax(1) * functional.one_hot(own, len(unique)).T).sum(1)
        to_image = to_image / torch.bincount(own, minlength=len(unique))
        caption = functional.cross_entropy(similarity, own) - to_image.mean()
        return {"patch": patch, "probe": probe, "image": image, "caption": caption / 2}


LOSS_WEIGHTS = {"patch": 0.5, "probe": 1.0, "image": 1.5, "caption": 0.1}


def patch_loss(margin: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with the share of lesion in each patch, plus Dice over the batch.

    Args:
        margin: ``(B, P)``, logit of the abnormal state.
        targets: ``(B, P)`` in [0, 1].
    """
    margin = margin.float()
    entropy = functional.binary_cross_entropy_with_logits(margin, targets, pos_weight=margin.new_tensor(2.0))
    abnormal = margin.sigmoid()
    dice = 1 - (2 * (abnormal * targets).sum() + 1) / (abnormal.sum() + targets.sum() + 1)
    return entropy + 0.5 * dice


def image_loss(margin: Tensor, abnormal: Tensor) -> Tensor:
    """Cross-entropy of the mean probability of the patches, as MVFA scores an image, and of each patch by itself.

    Args:
        margin: ``(B, P)``, logit of the abnormal state of the image.
        abnormal: ``(B,)`` in {0, 1}.
    """
    margin = margin.float()
    mean = margin.sigmoid().mean(1).clamp(1e-4, 1 - 1e-4)
    each = functional.binary_cross_entropy_with_logits(margin, abnormal[:, None].expand_as(margin))
    return (functional.binary_cross_entropy(mean, abnormal) + each) / 2


# The run


@torch.no_grad()
def evaluate(training: TinyTraining, batch: Batch) -> dict[str, float]:
    """Measure the accuracy on held-out images without adapters.

    Args:
        training: The network.
        batch: Whole images.

    Returns:
        AUROC of patches by each block's head, by CLIP's own projection and by the last probe; of images by each block
        and by their sum; and the accuracy of the modality.
    """
    training.eval()
    rng = np.random.default_rng(0)
    states = training.states(batch.modalities, rng, sentences=12)
    margins, probed, whole, images = training.patch_logits(batch, states, MIXED_KEEP)
    truth = batch.targets > 0.5
    scores = [level.sigmoid().mean(1) for level in whole]
    names = training.encode([f"a {NAMES[modality][0]}" for modality in SUBJECTS])
    result = {f"patch_auroc_{index}": float(binary_auroc(m, truth.long())) for index, m in enumerate(margins, start=1)}
    result["probe_auroc"] = float(binary_auroc(probed[-1], truth.long()))
    result |= {f"image_auroc_{i}": float(binary_auroc(s, truth.any(1).long())) for i, s in enumerate(scores, start=1)}
    result["image_auroc"] = float(binary_auroc(torch.stack(scores).sum(0), truth.any(1).long()))
    result["modality_accuracy"] = float(((images @ names.T).argmax(1) == batch.modalities).float().mean())
    training.train()
    return result


@torch.no_grad()
def bring_texts_together(clip: CLIP, similarity: float = STATE_SIMILARITY) -> None:
    """Add a common part to all text features, in place, until the two states are as alike as wanted.

    Sentences that say "normal" and "abnormal" of the same organ are nearly the same to a CLIP of full size. To a tiny
    one they are not, and MVFA, which multiplies similarities by 100, then starts with probabilities of 0 and 1 that
    teach its adapters nothing: whole levels stay dead.

    Args:
        clip: Model of `CONFIG`.
        similarity: Mean cosine of the features of the two states over the modalities.
    """
    tokenizer = SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])
    states = [[sentences[::10] for sentences in class_prompts(names[0])] for names in NAMES.values()]
    ids = tokenizer([sentence for pair in states for sentences in pair for sentence in sentences])
    counts = [len(sentences) for pair in states for sentences in pair]
    ends: list[Tensor] = []
    handle = clip.ln_final.register_forward_hook(lambda _module, _inputs, output: ends.append(output))
    clip.encode_text(ids.to(clip.logit_scale.device))
    handle.remove()
    hidden = ends[0] if len(ends[0]) == len(ids) else ends[0].transpose(0, 1)
    hidden = hidden[torch.arange(len(ids)), ids.argmax(dim=-1)]  # (N, W), at the end of each sentence
    common = hidden.mean(dim=0)

    def found(share: float) -> float:
        features = functional.normalize((hidden + share * common) @ clip.text_projection, dim=-1)
        means = torch.stack([part.mean(dim=0) for part in features.split(counts)])
        return float(functional.cosine_similarity(means[0::2], means[1::2]).mean())

    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if found(middle) < similarity else (low, middle)
    clip.ln_final.bias += low * common


def export(clip: CLIP, path: Path, start: Path | None = None, keep_start: float = 0.0) -> Path:
    """Write the weights in half precision, as the package carries them, with `bring_texts_together`.

    Args:
        clip: Model of `CONFIG`; it is left as it is.
        path: File to write.
        start: Weights to blend in.
        keep_start: Their share.

    Returns:
        The path.
    """
    clip = deepcopy(clip)
    if start is not None and keep_start:
        own = clip.state_dict()
        blended = {
            name: torch.lerp(own[name], value.to(own[name]), keep_start) for name, value in load_file(start).items()
        }
        clip.load_state_dict({**own, **blended})
    bring_texts_together(clip)
    state = {name: value.detach().half().cpu().contiguous() for name, value in clip.state_dict().items()}
    state = {name: value for name, value in state.items() if name != "attn_mask"}
    with replacing(path) as partial:
        save_file(state, partial, metadata={"format": "pt"})
    return path


def _batches(settings: Settings, step: int, seen: int, workers: int) -> Iterator[tuple[int, Batch]]:
    """Yield the batches from a step on, with the number of phantoms generated so far."""
    phases = (
        (settings.window_steps, settings.window, settings.batch, settings.views),
        (settings.steps, GRID, settings.batch // 4, 2),  # as many patches a step, of more phantoms
    )
    for end, window, size, views in phases:
        group = size // views
        if step >= end:
            continue
        loader = DataLoader(
            ViewDataset(settings.seed, views, window),
            batch_sampler=[list(range(seen + i * group, seen + (i + 1) * group)) for i in range(end - step)],
            num_workers=workers,
            collate_fn=collate,
            prefetch_factor=4 if workers else None,
        )
        for batch in loader:
            seen += group
            yield seen, batch
        step = end


def train(
    settings: Settings,
    output: Path,
    device: torch.device,
    workers: int = 1,
    save_every: int = 200,
) -> Path:
    """Train, or go on with a training that was stopped.

    Args:
        settings: How to train.
        output: Folder for ``tiny.json``, ``checkpoint.pt``, ``history.json`` and ``tiny.safetensors``.
        device: Where to compute; bfloat16 on a GPU.
        workers: Processes that generate images.
        save_every: Steps between checkpoints.

    Returns:
        The weights file.
    """
    output.mkdir(parents=True, exist_ok=True)
    (output / "tiny.json").write_text(json.dumps(CONFIG, indent=1), encoding="utf-8")
    training = TinyTraining(settings).to(device)
    decayed = [p for p in training.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in training.parameters() if p.requires_grad and p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
    )
    averaged = AveragedModel(training, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY))
    step, seen = 0, 0
    history: list[dict[str, float]] = []
    means: dict[str, float] = {}
    checkpoint = output / "checkpoint.pt"
    if checkpoint.is_file():
        saved: dict[str, Any] = torch.load(checkpoint, map_location=device, weights_only=True)
        training.load_state_dict(saved["training"])
        averaged.load_state_dict(saved["averaged"])
        optimizer.load_state_dict(saved["optimizer"])
        step, seen, history, means = (saved[name] for name in ("step", "seen", "history", "means"))
    held_out = collate([ViewDataset(HELD_OUT_SEED, 1)[index] for index in range(HELD_OUT)])
    held_out = _to(held_out, device)

    def save() -> None:
        history.append({"step": step, "seen": seen, **means, **evaluate(averaged.module, held_out)})
        state = {
            "training": training.state_dict(),
            "averaged": averaged.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "seen": seen,
            "history": history,
            "means": means,
        }
        with replacing(checkpoint) as partial:
            torch.save(state, partial)
        (output / "history.json").write_text(json.dumps(history, indent=1), encoding="utf-8")
        export(averaged.module.clip, output / "tiny.safetensors", settings.start, settings.keep_start)
        progress.console.print(" ".join(f"{k} {v:.4g}" for k, v in history[-1].items()))

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stdout.isatty()) as progress:
        bar = progress.add_task("Training", total=settings.steps, completed=step)
        if step == 0:
            save()
        for count, cpu_batch in _batches(settings, step, seen, workers):
            seen = count
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * settings.rate(step)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" or settings.bfloat16):
                terms = training(_to(cpu_batch, device), np.random.default_rng((settings.seed, step)))
            loss = torch.stack([weight * terms[name] for name, weight in LOSS_WEIGHTS.items()]).sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(training.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                training.clip.logit_scale.clamp_(max=math.log(100))
            averaged.update_parameters(training)
            step += 1
            for name, value in terms.items():
                means[name] = 0.98 * means.get(name, float(value.detach())) + 0.02 * float(value.detach())
            progress.update(
                bar, completed=step, description=f"probe {means['probe']:.3f} caption {means['caption']:.2f}"
            )
            if step % save_every == 0 or step == settings.steps:
                save()
    return output / "tiny.safetensors"


def _to(batch: Batch, device: torch.device) -> Batch:
    return Batch(
        batch.images.to(device),
        batch.targets.to(device),
        batch.positions.to(device),
        batch.modalities.to(device),
        batch.captions,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train from the command line."""
    default = Settings()
    parser = argparse.ArgumentParser(description="Train the tiny CLIP on generated images.")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; an existing run goes on")
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--batch", type=int, default=default.batch, help="views a step")
    parser.add_argument("--views", type=int, default=default.views, help="views of each phantom")
    parser.add_argument("--learning_rate", type=float, default=default.learning_rate)
    parser.add_argument("--final", type=float, default=default.final, help="share of the steps on whole images")
    parser.add_argument("--start", type=Path, help="weights to start from, such as the embedded ones")
    parser.add_argument("--keep_start", type=float, default=default.keep_start, help="its share in what is exported")
    parser.add_argument("--freeze_text", action="store_true", help="leave the text tower as it starts")
    parser.add_argument("--bfloat16", action="store_true", help="on a processor that is faster so")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--workers", type=int, default=1, help="processes that generate images")
    parser.add_argument("--save_every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = vars(parser.parse_args(arguments))
    output, device = options.pop("output"), torch.device(options.pop("device"))
    workers, save_every = options.pop("workers"), options.pop("save_every")
    path = train(Settings(**options), output, device, workers, save_every)
    print(f"Weights: {path}")


if __name__ == "__main__":
    main()
