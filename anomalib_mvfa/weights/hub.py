# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Adapters on the Hugging Face hub: the model card, and the upload."""

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, ModelCardData
from open_clip.factory import HF_HUB_PREFIX

from .adapter_files import HUB_FILE

__all__ = ["model_card", "upload"]


def model_card(repository: str, facts: Mapping[str, Any], licence: str) -> str:
    """Write the model card of adapters.

    Args:
        repository: ``owner/name`` on the hub.
        facts: What :meth:`~anomalib_mvfa.model.lightning_model.MVFA.facts` gives.
        licence: Identifier of the licence.

    Returns:
        Markdown with the hub's header. What is not known is said to be unknown.
    """
    header = ModelCardData(
        license=licence,
        library_name="anomalib",
        pipeline_tag="image-segmentation",
        tags=["anomaly-detection", "medical", "mvfa", "anomalib-mvfa", "clip"],
    )
    training, figures = facts.get("training") or {}, facts.get("figures") or {}
    shots = training.get("k_shot")
    rows = {
        "Backbone": f"{facts['backbone']} at {' x '.join(map(str, facts['image_size']))} px (fingerprint "
        f"{facts['fingerprint']}); not part of this repository",
        "Levels": ", ".join(map(str, facts["levels"])),
        "Class in the prompts": facts.get("class_name"),
        "Intensity rule": facts.get("intensity") or "none: grey levels as stored",
        "Training set": training.get("data"),
        "Classes in training": ", ".join(training.get("classes") or ()),
        "Supports": f"{shots} normal, as many abnormal unless lesions were drawn" if shots else "",
        "Synthetic lesions": {True: "yes", False: "no", None: None}[training.get("synthetic_lesions")],
        "Masks": "used in training" if facts["has_masks"] else "none: the map comes from the detection adapters",
        "Epochs, learning rate": f"{training['epochs']}, {training['learning_rate']}" if "epochs" in training else "",
    }
    table = "\n".join(f"| {name} | {value or 'unknown'} |" for name, value in rows.items())
    changed = ", ".join(f"`{name}={value}`" for name, value in facts["variant"].items())
    return f"""---
{header.to_yaml()}
---

# {repository.rpartition("/")[2]}

Adapters of MVFA (Huang et al., CVPR 2024, arXiv 2403.12570) for
[anomalib](https://github.com/open-edge-platform/anomalib) with the plug-in anomalib-mvfa. They turn a frozen CLIP into
a detector of anomalies in images of the class "{facts.get("class_name")}".

**Not for clinical use.** Research software: not a medical device, not validated on patients, not to be used for
diagnosis, triage or treatment.

## Intended use

Research on anomaly detection and localisation in images like those of the training set: same organ, modality, view and
intensity rule. The scores say how unusual an image is to the model, not what is wrong with it.

## How to use

    anomalib test --model MVFA --model.adapters {HF_HUB_PREFIX}{repository} --data FewShot ...

{HUB_FILE} holds the adapters alone. Memory bank, ranges and thresholds are made from your own normal images.

## Facts

| | |
|---|---|
{table}

Choices of the method: {changed}.

## Figures

{_figures(figures)}

## Limits

- Other scanners, protocols, populations or organs may give worse results, without a sign of it in the scores.
- Few-shot training on few images varies with the draw of supports; one figure is one draw.
- Thresholds depend on the site's own images and have to be set there.
- Small or faint lesions, and lesions unlike those seen in training, may be missed; artefacts may be called abnormal.
"""


def _figures(figures: Mapping[str, Any]) -> str:
    """Write the table of figures, with what they were measured on."""
    metrics = figures.get("metrics")
    if not metrics:
        return "None were measured before the upload."
    ranges = (
        "the ranges of the two branches were taken from this test set"
        if figures.get("fusion_scale") == "test"
        else "nothing of the test set was used before"
    )
    lines = "\n".join(f"| {name} | {value:.4f} |" for name, value in sorted(metrics.items()))
    return (
        f"Test part of {figures.get('data') or 'a set without a name'}, {figures.get('images')} images; {ranges}.\n\n"
        f"| metric | value |\n|---|---|\n{lines}"
    )


def upload(
    repository: str,
    facts: Mapping[str, Any],
    licence: str,
    write: Callable[[Path], Path],
    *,
    private: bool,
) -> str:
    """Put adapters and their card into a repository of the hub.

    Args:
        repository: ``owner/name``; made unless it exists.
        facts: Facts for the card.
        licence: Identifier of the licence.
        write: Writes the adapters to a path.
        private: Whether a new repository can be seen by its owner alone.

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
        (Path(folder) / "README.md").write_text(model_card(repository, facts, licence), encoding="utf-8")
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload MVFA adapters")
    return str(address)
