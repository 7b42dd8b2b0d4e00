# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Training of the tiny CLIP: what it is shown, that it learns, and that it goes on where it stopped."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from anomalib_mvfa.backbones.loading import load_clip, resolve_backbone
from anomalib_mvfa.demo.phantoms import draw_phantom
from anomalib_mvfa.model import MVFAModel
from tools.textures import draw_texture
from tools.train_tiny import MIXED_KEEP, Settings, TinyTraining, block_tokens, export, image_loss, main, train
from tools.views import CONFIG, GRID, PATCH, SUBJECTS, ViewDataset, collate

CPU = torch.device("cpu")
SHORT = Settings(steps=4, batch=8, views=2, learning_rate=1e-3)


@pytest.fixture
def training():
    return TinyTraining(SHORT)


def test_a_view_depends_on_seed_and_number_alone():
    first, again, other = ViewDataset(1, 2, 7)[5], ViewDataset(1, 2, 7)[5], ViewDataset(2, 2, 7)[5]
    for view, same in zip(first, again, strict=True):
        assert torch.equal(view.image, same.image)
        assert torch.equal(view.target, same.target)
        assert (view.origin, view.caption) == (same.origin, same.caption)
    assert not torch.equal(first[0].image, other[0].image)
    assert not torch.equal(first[0].image, first[1].image)


def test_captions_mention_a_lesion_where_one_is_seen():
    views = [view for index in range(30) for view in ViewDataset(0, 2, 7)[index]]
    share = torch.stack([view.target.sum() for view in views])
    mentioned = torch.tensor([" lesion in the " in view.caption for view in views])
    assert 0.3 < mentioned.float().mean() < 0.9
    assert share[mentioned].min() > 0.1
    assert share[~mentioned].max() < 0.5


def test_a_window_lies_where_its_positions_say():
    whole, window = ViewDataset(3, 1, GRID)[4][0], ViewDataset(3, 1, 7)[4][0]
    assert whole.image.shape[-1] == GRID * PATCH
    assert window.image.shape[-1] == 7 * PATCH
    row, column = window.origin
    seen = whole.target.view(GRID, GRID)[row : row + 7, column : column + 7]
    torch.testing.assert_close(window.target, seen.flatten())
    positions = collate([[window]]).positions[0]
    assert (positions[0], positions[-1]) == (row * GRID + column, (row + 6) * GRID + column + 6)


@torch.no_grad()
def test_tokens_do_not_depend_on_the_order_of_axes_in_the_attention(training):
    visual = training.clip.visual
    images, positions = torch.rand(2, 3, 3 * PATCH, 3 * PATCH), torch.arange(9).expand(2, 9)
    outputs = []
    for batch_first in (False, True):
        for block in visual.transformer.resblocks:
            block.attn.batch_first = batch_first
        outputs.append(torch.stack(block_tokens(visual, images, positions)))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_tokens_between_blocks_are_kept_as_mvfa_keeps_them(training, tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(CONFIG))
    model = MVFAModel(
        str(path), pretrained=str(export(training.clip, tmp_path / "tiny.safetensors")), class_name="Brain"
    )
    for adapter in (*model.seg_adapters, *model.det_adapters):
        adapter.fc1[0].weight.copy_(torch.eye(CONFIG["embed_dim"]))
        adapter.fc2[0].weight.zero_()
    training.clip.visual.load_state_dict({k: v.half() for k, v in training.clip.visual.state_dict().items()})
    images = torch.rand(2, 3, GRID * PATCH, GRID * PATCH)
    positions = torch.arange(GRID * GRID).expand(2, -1)
    outputs = block_tokens(training.clip.visual, images, positions, MIXED_KEEP)
    for tokens, hidden in zip(outputs, model.hidden_tokens(images).detection, strict=True):
        torch.testing.assert_close(torch.nn.functional.leaky_relu(tokens), hidden, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_heads_start_by_looking_at_the_four_neighbours_in_a_blank_image(training):
    visual = training.clip.visual
    patches = visual.positional_embedding[1:][None]
    block = visual.transformer.resblocks[0]
    query, key, _ = (block.ln_1(visual.ln_pre(patches)) @ block.attn.in_proj_weight.T).chunk(3, dim=-1)
    heads = block.attn.num_heads
    query, key = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))
    nearest = (query @ key.transpose(2, 3)).argmax(-1)  # (B, heads, P)
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    inside = ((rows > 0) & (rows < GRID - 1) & (columns > 0) & (columns < GRID - 1)).flatten()
    for head, offset in enumerate((1, -1, GRID, -GRID)):
        hit = nearest[:, head, inside] == (torch.arange(GRID * GRID) + offset)[inside]
        assert hit.float().mean() > 0.95


