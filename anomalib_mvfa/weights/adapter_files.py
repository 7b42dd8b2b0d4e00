# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Adapters files, local or on the Hugging Face hub: the released ``.pth`` format and safetensors.

The facts in them are in types of JSON. No path is among them, as names of files and folders may contain names of
patients.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData, hf_hub_download
from lightning.pytorch import Trainer
from open_clip.factory import HF_HUB_PREFIX
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from anomalib_mvfa.files import replacing
from anomalib_mvfa.model.prompts import prompt_ensemble
from anomalib_mvfa.model.variant import NETWORK_CHOICES

if TYPE_CHECKING:
    from anomalib_mvfa.model import MVFAModel

__all__ = [
    "AdapterFile",
    "check_facts",
    "evaluation_facts",
    "load_adapters",
    "model_facts",
    "read_adapters",
    "training_facts",
    "upload",
    "write_adapters",
]

KINDS = ("seg_adapters", "det_adapters")
METADATA_KEY = "anomalib_mvfa"
HUB_FILE = "adapters.safetensors"


class AdapterFile(NamedTuple):
    """Contents of an adapters file: tensors by kind of adapter and name, and facts (none in the released format)."""

    weights: dict[str, dict[str, Tensor]]
    metadata: dict[str, Any]


def _locate(source: str | Path) -> Path:
    name = str(source)
    if not name.startswith(HF_HUB_PREFIX):
        return Path(source)
    repository, _, revision = name.removeprefix(HF_HUB_PREFIX).partition("@")
    try:
        return Path(hf_hub_download(repository, HUB_FILE, revision=revision or None))
    except Exception as error:
        msg = (
            f"{name} is not on this machine and could not be downloaded ({type(error).__name__}). Check the name "
            f"(hf-hub:owner/name or hf-hub:owner/name@revision) and, if it is private, log in with `hf auth login`; or "
            f"fetch {HUB_FILE} of that repository on a machine with a network, copy it here and give its path."
        )
        raise FileNotFoundError(msg) from error


def read_adapters(source: str | Path) -> AdapterFile:
    """Read an adapters file without executing code from it.

    Args:
        source: A ``.pth`` in the released format, a safetensors file of :func:`write_adapters`,
            ``hf-hub:owner/name`` or ``hf-hub:owner/name@revision``.

    Raises:
        FileNotFoundError: If there is no such file, or it is neither in the hub's cache nor can be downloaded.
        ValueError: If the file is damaged or holds something else.
    """
    path = _locate(source)
    if not path.is_file():
        msg = f"No adapters file at {path}. Give the path of a released .pth or of a .safetensors file."
        raise FileNotFoundError(msg)
    metadata: dict[str, Any] = {}
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
                flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            contents: object = {kind: _under(flat, kind) for kind in KINDS}
        else:
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        msg = (
            f"{path} could not be read as adapters ({type(error).__name__}). It may be damaged, or hold Python "
            "objects, which are not loaded. Expected a .pth in the released format or a .safetensors file."
        )
        raise ValueError(msg) from error
    if not isinstance(contents, dict) or not all(_is_state_dict(contents.get(kind)) for kind in KINDS):
        found = ", ".join(map(str, list(contents)[:5])) if isinstance(contents, dict) else type(contents).__name__
        msg = f"{path} is no adapters file: expected tensors under {' and '.join(KINDS)}, found {found or 'nothing'}."
        raise ValueError(msg)
    return AdapterFile({kind: contents[kind] for kind in KINDS}, metadata)


def _under(flat: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{kind}."): value for name, value in flat.items() if name.startswith(f"{kind}.")}


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(tensor, Tensor) for tensor in value.values())


def check_facts(source: str | Path, facts: Mapping[str, Any], model: "MVFAModel") -> None:
    """Check that adapters were trained for a network, as far as their facts say.

    Raises:
        ValueError: If they were trained with other backbone weights, levels or choices that change the tokens.
    """
    if facts.get("fingerprint", model.fingerprint) != model.fingerprint:
        msg = (
            f"{source} was trained with other backbone weights than those of this model: with backbone "
            f"'{facts.get('backbone')}'. Build the model with it (--model.backbone, --model.pretrained)."
        )
        raise ValueError(msg)
    levels = list(model.levels)
    trained_levels = facts.get("levels", levels)
    if trained_levels != levels:
        msg = (
            f"{source} was trained at the levels {trained_levels}, but this model reads {levels}. Build it with "
            f"levels={trained_levels} (--model.levels)."
        )
        raise ValueError(msg)
    choices = facts.get("variant") or {}
    for name, own in model.variant.plain().items():
        trained = choices.get(name, own)
        if name in NETWORK_CHOICES and trained != own:
            msg = (
                f"{source} was trained with {name}={trained}, but this model has {name}={own}. Build it with "
                f"variant={{'{name}': {trained!r}}} (--model.variant.{name} {trained})."
            )
            raise ValueError(msg)


