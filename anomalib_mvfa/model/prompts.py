# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""State phrases, templates and the text features made of them.

The ensemble is WinCLIP's compositional one with APRIL-GAN's sentences, as the released MVFA uses it: 7 normal and 5
abnormal states times 35 templates, kept in ``prompts.json`` beside this file.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from open_clip import CLIP
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from anomalib_mvfa.files import replacing

__all__ = ["cache_dir", "class_prompts", "encode_states", "prompt_ensemble", "prompt_name", "published_class_names"]

logger = logging.getLogger(__name__)

TEXT_BATCH = 64
ENSEMBLE: dict[str, Any] = json.loads(Path(__file__).with_name("prompts.json").read_text(encoding="utf-8"))


def prompt_ensemble() -> dict[str, list[str]]:
    """Return the parts of all prompts: ``normal_states``, ``abnormal_states`` and ``templates``."""
    return {name: list(ENSEMBLE[name]) for name in ("normal_states", "abnormal_states", "templates")}


def published_class_names() -> dict[str, str]:
    """Return the published prompt names of the six sets of BMAD, by set name in lower case."""
    return {category.lower(): name for category, name in ENSEMBLE["class_names"].items()}


def prompt_name(category: str) -> str:
    """Return the name of a data set such as ``"Retina_RESC"`` in the prompts; a trailing ``_AD`` is not read.

    It is the published name for the six sets of BMAD, in any letter case. Another name is split at underscores, hyphens
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


def class_prompts(class_name: str, ensemble: Mapping[str, Sequence[str]] | None = None) -> tuple[list[str], list[str]]:
    """Format the sentences for the two states of a class.

    Args:
        class_name: What the images show, such as ``"Brain"``.
        ensemble: The lists ``normal_states``, ``abnormal_states`` and ``templates``, whose entries hold ``{}`` where
            the name or the state goes. Defaults to those of the released MVFA.

    Example:
        >>> normal, abnormal = class_prompts("Brain")
        >>> len(normal), len(abnormal), abnormal[0]
        (245, 175, 'a bad photo of a damaged Brain.')
    """
    ensemble = ENSEMBLE if ensemble is None else ensemble

    def sentences(states: Sequence[str]) -> list[str]:
        # The name may contain braces, which formatting would interpret.
        return [
            template.replace("{}", state.replace("{}", class_name))
            for state in states
            for template in ensemble["templates"]
        ]

    return sentences(ensemble["normal_states"]), sentences(ensemble["abnormal_states"])


@torch.no_grad()
def encode_states(clip: CLIP, tokenizer: Callable[[list[str]], Tensor], class_name: str) -> Tensor:
    """Encode the two states of a class with CLIP's text tower.

    Each sentence is encoded and normalised, the sentences of a state are averaged, the mean is normalised again:
    ``(E, 2)``, normal and abnormal. It is kept on disk (:func:`cache_dir`), under a digest of text tower and tokens.
    """
    tokens = [tokenizer(sentences) for sentences in class_prompts(class_name)]  # (N, T) a state
    path = cache_dir() / "text_features" / f"{_digest(clip, tokens)}.safetensors"
    kept = _read_features(path)
    if kept is not None:
        return kept
    states = []
    for sentences in tokens:
        features = torch.cat([clip.encode_text(chunk, normalize=True) for chunk in sentences.split(TEXT_BATCH)])
        states.append(functional.normalize(features.mean(dim=0), dim=0))
    text_features = torch.stack(states, dim=1)
    try:
        with replacing(path) as partial:
            save_file({"text_features": text_features.contiguous()}, partial)
    except OSError as error:
        logger.debug("Text features are not kept: %s", error)
    return text_features


def cache_dir() -> Path:
    """Return the folder of kept features: ``ANOMALIB_MVFA_CACHE``, or ``anomalib_mvfa`` in the user's cache."""
    own = os.environ.get("ANOMALIB_MVFA_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anomalib_mvfa"


def _digest(clip: CLIP, tokens: Sequence[Tensor]) -> str:
    """Digest what text features depend on: weights and activations of the text tower, and the tokens."""
    digest = hashlib.blake2b(digest_size=16)
    for name, module in clip.named_children():
        if name != "visual":
            digest.update(f"{name} {module!r}".encode())
    for name, value in clip.named_parameters():
        if not name.startswith("visual."):
            digest.update(name.encode())
            digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().data)
    for sentences in tokens:
        digest.update(str(tuple(sentences.shape)).encode() + sentences.contiguous().numpy().data)
    return digest.hexdigest()


def _read_features(path: Path) -> Tensor | None:
    with suppress(OSError, SafetensorError):  # absent or damaged
        return load_file(path).get("text_features")
    return None
