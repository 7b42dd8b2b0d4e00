# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Every number of the method, held against the released implementation (see ``tests/golden/README.md``)."""

import json

import open_clip
import pytest
import torch
from anomalib.data import ImageBatch, ImageItem
from lightning.pytorch import Callback, Trainer
from pandas import DataFrame
from safetensors.torch import save_file
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset

from anomalib_mvfa import MVFAModel
from anomalib_mvfa.backbones.loading import load_clip, resolve_backbone
from anomalib_mvfa.data.augmentation import support_versions
from anomalib_mvfa.model.loss import dice_loss, focal_loss, score_loss, training_losses
from anomalib_mvfa.model.memory import Support
from anomalib_mvfa.model.torch_model import BranchOutput
from anomalib_mvfa.weights.adapter_files import load_adapters

PHASES = ("init", "train_segmentation", "train_classification")
TASKS = ("train_segmentation", "train_classification")


def assert_within(actual, expected, tolerance):
    assert_close(actual.detach(), expected, atol=tolerance, rtol=0)


def adapters_of(golden, prefix):
    prefix += "."
    return {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}


def load_phase(model, golden, official_adapters, phase):
    if phase == "train_segmentation":
        load_adapters(official_adapters, model.seg_adapters, model.det_adapters)
    if phase == "train_classification":
        model.seg_adapters.load_state_dict(adapters_of(golden, f"{phase}/final/seg"))
        model.det_adapters.load_state_dict(adapters_of(golden, f"{phase}/final/det"))


def training_samples(golden):
    """44 augmented supports, the abnormal block first."""
    abnormal = support_versions(golden["support/abnormal_images"]).flatten(0, 1)
    normal = support_versions(golden["support/normal_images"]).flatten(0, 1)
    masks = support_versions(golden["support/abnormal_masks"]).flatten(0, 1)[:, 0] > 0.5
    labels = torch.cat([torch.ones(len(abnormal)), torch.zeros(len(normal))])
    return torch.cat([abnormal, normal]), torch.cat([masks, torch.zeros_like(masks)]), labels


def total_loss(mvfa, images, labels, masks):
    return torch.stack(list(training_losses(mvfa.model, images, labels, masks).values())).sum(dim=0).mean()


def test_position_grid_is_resized_when_weights_are_read(golden, tmp_path):
    config = {
        "embed_dim": 4,
        "vision_cfg": {"image_size": 336, "layers": 1, "width": 4, "head_width": 4, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 4, "heads": 1, "layers": 1},
    }
    (tmp_path / "grid.json").write_text(json.dumps(config), encoding="utf-8")
    state = open_clip.CLIP(**config).state_dict()
    state["visual.positional_embedding"] = golden["pos_embed/from_24x24"]
    save_file(state, tmp_path / "grid.safetensors")
    backbone = resolve_backbone(str(tmp_path / "grid.json"), str(tmp_path / "grid.safetensors"), 240)
    clip, _ = load_clip(backbone)
    assert_within(clip.visual.positional_embedding, golden["pos_embed/to_17x17"], 1e-5)


@pytest.mark.parametrize("name", ["abnormal_images", "abnormal_masks"])
def test_eleven_versions_equal_the_released_augmentation(golden, name):
    versions = support_versions(golden[f"support/{name}"][1:, :1])
    assert_within(versions, golden[f"augment/{name}"], 1e-5)


@pytest.mark.parametrize("batch_size", [4, 1])
@torch.no_grad()
def test_hidden_tokens_and_pooled_embedding(golden, golden_mvfa, batch_size):
    model = golden_mvfa.model
    for first in range(0, 4, batch_size):
        part = slice(first, first + batch_size)
        images = golden["test/images"][part]
        hidden = model.hidden_tokens(images)
        tokens = model.first_level_tokens(images)
        for stage, adapters in enumerate(zip(model.seg_adapters, model.det_adapters, strict=True)):
            tokens = model.tower.run_stage(tokens, stage) if stage else tokens
            tokens = model._mix(tokens, *(adapter(tokens)[1] for adapter in adapters))
        visual = load_clip(model.backbone)[0].visual
        assert_within(visual.ln_post(tokens[:, 0]) @ visual.proj, golden["init/pooled"][part], 1e-5)
        for level in range(4):
            assert_within(hidden.segmentation[level], golden[f"init/seg_tokens.{level}"][part], 1e-5)
            assert_within(hidden.detection[level], golden[f"init/det_tokens.{level}"][part], 1e-5)


