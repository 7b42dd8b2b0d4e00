# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Loading of the frozen CLIP by open_clip's names, from the hub, from local files, and the embedded ``tiny``."""

import difflib
import hashlib
import json
import logging
import pickle
import zipfile
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from huggingface_hub import snapshot_download
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.factory import HF_HUB_PREFIX
from open_clip.model import CLIP, CustomTextCLIP, convert_to_custom_text_state_dict, resize_pos_embed
from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.timm_model import TimmModel
from safetensors.torch import load_file
from torch import Tensor, nn

from .text import LOCAL_DIR_PREFIX, make_tokenizer, text_settings
from .tiny import TINY, TINY_CONFIG, TINY_WEIGHTS, initialise_tiny
from .towers import timm_patch_size

__all__ = ["BackboneConfig", "fingerprint", "load_clip", "read_state_dict", "resolve_backbone"]

logger = logging.getLogger(__name__)

PUBLISHED_BACKBONE = "ViT-L-14-336"
PUBLISHED_IMAGE_SIZE = 240
"""240 is not a multiple of the patch size 14: as in the released code, the last two rows and columns are not read."""
OPENAI = "openai"
CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
RANDOM_WEIGHTS = "random"


@dataclass(frozen=True)
class BackboneConfig:
    """What is known of a backbone before any weights are read."""

    name: str  # as the user named it
    model: dict[str, Any]  # open_clip's configuration
    image_size: tuple[int, int]  # height and width of the input
    weights: str | None  # as the user named them, or the default of this backbone
    quick_gelu: bool = False  # whether both towers run QuickGELU instead of the exact GELU
    mean: tuple[float, ...] = OPENAI_DATASET_MEAN  # of the images that the weights were trained with
    std: tuple[float, ...] = OPENAI_DATASET_STD
    folder: Path | None = None  # files of a ``local-dir:`` or ``hf-hub:`` backbone
    patch_size: int = 16
    normalized: bool = False  # whether mean and standard deviation come with the weights; else they are OpenAI's

    @property
    def is_published(self) -> bool:
        """Whether this is the tower of the published method, OpenAI's ViT-L/14 at 336 pixels.

        The released code runs the exact GELU in it, although it was trained with QuickGELU. Files count as OpenAI's
        weights, as do random ones; other tags do not.
        """
        if self.name != PUBLISHED_BACKBONE or self.weights is None:
            return False
        return self.weights in {OPENAI, RANDOM_WEIGHTS} or Path(self.weights).is_file()


def resolve_backbone(
    backbone: str,
    pretrained: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    quick_gelu: bool | None = None,
) -> BackboneConfig:
    """Check a backbone's name and sizes without reading weights.

    Args:
        backbone: A model of open_clip with a vision transformer, its own or timm's (``"ViT-L-14-336"``,
            ``"EVA02-B-16"``), ``"tiny"``, ``"hf-hub:owner/name"``, ``"local-dir:PATH"`` for a folder laid out as on the
            hub, or the path of an open_clip configuration in JSON.
        pretrained: A tag of open_clip, a local file, or ``"random"`` for seeded random weights, which serve tests and
            benchmarks. ``None`` takes the backbone's own, or ``"openai"``.
        image_size: Input size; ``None`` takes 240 for the published backbone, otherwise the backbone's own.
        quick_gelu: Whether both towers run QuickGELU. ``None`` takes what the weights were trained with; OpenAI's, by
            tag or as a TorchScript archive, need it. Towers of timm have an activation of their own.

    Raises:
        ValueError: If the backbone is unknown or lacks something, or the image size does not fit it.
        FileNotFoundError: If a file of the backbone is missing.
    """
    config, folder = _read_config(backbone)
    model = config["model_cfg"]
    vision = model["vision_cfg"]
    patch = _check_architecture(backbone, model, quick_gelu)
    if image_size is None:
        image_size = PUBLISHED_IMAGE_SIZE if backbone == PUBLISHED_BACKBONE else vision.get("image_size", 224)
    size = _check_image_size(backbone, image_size, patch)
    vision.update(image_size=size, patch_dropout=0.0)
    weights = pretrained
    if pretrained is None and backbone != TINY:
        weights = backbone if folder else OPENAI
    tag = _facts_of_weights(backbone, weights or "")
    own_activation = model.pop("quick_gelu", False) or tag["quick_gelu"]
    images = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD, **tag, **config.get("preprocess_cfg", {})}
    return BackboneConfig(
        backbone,
        model,
        size,
        weights,
        own_activation if quick_gelu is None else quick_gelu,
        tuple(images["mean"]),
        tuple(images["std"]),
        folder,
        patch,
        {"mean", "std"} <= tag.keys() | config.get("preprocess_cfg", {}).keys(),
    )


