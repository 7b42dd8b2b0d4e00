# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""State phrases, templates and the text features made of them.

The ensemble is WinCLIP's compositional one in APRIL-GAN's wording, as the released MVFA uses it: 7 normal and 5
abnormal states times 35 templates, kept in ``prompts.json`` beside this file.
"""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from open_clip import CLIP
from torch import Tensor
from torch.nn import functional

__all__ = ["class_prompts", "encode_states", "published_class_name"]

TEXT_BATCH = 64


@lru_cache(maxsize=1)
def _ensemble() -> dict[str, list[str]]:
    ensemble: dict[str, list[str]] = json.loads(Path(__file__).with_name("prompts.json").read_text(encoding="utf-8"))
    return ensemble


def published_class_name(category: str) -> str:
    """Give the name that MVFA uses in its prompts for a data set.

    Args:
        category: Name of a data set, such as ``"Retina_RESC"``.

    Returns:
        The published name for the six sets of BMAD, otherwise the category with underscores read as spaces.

    Example:
        >>> published_class_name("Retina_RESC")
        'retinal OCT'
        >>> published_class_name("knee_mri")
        'knee mri'
    """
    names: dict[str, str] = _ensemble()["class_names"]  # type: ignore[assignment]
    return names.get(category, category.replace("_", " ").strip())


def class_prompts(class_name: str) -> tuple[list[str], list[str]]:
    """Write the sentences for the two states of a class.

    Args:
        class_name: What the images show, such as ``"Brain"``.

    Returns:
        245 sentences for the normal and 175 for the abnormal state.

    Example:
        >>> normal, abnormal = class_prompts("Brain")
        >>> len(normal), len(abnormal), abnormal[0]
        (245, 175, 'a bad photo of a damaged Brain.')
    """
    ensemble = _ensemble()

    def sentences(states: list[str]) -> list[str]:
        # The name may hold braces, so it is put in by replacement, not by formatting.
        return [
            template.replace("{}", state.replace("{}", class_name))
            for state in states
            for template in ensemble["templates"]
        ]

    return sentences(ensemble["normal_states"]), sentences(ensemble["abnormal_states"])


@torch.no_grad()
def encode_states(clip: CLIP, tokenizer: Callable[[list[str]], Tensor], class_name: str) -> Tensor:
    """Encode the two states of a class with CLIP's text tower.

    Each sentence is encoded and normalised, the sentences of a state are averaged, the mean is normalised again.

    Args:
        clip: open_clip model with a text tower.
        tokenizer: Turns sentences into token ids ``(N, T)``.
        class_name: What the images show.

    Returns:
        Text features ``(E, 2)``: column 0 normal, column 1 abnormal, each of unit length.
    """
    states = []
    for sentences in class_prompts(class_name):
        chunks = [sentences[start : start + TEXT_BATCH] for start in range(0, len(sentences), TEXT_BATCH)]
        features = torch.cat([clip.encode_text(tokenizer(chunk), normalize=True) for chunk in chunks])  # (N, E)
        states.append(functional.normalize(features.mean(dim=0), dim=0))
    return torch.stack(states, dim=1)