@pytest.mark.parametrize("phase", PHASES)
@torch.no_grad()
def test_branches_and_fusion(golden, golden_mvfa, official_adapters, phase):
    model = golden_mvfa.model
    load_phase(model, golden, official_adapters, phase)
    hidden = model.hidden_tokens(golden["test/images"])
    support = Support(support_versions(golden["support/normal_images"]), golden["support/abnormal_images"])
    # The recorded maps are those of the segmentation adapters, the scores those of the detection adapters.
    for model.has_masks in (False, True):
        model.remember(support)
    language, memory = (
        BranchOutput(segmentation.anomaly_map, detection.score)
        for segmentation, detection in (
            (model.language_branch(hidden.segmentation), model.language_branch(hidden.detection)),
            (
                model.memory_branch(hidden.segmentation, model.seg_memory),
                model.memory_branch(hidden.detection, model.det_memory),
            ),
        )
    )
    assert_within(language.anomaly_map, golden[f"{phase}/language_map"], 5e-5)
    assert_within(memory.anomaly_map, golden[f"{phase}/memory_map"], 5e-5)
    assert_within(language.score, golden[f"{phase}/language_score"], 1e-5)
    assert_within(memory.score, golden[f"{phase}/memory_score"], 1e-5)

    model.set_fusion_range([(language, memory)])
    fused = model.fuse(language, memory)
    assert_within(fused.anomaly_map, golden[f"{phase}/fused_map_test_minmax"], 5e-5)
    assert_within(fused.pred_score, golden[f"{phase}/image_score_from_fused_map"], 5e-5)
    model.has_masks = False
    assert_within(model.fuse(language, memory).pred_score, golden[f"{phase}/fused_score_test_minmax"], 5e-5)


@torch.no_grad()
def test_forward_uses_the_branches_of_the_trained_adapters(golden, golden_mvfa, official_adapters):
    model = golden_mvfa.model
    load_phase(model, golden, official_adapters, "train_segmentation")
    zero_shot = model(golden["test/images"])
    assert_within(zero_shot.anomaly_map, golden["train_segmentation/language_map"], 5e-5)
    assert_within(zero_shot.pred_score, golden["train_segmentation/language_score"], 1e-5)
    model.remember(Support(support_versions(golden["support/normal_images"]), golden["support/abnormal_images"]))
    model.set_fusion_range([model.branches(golden["test/images"])])
    few_shot = model(golden["test/images"])
    assert_within(few_shot.anomaly_map, golden["train_segmentation/fused_map_test_minmax"], 5e-5)
    assert_within(few_shot.pred_score, golden["train_segmentation/image_score_from_fused_map"], 5e-5)