def _check_architecture(backbone: str, model: Mapping[str, Any], quick_gelu: bool | None) -> int:
    """Return the patch size of the image tower if adapters can sit between its blocks, and if there is a text tower."""
    vision = model["vision_cfg"]
    if "timm_model_name" in vision:
        if quick_gelu:
            msg = (
                f"quick_gelu=True cannot be set for backbone '{backbone}': timm's towers have an activation of their "
                "own. Leave it out."
            )
            raise ValueError(msg)
        return timm_patch_size(vision["timm_model_name"])
    lacking = "" if isinstance(vision.get("layers", 12), int) else "an image tower of transformer blocks"
    if "multimodal_cfg" in model:
        lacking = "a text tower that only encodes"
    if lacking:
        msg = f"Backbone '{backbone}' lacks {lacking}. Use for instance {PUBLISHED_BACKBONE} or ViT-B-16."
        raise ValueError(msg)
    return int(vision.get("patch_size", 16))


def _facts_of_weights(backbone: str, weights: str) -> dict[str, Any]:
    """Return what open_clip's table says of a tag, or of all tags of the backbone if the weights are no tag."""
    weights = OPENAI if _is_torchscript(Path(weights)) else weights
    facts: dict[str, Any] = get_pretrained_cfg(backbone, weights)
    if not facts:
        first, *others = [get_pretrained_cfg(backbone, tag) for tag in list_pretrained_tags_by_model(backbone)] or [{}]
        facts = {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}
    return {**facts, "quick_gelu": weights == OPENAI or facts.get("quick_gelu", False)}