def load_adapters(path: str | Path, seg_adapters: nn.ModuleList, det_adapters: nn.ModuleList) -> dict[str, Any]:
    """Copy adapters from a file or the hub into a model, and return the file's metadata.

    Nothing is changed when the file does not fit.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no adapters file, or was made for another width or number of levels.
    """
    weights, metadata = read_adapters(path)
    modules = dict(zip(KINDS, (seg_adapters, det_adapters), strict=True))
    for kind, module in modules.items():
        expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in weights[kind].items()}
        if expected == found:
            continue
        differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        name = differing[0]
        msg = (
            f"{path} does not fit this model: {kind}.{name} is {found.get(name, 'missing')} in the file and "
            f"{expected.get(name, 'unknown')} in the model. Build the model with the backbone and the levels that the "
            "adapters were trained with."
        )
        raise ValueError(msg)
    for kind, module in modules.items():
        module.load_state_dict(weights[kind])
    return metadata


def write_adapters(
    path: str | Path,
    seg_adapters: nn.ModuleList,
    det_adapters: nn.ModuleList,
    metadata: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Save adapters, one module a level: as ``.pth`` in the released format without metadata, or ``.safetensors``.

    ``dtype`` is the storage type; ``None`` keeps float32, which makes a round trip exact.

    Raises:
        ValueError: If the suffix is neither.
    """
    path = Path(path)
    states = {
        kind: {name: value.detach().to("cpu", dtype).contiguous() for name, value in module.state_dict().items()}
        for kind, module in zip(KINDS, (seg_adapters, det_adapters), strict=True)
    }
    if path.suffix not in {".safetensors", ".pth"}:
        msg = f"Adapters are saved as .safetensors, or as .pth in the released format; got '{path.name}'."
        raise ValueError(msg)
    with replacing(path) as partial:
        if path.suffix == ".safetensors":
            flat = {f"{kind}.{name}": value for kind, state in states.items() for name, value in state.items()}
            partial.write_bytes(save(flat, {METADATA_KEY: json.dumps(metadata or {}), "format": "pt"}))
        else:
            with partial.open("wb") as file:
                torch.save(states, file)
    return path


def upload(repository: str, model: "MVFAModel", facts: Mapping[str, Any], licence: str, *, private: bool) -> str:
    """Upload adapters in half precision and a model card made of their facts to the hub, and return the address.

    Raises:
        ValueError: If the name is not of the form ``owner/name``.
    """
    if repository.startswith(HF_HUB_PREFIX) or repository.count("/") != 1:
        msg = f"A repository of the hub is named owner/name, got '{repository}'."
        raise ValueError(msg)
    header = ModelCardData(
        license=licence,
        library_name="anomalib",
        pipeline_tag="image-segmentation",
        tags=["anomaly-detection", "medical", "mvfa", "anomalib-mvfa", "clip"],
    )
    template = str(Path(__file__).with_name("model_card.md.jinja"))
    values = {"repository": repository, "facts": facts, "prefix": HF_HUB_PREFIX, "file": HUB_FILE}
    card = ModelCard.from_template(header, template_path=template, **values)
    api = HfApi()
    with TemporaryDirectory() as folder:
        write_adapters(Path(folder) / HUB_FILE, model.seg_adapters, model.det_adapters, facts, torch.float16)
        card.save(Path(folder) / "README.md")
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload MVFA adapters")
    return str(address)


def model_facts(model: "MVFAModel") -> dict[str, Any]:
    """Describe what the adapters of a network fit: backbone, fingerprint, levels, prompts, choices of the method."""
    return {
        "backbone": _without_folder(model.backbone.name),
        "pretrained": _without_folder(model.backbone.weights),
        "fingerprint": model.fingerprint,
        "levels": list(model.levels),
        "image_size": list(model.image_size),
        "class_name": model.class_name,
        "prompts": prompt_ensemble(),
        "has_masks": model.has_masks,
        "variant": model.variant.plain(),
        "language_weight": model.fusion.language_weight,
    }


def training_facts(trainer: Trainer, learning_rate: float, *, synthetic_lesions: bool) -> dict[str, Any]:
    """Describe a training: its data, its length, and whether normal images get synthetic lesions."""
    datamodule = getattr(trainer, "datamodule", None)
    return {
        "data": _data_name(datamodule),
        "k_shot": getattr(datamodule, "k_shot", None),
        "seed": getattr(datamodule, "seed", None),
        "synthetic_lesions": synthetic_lesions or getattr(datamodule, "abnormal_source", None) == "synthetic",
        "epochs": trainer.max_epochs,
        "learning_rate": learning_rate,
    }


def evaluation_facts(trainer: Trainer, fusion_scale: str) -> dict[str, Any]:
    """Return the metrics of a test that has ended, and how they were obtained."""
    datamodule = getattr(trainer, "datamodule", None)
    return {
        "data": _data_name(datamodule),
        "images": len(getattr(datamodule, "test_data", ())),
        "fusion_scale": fusion_scale,
        "metrics": {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(("image_", "pixel_"))
        },
    }


def _without_folder(name: str | None) -> str | None:
    """Return the file name of a local path, and other names unchanged."""
    return Path(name).name if name and Path(name).is_file() else name


def _data_name(datamodule: object) -> str | None:
    names = (getattr(datamodule, "name", None), getattr(datamodule, "category", None))
    return "/".join(dict.fromkeys(name for name in names if name)) or None