@torch.no_grad()
def test_each_loss_term_of_each_level(golden, golden_mvfa):
    images, masks, labels = training_samples(golden)
    model = golden_mvfa.model
    hidden = model.hidden_tokens(images[:1])
    for level in range(4):
        score = model.level_score(hidden.detection[level])
        state_map = model.level_map(hidden.segmentation[level])
        for task in TASKS:
            assert_within(score_loss(score, labels[:1])[0], golden[f"{task}/first_bce"][level], 1e-4)
        focal, dice = focal_loss(state_map, masks[:1])[0], dice_loss(state_map[:, 1], masks[:1])[0]
        assert_within(focal, golden["train_segmentation/first_focal"][level], 1e-4)
        assert_within(dice, golden["train_segmentation/first_dice"][level], 1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_first_gradients(golden, golden_mvfa, task):
    images, masks, labels = training_samples(golden)
    total_loss(golden_mvfa, images[:1], labels[:1], masks[:1] if task == "train_segmentation" else None).backward()
    found = {
        f"{kind}.{name}": parameter.grad
        for kind, adapters in (("seg", golden_mvfa.model.seg_adapters), ("det", golden_mvfa.model.det_adapters))
        for name, parameter in adapters.named_parameters()
        if parameter.grad is not None
    }
    prefix = f"{task}/first_grad/"
    expected = {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_within(found[name], value, 1e-4 * float(value.abs().max()))


class GoldenSupports(Dataset):
    """The 44 augmented supports in the recorded order."""

    def __init__(self, golden, task):
        self.images, self.masks, self.labels = training_samples(golden)
        self.samples = DataFrame({"label_index": self.labels.int()})
        self.samples.attrs["task"] = "segmentation" if task == "train_segmentation" else "classification"

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return ImageItem(image=self.images[index], gt_mask=self.masks[index], gt_label=self.labels[index].int())


class LossCurve(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *args):
        self.values.append(outputs["loss"].detach())


@pytest.mark.parametrize("task", TASKS)
def test_88_training_steps_of_the_trainer(golden, golden_mvfa, official_adapters, task):
    curve = LossCurve()
    loader = DataLoader(GoldenSupports(golden, task), batch_size=1, collate_fn=ImageBatch.collate)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=2, accelerator="cpu", callbacks=[curve], enable_model_summary=False, **quiet)
    trainer.fit(golden_mvfa, loader)
    assert_close(torch.stack(curve.values), golden[f"{task}/loss_curve"], atol=1e-4, rtol=0)
    released = torch.load(official_adapters, weights_only=True)
    for kind in ("seg", "det"):
        adapters = getattr(golden_mvfa.model, f"{kind}_adapters")
        final = adapters_of(golden, f"{task}/final/{kind}") or released[f"{kind}_adapters"]
        assert adapters.state_dict().keys() == final.keys()
        for name, value in adapters.state_dict().items():
            assert_within(value, final[name], 1e-5)


@pytest.mark.parametrize("has_mask", [[True] * 4, [False] * 4, [True, False, False, True]])
@pytest.mark.parametrize("several_classes", [False, True])
def test_batch_gradient_is_the_mean_of_single_ones(golden, golden_mvfa, has_mask, several_classes):
    images, masks, labels = (values[[0, 5, 22, 30]] for values in training_samples(golden))
    has_mask = torch.tensor(has_mask)
    texts = golden["text_features"].expand(4, -1, -1)
    if several_classes:  # one with the two states exchanged
        texts = torch.stack([texts[0], texts[1].flip(-1), texts[2], texts[3].flip(-1)])
    kinds = (golden_mvfa.model.seg_adapters, golden_mvfa.model.det_adapters)
    parameters = [parameter for adapters in kinds for parameter in list(adapters.parameters())[:-1]]

    def gradients(part):
        terms = training_losses(golden_mvfa.model, images[part], labels[part], masks[part], has_mask[part], texts[part])
        loss = torch.stack(list(terms.values())).sum(dim=0).mean()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    singles = [gradients(slice(index, index + 1)) for index in range(4)]
    for position, batch in enumerate(gradients(slice(None))):
        mean = torch.stack([single[position] for single in singles]).mean(dim=0)
        assert_within(batch, mean, 1e-5 * float(mean.abs().max()))


def test_images_of_sets_without_masks_leave_the_segmentation_adapters_without_gradient(golden, golden_mvfa):
    images, masks, labels = (values[[0, 22]] for values in training_samples(golden))
    terms = training_losses(golden_mvfa.model, images, labels, masks, torch.tensor([False, False]))
    assert set(terms) == {"bce"}
    terms["bce"].sum().backward()
    assert all(parameter.grad is None for parameter in golden_mvfa.model.seg_adapters.parameters())
    assert golden_mvfa.model.det_adapters[0].fc1[0].weight.grad.abs().max() > 0


def test_released_adapters_fit_the_model_by_name(golden_files, official_adapters):
    model = MVFAModel(*golden_files, class_name="Brain")
    released = torch.load(official_adapters, weights_only=True)
    load_adapters(official_adapters, model.seg_adapters, model.det_adapters)
    assert torch.equal(model.det_adapters[3].fc1[0].weight, released["det_adapters"]["3.fc1.0.weight"])