def _check_image_size(backbone: str, image_size: int | tuple[int, int], patch: int) -> tuple[int, int]:
    """Return height and width if whole patches fill them, or at the published size."""
    height, width = map(int, (image_size, image_size) if isinstance(image_size, int) else image_size)
    published = (height, width, patch) == (PUBLISHED_IMAGE_SIZE, PUBLISHED_IMAGE_SIZE, 14)
    if not published and (height < patch or width < patch or height % patch or width % patch):
        near = sorted({max(1, height // patch) * patch, (height // patch + 1) * patch})
        msg = (
            f"Image size {height} x {width} is not a multiple of the patch size {patch} of backbone '{backbone}'. "
            f"Use for instance {' or '.join(map(str, near))}."
        )
        raise ValueError(msg)
    return height, width


def _read_config(backbone: str) -> tuple[dict[str, Any], Path | None]:
    """Read open_clip's configuration, ``model_cfg`` and possibly ``preprocess_cfg``, and return it with its folder."""
    folder = None
    if backbone.startswith((LOCAL_DIR_PREFIX, HF_HUB_PREFIX)):
        folder = _folder(backbone, "*.json", "*.txt", "*.model")
        if not (folder / CONFIG_FILE).is_file():
            msg = f"{folder / CONFIG_FILE} is missing: '{backbone}' must be laid out as open_clip has it on the hub."
            raise FileNotFoundError(msg)
        config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    elif backbone.endswith(".json"):
        path = Path(backbone)
        if not path.is_file():
            msg = f"No backbone configuration at {path}. Give the path of an open_clip model configuration in JSON."
            raise ValueError(msg)
        config = json.loads(path.read_text(encoding="utf-8"))
    else:
        known = deepcopy(TINY_CONFIG) if backbone == TINY else open_clip.get_model_config(backbone)
        if known is None:
            near = difflib.get_close_matches(backbone, [TINY, *open_clip.list_models()], n=3, cutoff=0.4)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            msg = (
                f"Unknown backbone '{backbone}'.{hint} Give a vision transformer of open_clip such as "
                f"{PUBLISHED_BACKBONE}, an hf-hub:owner/name, a JSON configuration, or '{TINY}', the small "
                "demonstration model inside this package."
            )
            raise ValueError(msg)
        config = known
    config = config if "model_cfg" in config else {"model_cfg": config}
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - config["model_cfg"].keys()
    if missing:
        msg = f"The configuration of backbone '{backbone}' lacks {', '.join(sorted(missing))}."
        raise ValueError(msg)
    return config, folder


def _folder(name: str, *files: str) -> Path:
    """Return the folder of a ``local-dir:`` or ``hf-hub:`` name, of the latter with the named files."""
    if name.startswith(LOCAL_DIR_PREFIX):
        return Path(name.removeprefix(LOCAL_DIR_PREFIX))
    repository = name.removeprefix(HF_HUB_PREFIX)
    try:
        return Path(snapshot_download(repository, allow_patterns=list(files)))
    except Exception as error:
        raise FileNotFoundError(_download_advice(name, f"hub repository {repository}")) from error


def load_clip(config: BackboneConfig) -> tuple[CLIP | CustomTextCLIP, Callable[[list[str]], Tensor]]:
    """Build a CLIP in float32 and evaluation mode, and its tokenizer, without executing code from the weights file.

    Raises:
        FileNotFoundError: If the weights are neither a file nor a known tag, or cannot be downloaded.
        ValueError: If the file holds weights of another model.
    """
    arguments = deepcopy(config.model) | {"quick_gelu": config.quick_gelu}
    text_settings(arguments["text_cfg"], config.name, config.folder)
    custom_text = arguments.pop("custom_text", False) or "hf_model_name" in arguments["text_cfg"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (CustomTextCLIP if custom_text else CLIP)(**arguments)
    if config.weights == RANDOM_WEIGHTS:
        logger.warning("Backbone %s has random weights: its results mean nothing.", config.name)
        if config.name == TINY:
            initialise_tiny(model)
    else:
        path = _weights_path(config)
        state = read_state_dict(path)
        if custom_text and "positional_embedding" in state:
            state = convert_to_custom_text_state_dict(state)
        _load(model, state, config, path)
    if isinstance(model.visual, TimmModel):
        model.visual.trunk.set_input_size(img_size=config.image_size)
        model.visual.image_size = config.image_size
    return model.float().eval(), make_tokenizer(arguments["text_cfg"], config.name, config.folder)


def _load(model: nn.Module, state: dict[str, Tensor], config: BackboneConfig, path: Path) -> None:
    state.pop("text.transformer.embeddings.position_ids", None)  # a buffer that transformers no longer saves
    if getattr(model, "logit_bias", None) is not None:
        state.setdefault("logit_bias", torch.zeros_like(state["logit_scale"]))
    try:
        if not isinstance(model.visual, TimmModel):
            resize_pos_embed(state, model)
        model.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        reasons = str(error).splitlines()
        msg = f"{path} does not hold weights of backbone '{config.name}': {reasons[min(1, len(reasons) - 1)].strip()}"
        raise ValueError(msg) from error


def _weights_path(config: BackboneConfig) -> Path:
    if config.weights is None:  # only the embedded backbone
        logger.warning(
            "Backbone 'tiny' is a small demonstration model inside this package, trained on generated images. "
            "Its results show that the software works, not how good MVFA is."
        )
        return TINY_WEIGHTS
    weights = config.weights
    if Path(weights).is_file():
        return Path(weights)
    if weights.startswith((HF_HUB_PREFIX, LOCAL_DIR_PREFIX)):
        for name in WEIGHT_FILES:
            if (path := _folder(weights, name) / name).is_file():
                return path
        msg = f"{weights} lacks {' or '.join(WEIGHT_FILES)}. Add one, or give a file named by --model.pretrained."
        if weights.startswith(HF_HUB_PREFIX):  # offline the hub returns what was fetched before, such as the names
            msg = _download_advice(
                weights, f"{WEIGHT_FILES[0]} of hub repository {weights.removeprefix(HF_HUB_PREFIX)}"
            )
        raise FileNotFoundError(msg)
    known = get_pretrained_cfg(config.name, weights)
    if not known:
        tags = list_pretrained_tags_by_model(config.name)
        msg = (
            f"No weights '{weights}' for backbone '{config.name}': there is no such file, and its tags are "
            f"{', '.join(tags) or '(none)'}. Give one of them or the path of a file with --model.pretrained."
        )
        raise FileNotFoundError(msg)
    try:
        return Path(download_pretrained(known))
    except Exception as error:
        source = known.get("url") or f"hub repository {known.get('hf_hub')}"
        raise FileNotFoundError(_download_advice(f"{config.name} ({weights})", source)) from error


def _download_advice(what: str, source: str) -> str:
    return (
        f"The weights of {what} are not on this machine and could not be downloaded. On a machine with a network fetch "
        f"{source}, copy the file here and name it with --model.pretrained /path/to/file (pretrained=... in Python). "
        f"To try MVFA without any download use --model.backbone {TINY}, the small demonstration model."
    )


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read tensors by name, in float32, from a file without executing code from it.

    Raises:
        ValueError: If the file is none of safetensors, a state dict saved by ``torch.save`` (bare or under
            ``state_dict``), and a TorchScript archive such as OpenAI published.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        elif _is_torchscript(path):
            state = _read_torchscript(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
    except Exception as error:
        msg = (
            f"{path} could not be read as weights ({type(error).__name__}). It must be a safetensors file, a state "
            "dict of plain tensors saved by torch.save, or a TorchScript archive; it may be damaged or hold other "
            "objects, which are not loaded."
        )
        raise ValueError(msg) from error
    not_parameters = {"input_resolution", "context_length", "vocab_size"}  # numbers that OpenAI's archives hold
    state = {name.removeprefix("module."): value for name, value in state.items() if name not in not_parameters}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        msg = f"{path} holds no state dict: expected named tensors."
        raise ValueError(msg)
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(PurePosixPath(name).name == "constants.pkl" for name in archive.namelist())


class _ArchiveUnpickler(pickle.Unpickler):
    """Reads the object tree of a TorchScript archive; nothing but tensors, containers and plain objects can be made.

    ``torch.jit.load`` is not used because it runs code of the archive: the ``__setstate__`` of a scripted class, which
    may write files through ``torch.save``.
    """

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive = archive
        self.root = root

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return type(name, (SimpleNamespace,), {})
        if module == "torch" and name.endswith("Storage"):
            return getattr(torch, name).dtype
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: torch.as_strided(storage, size, stride, offset).clone()
        if module == "torch.jit._pickle" and name.startswith("build_"):  # lists of numbers
            return list
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        msg = f"refused {module}.{name}"
        raise pickle.UnpicklingError(msg)

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, count = pid
        data = bytearray(self.archive.read(f"{self.root}/data/{key}"))
        return torch.frombuffer(data, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("/data.pkl")
        tree = _ArchiveUnpickler(archive, root).load()
    tensors: dict[str, Tensor] = {}

    def collect(node: SimpleNamespace, prefix: str) -> None:
        for name, value in vars(node).items():
            if isinstance(value, Tensor):
                tensors[prefix + name] = value
            elif isinstance(value, SimpleNamespace):
                collect(value, f"{prefix}{name}.")

    collect(tree, "")
    return tensors


def fingerprint(tower: nn.Module) -> str:
    """Compute a digest of a tower's weights, which identifies the backbone.

    16 hexadecimal digits of a SHA-256 over up to 64 spread values of each parameter. The position grid is left out: its
    values depend on the image size.
    """
    digest = hashlib.sha256()
    for name, value in tower.named_parameters():
        if name.endswith(("positional_embedding", "pos_embed")):
            continue
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.float32)
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]
