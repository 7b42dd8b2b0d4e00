# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Adapters on the Hugging Face hub: the model card, and the upload."""

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from open_clip.factory import HF_HUB_PREFIX

from .adapter_files import HUB_FILE

__all__ = ["model_card", "upload"]


def model_card(repository: str, facts: Mapping[str, Any], licence: str) -> ModelCard:
    """Render the model card of adapters with the hub's header; missing facts are called unknown."""
    header = ModelCardData(
        license=licence,
        library_name="anomalib",
        pipeline_tag="image-segmentation",
        tags=["anomaly-detection", "medical", "mvfa", "anomalib-mvfa", "clip"],
    )
    template = Path(__file__).with_name("model_card.md.jinja")
    values = {"repository": repository, "facts": facts, "prefix": HF_HUB_PREFIX, "file": HUB_FILE}
    card: ModelCard = ModelCard.from_template(header, template_path=str(template), **values)
    return card


def upload(
    repository: str,
    facts: Mapping[str, Any],
    licence: str,
    write: Callable[[Path], Path],
    *,
    private: bool,
) -> str:
    """Upload adapters, which `write` writes to a path, and their card to a repository of the hub.

    Returns:
        Address of the repository.

    Raises:
        ValueError: If the name is not of the form ``owner/name``.
    """
    if repository.startswith(HF_HUB_PREFIX) or repository.count("/") != 1:
        msg = f"A repository of the hub is named owner/name, got '{repository}'."
        raise ValueError(msg)
    api = HfApi()
    with TemporaryDirectory() as folder:
        write(Path(folder) / HUB_FILE)
        model_card(repository, facts, licence).save(Path(folder) / "README.md")
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload MVFA adapters")
    return str(address)