def test_a_stopped_training_ends_where_an_unbroken_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.train_tiny.HELD_OUT", 6)
    unbroken = load_file(train(SHORT, tmp_path / "unbroken", CPU, workers=0, save_every=2))
    forward, calls = TinyTraining.forward, []

    def fail_at_the_third_step(self, *arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, *arguments)

    monkeypatch.setattr(TinyTraining, "forward", fail_at_the_third_step)
    with pytest.raises(KeyboardInterrupt):
        train(SHORT, tmp_path / "broken", CPU, workers=0, save_every=2)
    monkeypatch.setattr(TinyTraining, "forward", forward)
    resumed = load_file(train(SHORT, tmp_path / "broken", CPU, workers=0, save_every=2))
    for name, value in unbroken.items():
        torch.testing.assert_close(resumed[name], value, msg=name)
    history = json.loads((tmp_path / "broken" / "history.json").read_text())
    assert history == json.loads((tmp_path / "unbroken" / "history.json").read_text())
    assert [(entry["step"], entry["seen"]) for entry in history] == [(0, 0), (2, 8), (4, 10)]


def test_the_patch_loss_falls(training):
    batch = collate([ViewDataset(0, 4, 7)[index] for index in range(4)])
    optimizer = torch.optim.AdamW([p for p in training.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(15):
        terms = training(batch, np.random.default_rng(0))
        loss = terms["patch"] + terms["caption"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.75 * losses[0]


def test_the_image_loss_counts_the_mean_over_the_patches_and_every_patch():
    sure, split = torch.full((1, 4), 3.0), torch.tensor([[30.0, 30.0, -30.0, -30.0]])
    abnormal = torch.ones(1)
    assert float(image_loss(sure, abnormal)) == pytest.approx(np.log1p(np.exp(-3)), rel=1e-4)
    assert float(image_loss(split, abnormal)) == pytest.approx((np.log(2) + 15) / 2, rel=1e-4)
    assert image_loss(sure, 1 - abnormal) > 3


def test_a_frozen_text_tower_keeps_its_weights_and_the_average_is_exported(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.train_tiny.HELD_OUT", 6)
    start = export(TinyTraining(SHORT).clip, tmp_path / "start.safetensors")
    settings = Settings(steps=4, batch=8, views=2, learning_rate=0.3, start=start, freeze_text=True)
    before, after = load_file(start), load_file(train(settings, tmp_path / "run", CPU, workers=0))
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    for name, value in after.items():
        if not name.startswith(("visual.", "logit_scale", "ln_final.bias")):
            assert torch.equal(value, before[name]), name
    last, average = (saved[part] for part in ("training", "averaged"))
    exported = after["visual.proj"].float()
    torch.testing.assert_close(exported, average["module.clip.visual.proj"], atol=2e-3, rtol=2e-3)
    assert not torch.allclose(exported, last["clip.visual.proj"], atol=5e-4, rtol=5e-4)
    assert not torch.equal(after["visual.proj"], before["visual.proj"])


def test_the_command_writes_weights_that_mvfa_loads(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tools.train_tiny.HELD_OUT", 6)
    main(["--output", str(tmp_path), "--steps", "1", "--batch", "8", "--workers", "0", "--device", "cpu"])
    path = tmp_path / "tiny.safetensors"
    assert str(path) in capsys.readouterr().out
    clip, _ = load_clip(resolve_backbone(str(tmp_path / "tiny.json"), str(path)))
    assert clip.visual.proj.shape == (CONFIG["vision_cfg"]["width"], CONFIG["embed_dim"])
    assert load_file(path)["visual.proj"].dtype == torch.float16


def test_exported_states_are_as_alike_as_those_of_a_large_clip(tmp_path):
    torch.manual_seed(0)
    clip = TinyTraining(SHORT).clip
    export(clip, tmp_path / "tiny.safetensors")
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(CONFIG))
    model = MVFAModel(str(path), pretrained=str(tmp_path / "tiny.safetensors"), class_name="liver CT")
    normal, abnormal = model.text_features.T
    assert float(normal @ abnormal) > 0.95
    assert not torch.allclose(normal, abnormal, atol=1e-3)


def test_fresh_adapters_on_the_embedded_weights_can_learn_at_every_level():
    model = MVFAModel("tiny", class_name="brain MRI").eval()
    images = torch.stack(
        [torch.from_numpy(draw_phantom("brain_mri", 112, None, np.random.default_rng(i)).image) for i in range(4)]
    )
    with torch.no_grad():
        hidden = model.hidden_tokens(images.permute(0, 3, 1, 2) / 255)
        for tokens in [*hidden.segmentation, *hidden.detection]:
            abnormal = model.level_map(tokens)[:, 1]
            # The gradient of a probability p is in proportion to p (1 - p): a fresh adapter must be able to learn.
            assert float((abnormal * (1 - abnormal)).mean()) > 1e-3


def test_textures_differ_in_kind_and_stay_within_grey_values():
    images = np.stack([draw_texture(56, np.random.default_rng(seed)) for seed in range(24)])
    assert images.min() >= 0
    assert images.max() <= 1
    assert np.array_equal(images[3], draw_texture(56, np.random.default_rng(3)))
    detail = np.abs(np.diff(images.mean(-1), axis=2)).mean((1, 2)) / images.std((1, 2, 3))
    assert detail.max() > 4 * detail.min()  # from smooth fields to grain


def test_views_hold_textures_with_and_without_lesions():
    views = [ViewDataset(0, 1)[index][0] for index in range(60)]
    share = [float(view.target.max()) for view in views if SUBJECTS[view.modality] == "texture"]
    assert len(share) > 5
    assert min(share) == 0
    assert max(share) > 0.5


def test_training_starts_from_given_weights(tmp_path):
    torch.manual_seed(3)
    trained = TinyTraining(SHORT)
    with torch.no_grad():
        trained.clip.visual.proj.add_(1)
    export(trained.clip, tmp_path / "start.safetensors")
    started = TinyTraining(Settings(steps=4, batch=8, views=2, start=tmp_path / "start.safetensors"))
    torch.testing.assert_close(started.clip.visual.proj, trained.clip.visual.proj, atol=2e-3, rtol=0)


def test_export_blends_the_start_in(tmp_path):
    clips = [TinyTraining(Settings(seed=seed)).clip for seed in (0, 1)]
    start, own = (export(clip, tmp_path / f"{seed}.safetensors") for seed, clip in enumerate(clips))
    blended = load_file(export(clips[1], tmp_path / "blended.safetensors", start, 0.25))["visual.proj"]
    expected = 0.25 * load_file(start)["visual.proj"] + 0.75 * load_file(own)["visual.proj"]
    torch.testing.assert_close(blended, expected, atol=2e-3, rtol=2e-3)
    assert not torch.allclose(blended, load_file(own)["visual.proj"], atol=2e-3)
