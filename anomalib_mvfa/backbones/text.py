# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Text towers of Hugging Face's transformers, and tokenizers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
from open_clip.tokenizer import get_clean_fn
from torch import Tensor

__all__ = ["LOCAL_DIR_PREFIX", "make_tokenizer", "text_settings"]

LOCAL_DIR_PREFIX = "local-dir:"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def text_settings(text: dict[str, Any], backbone: str, folder: Path | None) -> None:
    """Let a text tower of transformers be built from the backbone's own files, without pretrained weights of its own.

    ``text`` is ``text_cfg`` of open_clip's configuration and changed in place.

    Raises:
        FileNotFoundError: If the text tower's configuration is missing.
        ModuleNotFoundError: If transformers is not installed.
    """
    name = text.get("hf_model_name")
    if name is None:
        return
    _require_transformers(backbone)
    text["hf_model_pretrained"] = False  # CLIP's weights contain the text tower's
    config = None if folder is None else folder / "config.json"
    if config is not None and config.is_file() and "model_type" in json.loads(config.read_text(encoding="utf-8")):
        text["hf_model_name"] = str(folder)
    elif backbone.startswith(LOCAL_DIR_PREFIX):
        msg = f"{config} is missing: expected the configuration of the text tower '{name}' from the hub."
        raise FileNotFoundError(msg)
    else:
        _load("configuration of the text tower", name, "AutoConfig")


def make_tokenizer(text: dict[str, Any], backbone: str, folder: Path | None) -> Callable[[list[str]], Tensor]:
    """Return the tokenizer, from texts to token ids ``(N, T)``, that a text tower was trained with.

    Raises:
        FileNotFoundError: If the tokenizer is missing.
        ModuleNotFoundError: If transformers is needed and not installed.
        ValueError: If the tokenizer has more tokens than the text tower.
    """
    length = text.get("context_length", 77)
    options = text.get("tokenizer_kwargs") or {}
    name = text.get("hf_tokenizer_name") or text.get("hf_model_name")
    if name is None:
        tokenizer: Callable[[list[str]], Tensor] = open_clip.SimpleTokenizer(context_length=length, **options)
        return tokenizer
    _require_transformers(backbone)
    source = name
    if folder is not None and all((folder / file).is_file() for file in TOKENIZER_FILES):
        source = str(folder)
    elif backbone.startswith(LOCAL_DIR_PREFIX):
        msg = f"{folder} lacks the tokenizer '{name}': expected its files {' and '.join(TOKENIZER_FILES)}."
        raise FileNotFoundError(msg)
    words = _load("tokenizer", source, "AutoTokenizer")
    vocabulary = text.get("vocab_size", 49408)
    if "hf_model_name" in text:
        vocabulary = _load("configuration of the text tower", text["hf_model_name"], "AutoConfig").vocab_size
    if len(words) > vocabulary:
        msg = (
            f"The tokenizer of {source} has {len(words)} tokens, but the text tower of backbone '{backbone}' only "
            f"{vocabulary}: it belongs to another model."
        )
        raise ValueError(msg)
    clean = get_clean_fn(options.get("clean", "whitespace"))

    def tokenize(texts: list[str]) -> Tensor:
        cleaned = [clean(sentence) for sentence in texts]
        ids: Tensor = words(
            cleaned, return_tensors="pt", max_length=length, padding="max_length", truncation=True
        ).input_ids
        return ids.masked_fill(ids == words.sep_token_id, 0) if options.get("strip_sep_token") else ids

    return tokenize


def _load(what: str, source: str, kind: str) -> Any:
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(source)
    except (OSError, ValueError) as error:
        msg = (
            f"The {what} of {source} could not be loaded ({type(error).__name__}). Without a network, or where files "
            f"are damaged, copy the files of the backbone's hub repository to a folder and name it "
            f"--model.backbone {LOCAL_DIR_PREFIX}PATH."
        )
        raise FileNotFoundError(msg) from error


def _require_transformers(backbone: str) -> None:
    try:
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        msg = (
            f"Backbone '{backbone}' has a text tower or tokenizer of Hugging Face: install it with "
            "pip install 'anomalib-mvfa[hf]'."
        )
        raise ModuleNotFoundError(msg) from error
