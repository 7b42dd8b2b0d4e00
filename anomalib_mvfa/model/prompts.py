# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""State phrases, templates and the text features made of them.

The ensemble is WinCLIP's compositional one in APRIL-GAN's wording, as the released MVFA uses it: 7 normal and 5
abnormal states times 35 templates, kept in ``prompts.json`` beside this file.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from open_clip import CLIP
from torch import Tensor
from torch.nn import functional

__all__ = ["class_prompts", "encode_states", "prompt_ensemble", "prompt_name", "published_class_names"]

TEXT_BATCH = 64


@lru_cache(maxsize=1)
def _ensemble() -> dict[str, Any]:
    ensemble: dict[str, Any] = json.loads(Path(__file__).with_name("prompts.json").read_text(encoding="utf-8"))
    return ensemble


def prompt_ensemble() -> dict[str, list[str]]:
    """Give what all prompts are made of: ``normal_states``, ``abnormal_states`` and ``templates``."""
    return {name: list(_ensemble()[name]) for name in ("normal_states", "abnormal_states", "templates")}


@lru_cache(maxsize=1)
def published_class_names() -> dict[str, str]:
    """Give the published prompt names of the six sets of BMAD, by set name in lower case."""
    return {category.lower(): name for category, name in _ensemble()["class_names"].items()}


def prompt_name(category: str) -> str:
    """Give the name of a data set in the prompts.

    Args:
        category: Name of a data set, such as ``"Retina_RESC"``. A trailing ``_AD`` is not read.

    Returns:
        The published name for the six sets of BMAD, in any letter case. Another name is split at underscores, hyphens
        and changes of case into lower-case words; abbreviations stay in capitals.

    Example:
        >>> prompt_name("Retina_OCT2017"), prompt_name("Chest_AD"), prompt_name("BrainMRI"), prompt_name("metal_nut")
        ('retinal OCT', 'Chest X-ray film', 'brain MRI', 'metal nut')
    """
    name = re.sub("_AD$", "", category, flags=re.IGNORECASE)
    published = published_class_names().get(name.lower())
    if published is not None:
        return published
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[_\-\s]+", " ", name).split()
    return " ".join(word if word.isupper() else word.lower() for word in words)


def class_prompts(
    class_name: str,
    ensemble: Mapping[str, Sequence[str]] | None = None,
) -> tuple[list[str], list[str]]:
    """Write the sentences for the two states of a class.

    Args:
        class_name: What the images show, such as ``"Brain"``.
        ensemble: The lists ``normal_states``, ``abnormal_states`` and ``templates``, whose entries hold ``{}`` where
            the name or the state goes. Defaults to those of the released MVFA.

    Returns:
        The sentences for the normal and for the abnormal state, of the released ensemble 245 and 175.

    Example:
        >>> normal, abnormal = class_prompts("Brain")
        >>> len(normal), len(abnormal), abnormal[0]
        (245, 175, 'a bad photo of a damaged Brain.')
    """
    ensemble = _ensemble() if ensemble is None else ensemble

    def sentences(states: Sequence[str]) -> list[str]:
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
