# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Backbones of every kind in the format of the hub, small and with random weights."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

SIZE = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 2}


@register_model
def mvfa_small_vit(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """As ``vit_base_patch16_224``, the image tower of BiomedCLIP."""
    return _built(VisionTransformer, SIZE | kwargs)


@register_model
def mvfa_small_siglip(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """As ``vit_base_patch16_siglip_224``: no class token, pooling by attention."""
    return _built(VisionTransformer, SIZE | {"class_token": False, "global_pool": "map"} | kwargs)


@register_model
def mvfa_small_eva(pretrained: bool = False, **kwargs) -> Eva:
    """As ``eva02_base_patch16_clip_224``: rotary positions."""
    options = {
        "qkv_fused": False,
        "swiglu_mlp": True,
        "scale_mlp": True,
        "scale_attn_inner": True,
        "use_rot_pos_emb": True,
        "ref_feat_shape": (4, 4),
        "global_pool": "token",
    }
    return _built(Eva, SIZE | options | kwargs)


@register_model
def mvfa_small_registers(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """Registers, no class token, a norm before the blocks, the mean as pooling."""
    options = {"class_token": False, "reg_tokens": 3, "pre_norm": True, "global_pool": "avg", "no_embed_class": True}
    return _built(VisionTransformer, SIZE | options | kwargs)


def _built(kind, options):
    options.pop("pretrained_cfg", None), options.pop("pretrained_cfg_overlay", None), options.pop("cache_dir", None)
    model = kind(**options)
    model.default_cfg = model.pretrained_cfg = {}
    return model


PLAIN_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
WORDS = ["a", "photo", "of", "the", "normal", "brain", "with", "tumor", "damaged", "flawless", "perfect", "object"]


def timm_vision(name, **options):
    return {"timm_model_name": name, "timm_model_pretrained": False, "image_size": 64, **options}


KINDS = {
    "open_clip": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 64, "layers": 4, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": PLAIN_TEXT,
    },
    "biomedclip": {
        "embed_dim": 24,
        "vision_cfg": timm_vision("mvfa_small_vit", timm_pool="", timm_proj="linear"),
        "text_cfg": {
            "hf_model_name": "owner/bert",
            "hf_tokenizer_name": "owner/bert",
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": 32,
        },
    },
    "siglip": {
        "embed_dim": 32,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": timm_vision("mvfa_small_siglip", timm_pool="map", timm_proj="none"),
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 64,
            "hf_tokenizer_name": "owner/words",
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "width": 32,
            "heads": 2,
            "layers": 1,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
        },
    },
    "eva": {
        "embed_dim": 24,
        "vision_cfg": timm_vision("mvfa_small_eva", timm_pool="token", timm_proj=None),
        "text_cfg": PLAIN_TEXT,
        "custom_text": True,
    },
    "registers": {
        "embed_dim": 24,
        "vision_cfg": timm_vision("mvfa_small_registers", timm_pool="avg", timm_proj="linear"),
        "text_cfg": PLAIN_TEXT,
        "custom_text": True,
    },
}


def write_tokenizer(folder, kind, words=WORDS):
    """A WordPiece tokenizer as BERT's, or one of whole words that pads with the end, in the files that the hub has."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    if kind == "biomedclip":
        vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
        inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        ends = [("[CLS]", 2), ("[SEP]", 3)]
        inner.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
        names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    else:
        vocabulary = {word: index for index, word in enumerate(["<unk>", "</s>", *words])}
        inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        inner.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
        names = {"unk_token": "<unk>", "pad_token": "</s>", "eos_token": "</s>"}
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_bert(folder):
    from transformers import BertConfig

    BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=40,
    ).save_pretrained(folder)


def built_by_open_clip(kind: str, folder: Path) -> torch.nn.Module:
    """The model as open_clip builds it."""
    config = json.loads(json.dumps(KINDS[kind]))
    text = config["text_cfg"]
    if "hf_model_name" in text:
        text |= {"hf_model_name": str(folder), "hf_model_pretrained": False}
    custom = config.pop("custom_text", False) or "hf_model_name" in text
    torch.manual_seed(2)
    model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)
    for name, parameter in model.named_parameters():  # nothing stays at zero, so that a forgotten part is seen
        if parameter.ndim and "logit" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
            parameter.data += "norm" in name and name.endswith("weight")
    return model.eval()


@pytest.fixture(scope="session", params=KINDS)
def kind(request):
    if request.param in {"biomedclip", "siglip"}:
        pytest.importorskip("transformers")
    return request.param


@pytest.fixture(scope="session")
def make_hub_folder(tmp_path_factory):
    """Write a backbone of a kind as the hub has it, and return its folder and the model as open_clip builds it."""

    def make(kind, weights="safetensors"):
        folder = tmp_path_factory.mktemp(kind)
        if kind in {"biomedclip", "siglip"}:
            write_tokenizer(folder, kind)
        if kind == "biomedclip":
            write_bert(folder)
        model = built_by_open_clip(kind, folder)
        images = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.5]}
        described = {"model_cfg": KINDS[kind], "preprocess_cfg": images}
        (folder / "open_clip_config.json").write_text(json.dumps(described), encoding="utf-8")
        state = {name: value.contiguous() for name, value in model.state_dict().items()}
        if weights == "safetensors":
            save_file(state, folder / "open_clip_model.safetensors")
        else:
            torch.save(state, folder / "open_clip_pytorch_model.bin")
        return folder, model

    return make


@pytest.fixture(scope="session")
def hub_folder(kind, make_hub_folder):
    return make_hub_folder(kind)
