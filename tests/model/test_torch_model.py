# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Behaviour of the network that needs no reference numbers: batches, precision, bank, prompts, variants."""

import pytest
import torch
from torch.testing import assert_close

from anomalib_mvfa import MVFAModel
from anomalib_mvfa.data.augmentation import support_versions
from anomalib_mvfa.model import memory, torch_model
from anomalib_mvfa.model.fusion import Fusion
from anomalib_mvfa.model.loss import training_losses
from anomalib_mvfa.model.memory import MemoryBank, Support, bank_distance
from anomalib_mvfa.model.variant import Variant

PAPER = Variant(
    quick_gelu=True,
    normalize_input=True,
    activation="relu",
    residual=(0.9, 0.05, 0.05),
    last_level_projector=True,
    pooling="max",
    level_reduction="mean",
    bce_as_logits=False,
)


@pytest.fixture
def images():
    return torch.rand(4, 3, 112, 112, generator=torch.Generator().manual_seed(1))


def make_support(normal, abnormal=1, versions=3):
    pictures = torch.rand(normal + abnormal, 3, 112, 112, generator=torch.Generator().manual_seed(2))
    return Support(support_versions(pictures[:normal])[:versions], pictures[normal:])


@pytest.mark.parametrize("has_masks", [True, False])
@torch.no_grad()
def test_batch_equals_single_images(tiny, images, has_masks):
    tiny.has_masks = has_masks
    tiny.remember(make_support(2))
    batch = tiny(images)
    singles = [tiny(image[None]) for image in images]
    assert_close(batch.anomaly_map, torch.cat([single.anomaly_map for single in singles]), atol=1e-4, rtol=0)
    assert_close(batch.pred_score, torch.cat([single.pred_score for single in singles]), atol=1e-4, rtol=0)


@torch.no_grad()
def test_early_exit_drops_blocks_and_keeps_the_levels_before(tiny, images):
    short = MVFAModel("tiny", levels=[1, 2], class_name="Brain").eval()
    assert (len(tiny.tower.tower.blocks), len(short.tower.tower.blocks)) == (4, 2)
    for kind in ("seg_adapters", "det_adapters"):
        for level in range(2):
            getattr(short, kind)[level].load_state_dict(getattr(tiny, kind)[level].state_dict())
    full, early = tiny.hidden_tokens(images), short.hidden_tokens(images)
    for level in range(2):
        assert torch.equal(full.segmentation[level], early.segmentation[level])
        assert torch.equal(full.detection[level], early.detection[level])


@pytest.mark.parametrize("levels", [[0, 2], [4, 2], [2, 2], [2, 5]])
def test_levels_outside_the_tower_are_refused(levels):
    with pytest.raises(ValueError, match="between 1 and 4"):
        MVFAModel("tiny", levels=levels)


@torch.no_grad()
def test_autocast_gives_float32_scores_near_full_precision(tiny, images):
    tiny.remember(make_support(2))
    full = tiny.branches(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = tiny.branches(images)
        fused = tiny(images)
    assert fused.pred_score.dtype == fused.anomaly_map.dtype == torch.float32
    assert bool(fused.anomaly_map.isfinite().all())
    assert_close(low[0].score / len(tiny.levels), full[0].score / len(tiny.levels), atol=0.05, rtol=0)
    assert_close(low[1].score / len(tiny.levels), full[1].score / len(tiny.levels), atol=0.02, rtol=0)


def recorded_ranges(model, monkeypatch, support):
    recorded = []
    monkeypatch.setattr(model, "set_fusion_range", recorded.extend)
    model.remember(support)
    return recorded


@torch.no_grad()
def test_normal_support_is_compared_with_the_others_only(tiny, monkeypatch):
    support = make_support(3)
    recorded = recorded_ranges(tiny, monkeypatch, support)
    assert len(recorded) == 4
    own = tiny.map_tokens(tiny.hidden_tokens(support.normal[0]))
    for index in range(3):
        rest = [position for position in range(3) if position != index]
        with monkeypatch.context() as patch:
            patch.setattr(tiny, "set_fusion_range", lambda _: None)
            tiny.remember(Support(support.normal[:, rest], support.abnormal))
        expected = tiny.memory_branch([tokens[index : index + 1] for tokens in own], tiny.memory)
        assert_close(recorded[index][1].anomaly_map, expected.anomaly_map, atol=1e-4, rtol=0)
        assert float(recorded[index][1].anomaly_map.min()) > 1e-3


@torch.no_grad()
def test_only_normal_support_is_compared_with_its_changed_versions(tiny, monkeypatch):
    support = make_support(1, abnormal=0)
    recorded = recorded_ranges(tiny, monkeypatch, support)
    assert len(recorded) == 1
    assert tiny.memory[0].shape[0] == 3 * 197
    assert float(recorded[0][1].score) > 1e-3


@torch.no_grad()
def test_bank_excludes_abnormal_supports(tiny):
    support = make_support(2)
    tiny.remember(support)
    with_abnormal = [tiny.memory[level].clone() for level in range(4)]
    tiny.remember(Support(support.normal, support.abnormal[:0]))
    assert all(torch.equal(tiny.memory[level], entries) for level, entries in enumerate(with_abnormal))


@torch.no_grad()
def test_image_in_the_bank_has_no_distance(tiny):
    support = make_support(2)
    tiny.remember(support)
    known = tiny.branches(support.normal[0])[1]
    new = tiny.branches(support.abnormal)[1]
    assert float(known.anomaly_map.abs().max()) < 1e-5
    assert float(new.anomaly_map.max()) > 1e-2


def test_search_in_chunks_equals_the_full_matrix(monkeypatch):
    generator = torch.Generator().manual_seed(4)
    queries = torch.randn(2, 9, 16, generator=generator)
    bank = torch.nn.functional.normalize(torch.randn(101, 16, generator=generator), dim=-1)
    full = 1 - torch.einsum("bpe,ne->bpn", torch.nn.functional.normalize(queries, dim=-1), bank).amax(dim=-1)
    for chunk in (7, 100, 101, 500):
        monkeypatch.setattr(memory, "BANK_CHUNK", chunk)
        assert_close(bank_distance(queries, bank), full, atol=1e-6, rtol=0)


@pytest.mark.parametrize("coreset", [1.0, 0.2])
@torch.no_grad()
def test_supports_are_compared_with_the_entries_of_the_others_that_inference_uses(coreset):
    torch.manual_seed(3)
    model = MVFAModel("tiny", class_name="Brain", coreset=coreset).eval()
    support = make_support(3, abnormal=2)
    output = model.remember(support)
    assert output.labels.tolist() == [False] * 3 + [True] * 2
    count, length = 3, 1 + model.tower.grid_size[0] * model.tower.grid_size[1]
    assert len(model.memory[0]) == int(coreset * 3 * count * length)
    tokens = model.map_tokens(model.hidden_tokens(support.normal.flatten(0, 1)))
    for index in range(count):
        distances = []
        for level, hidden in enumerate(tokens):
            unit = torch.nn.functional.normalize(hidden, dim=-1)  # (V * K, L, E)
            bank = model.memory[level]
            own = unit[index::count].flatten(0, 1)  # all versions of this support
            others = bank[(bank @ own.T).amax(dim=1) < 1 - 1e-6]
            assert 0 < len(others) < len(bank)
            distances.append(1 - (unit[index, 1:] @ others.T).amax(dim=-1))
        expected = torch.stack(distances).sum(dim=0).reshape(model.tower.grid_size)
        found = output.memory.anomaly_map[index]
        corners = expected[[0, 0, -1, -1], [0, -1, 0, -1]]  # interpolation leaves the corners as they are
        assert_close(found[[0, 0, -1, -1], [0, -1, 0, -1]], corners, atol=1e-4, rtol=0)
    low, high = output.memory.anomaly_map.aminmax()
    assert_close(model.fusion.memory_map, torch.stack([low, high]))


@torch.no_grad()
def test_a_coreset_of_one_image_compares_it_with_nothing(tiny):
    tiny.memory.coreset = 0.002
    tiny.seg_memory.coreset = 0.002
    output = tiny.remember(make_support(2, abnormal=1, versions=2))
    assert output is None or bool(output.memory.anomaly_map.isfinite().all())
    assert bool(tiny.fusion.memory_map.isfinite().all())


@pytest.mark.parametrize("window_sizes", [(1,), (1, 3, 5)])
@torch.no_grad()
def test_a_remembered_image_has_distance_zero(window_sizes):
    torch.manual_seed(3)
    model = MVFAModel("tiny", class_name="Brain", variant={"window_sizes": window_sizes}).eval()
    support = make_support(2)
    model.remember(support)
    memory = model.branches(support.normal[0])[1]
    assert float(memory.anomaly_map.abs().max()) < 1e-5


@torch.no_grad()
def test_an_unused_bank_leaves_the_model_zero_shot(tiny, images):
    before = tiny(images[:1])
    tiny.remember(make_support(1))
    assert tiny.branches(images[:1])[1] is not None
    tiny.use_memory = False
    assert tiny.branches(images[:1])[1] is None
    assert torch.equal(tiny(images[:1]).anomaly_map, before.anomaly_map)


def test_gradients_reach_the_adapters_and_never_the_tower(tiny, images):
    tiny.train()
    assert not tiny.tower.training
    language, _ = tiny.branches(images)
    (language.anomaly_map.mean() + language.score.sum()).backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in tiny.tower.parameters())
    assert float(tiny.seg_adapters[0].fc1[0].weight.grad.abs().max()) > 0
    assert float(tiny.det_adapters[0].fc1[0].weight.grad.abs().max()) > 0


def test_text_tower_is_dropped_once_the_class_is_known(images):
    model = MVFAModel("tiny", class_name=None)
    assert model._text is not None
    with pytest.raises(RuntimeError, match="set_class_name"):
        model(images[:1])
    model.set_class_name("Brain")
    assert model._text is None
    assert not any("token_embedding" in name for name in model.state_dict())
    assert_close(model.text_features.norm(dim=0), torch.ones(2))


def test_class_change_encodes_again_and_the_same_class_does_not(tiny, monkeypatch):
    calls = []
    load = torch_model.load_clip
    monkeypatch.setattr(torch_model, "load_clip", lambda config: calls.append(config) or load(config))
    brain = tiny.text_features.clone()
    tiny.set_class_name("Brain")
    assert calls == []
    tiny.set_class_name("Liver")
    assert len(calls) == 1
    assert float((tiny.text_features - brain).abs().max()) > 1e-3
    tiny.set_class_name("Brain")
    assert_close(tiny.text_features, brain)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@torch.no_grad()
def test_constant_images_and_supports_give_finite_values(tiny, value):
    constant = torch.full((2, 3, 112, 112), value)
    tiny.remember(Support(support_versions(constant), constant[:0]))
    prediction = tiny(constant)
    assert bool(prediction.anomaly_map.isfinite().all())
    assert bool(prediction.pred_score.isfinite().all())


def test_images_of_another_size_are_refused(tiny):
    with pytest.raises(ValueError, match="112 x 112 pixels, got 96 x 112"):
        tiny(torch.zeros(1, 3, 96, 112))


def test_paper_preset_sets_every_choice_that_differs():
    assert Variant.of("paper") == PAPER
    assert Variant.of(None) == Variant.of("released") == Variant()
    assert Variant.of({"pooling": "max", "residual": [0.8, 0.1, 0.1]}) == Variant(pooling="max")


@pytest.mark.parametrize(
    ("variant", "published", "others"),
    [(Variant(), False, None), (PAPER, True, None), (Variant(quick_gelu=True), True, True)],
)
def test_presets_choose_the_activation_of_the_published_backbone_alone(variant, published, others):
    assert variant.on(published_backbone=True).quick_gelu is published
    assert variant.on(published_backbone=False).quick_gelu is others


@pytest.mark.parametrize(
    ("choice", "published", "normalized", "expected"),
    [
        (None, True, True, False),  # as released
        (None, False, True, True),  # as the weights expect
        (None, False, False, False),  # nothing is known
        (True, True, True, True),
        (False, False, True, False),
    ],
)
def test_input_is_normalised_where_the_weights_say_how(choice, published, normalized, expected):
    variant = Variant(normalize_input=choice).on(published_backbone=published, normalized=normalized)
    assert variant.normalize_input is expected


@torch.no_grad()
def test_paper_variant_runs_its_choices(images):
    model = MVFAModel("tiny", class_name="Brain", variant="paper")
    hidden = model.hidden_tokens(images[:1]).segmentation
    assert all(float(tokens.min()) >= 0 for tokens in hidden[:-1])  # ReLU
    assert float(hidden[-1].min()) < 0  # linear
    probabilities, score = model.level_map(hidden[0]), model.level_score(hidden[0])
    assert float(score) >= float(probabilities[:, 1].max()) - 1e-5  # maximum over patches
    assert 0 <= float(model(images[:1]).pred_score) <= 1  # mean over levels


@pytest.mark.parametrize(
    "choice",
    [
        {"activation": "gelu"},
        {"pooling": "median"},
        {"level_reduction": "max"},
        {"residual": (0.9, 0.1)},
        {"window_sizes": (2,)},
        {"window_sizes": ()},
        {"map_blur": -1.0},
        {"sharpness": 3},
    ],
)
def test_unknown_choices_are_refused_by_name(choice):
    with pytest.raises(ValueError, match=next(iter(choice))):
        Variant.of(choice)


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="released, paper"):
        MVFAModel("tiny", variant="draft")


@pytest.mark.parametrize("choice", [{"window_sizes": (1, 3, 5)}, {"map_blur": 2.0}, {"residual_norm": True}])
@torch.no_grad()
def test_later_choices_change_the_map_and_stay_finite(tiny, images, choice):
    model = MVFAModel("tiny", class_name="Brain", variant=choice).eval()
    model.seg_adapters.load_state_dict(tiny.seg_adapters.state_dict())
    model.det_adapters.load_state_dict(tiny.det_adapters.state_dict())
    support = make_support(1)
    for each in (model, tiny):
        each.remember(support)
    ours, released = model(images).anomaly_map, tiny(images).anomaly_map
    assert bool(ours.isfinite().all())
    assert float((ours - released).abs().max()) > 1e-4
    if "map_blur" in choice:
        assert float(ours.std()) < float(released.std())
        assert_close(model(images).pred_score, tiny(images).pred_score)


def test_presets_select_fewer_levels_and_drop_the_blocks_behind() -> None:
    """``half`` and ``middle`` end the tower at half its depth."""
    half = MVFAModel(backbone="tiny", class_name="Brain", levels="half")
    middle = MVFAModel(backbone="tiny", class_name="Brain", levels="middle")
    assert half.levels == (1, 2)
    assert middle.levels == (2,)
    assert len(half.tower.tower.blocks) == len(middle.tower.tower.blocks) == 2


def test_unknown_preset_of_levels_is_refused() -> None:
    """The message names the presets that exist."""
    with pytest.raises(ValueError, match="'half' or 'middle', got 'quick'"):
        MVFAModel(backbone="tiny", class_name="Brain", levels="quick")


def test_coreset_keeps_a_share_of_the_bank_and_covers_the_rest() -> None:
    """The smaller bank is a part of the whole one, the same part each time, with entries of every group."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(10, 1, 32, generator=generator) + 0.01 * torch.randn(10, 10, 32, generator=generator)
    whole, small, again = MemoryBank(1), MemoryBank(1, coreset=0.2), MemoryBank(1, coreset=0.2)
    for bank in (whole, small, again):
        bank.remember([groups])
    assert small[0].shape == (20, 32)
    assert torch.equal(small[0], again[0])
    assert bank_distance(small[0][None], whole[0]).max() < 1e-6
    assert bank_distance(whole[0][None], small[0]).max() < 1e-2
    assert bank_distance(whole[0][None], whole[0][:20]).max() > 0.1  # the first entries leave groups out


def test_share_of_the_bank_outside_its_range_is_refused() -> None:
    """Nothing and more than everything cannot be kept."""
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="share of the bank"):
            MemoryBank(1, coreset=share)


def test_a_reset_network_is_as_new_but_for_its_prompts(tiny, images):
    tiny.seg_memory.coreset = tiny.det_memory.coreset = 0.5
    tiny.remember(make_support(2))
    tiny.has_masks = False
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    torch.manual_seed(11)
    tiny.reset()
    for name, value in tiny.state_dict().items():
        if "adapters" in name:
            assert not torch.equal(value, before[name])
        elif name.startswith("fusion"):
            assert value.tolist() == [0, 1]
    assert tiny.has_masks
    for bank in (tiny.seg_memory, tiny.det_memory):
        assert bank.is_empty
        assert (bank.num_levels, bank.coreset) == (len(tiny.levels), 0.5)
    assert tiny.fusion.language_weight == 0.5
    assert torch.equal(tiny.text_features, before["text_features"])
    assert_close(tiny(images).pred_score, MVFAModel.fuse(tiny, *tiny.branches(images)).pred_score)


@torch.no_grad()
def test_normalised_input_is_scaled_by_mean_and_deviation_of_each_channel(images):
    plain, scaled = (
        MVFAModel("tiny", class_name="Brain", variant={"normalize_input": choice}) for choice in (False, True)
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (plain.backbone.mean, plain.backbone.std))
    assert_close(scaled.first_level_tokens(images), plain.first_level_tokens((images - mean) / std))
    single, batch = scaled.first_level_tokens(images[:1]), scaled.first_level_tokens(images)
    assert_close(single, batch[:1])


@torch.no_grad()
def test_memory_scores_are_reduced_over_all_positions(images):
    for pooling, reduce in (("max", torch.amax), ("mean", torch.mean)):
        model = MVFAModel("tiny", class_name="Brain", variant={"pooling": pooling})
        model.remember(make_support(2))
        hidden = model.hidden_tokens(images)
        levels = [
            model.memory_branch([tokens], bank_of(model, level)) for level, tokens in enumerate(hidden.segmentation)
        ]
        expected = sum(reduce(level.anomaly_map, dim=(1, 2)) for level in levels)
        assert_close(model.memory_branch(hidden.segmentation, model.memory).score, expected)


def bank_of(model, level):
    """The bank of one level alone."""
    bank = MemoryBank(1)
    bank.level_0 = model.memory[level]
    return bank


def test_entries_of_a_bank_have_unit_length_each():
    bank = MemoryBank(2)
    tokens = [torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(level)) for level in range(2)]
    kept = bank.remember(tokens)
    for level in range(2):
        assert_close(bank[level].norm(dim=1), torch.ones(15))
        assert_close(bank[level], tokens[level].flatten(0, 1) / tokens[level].flatten(0, 1).norm(dim=1, keepdim=True))
        assert kept[level].tolist() == list(range(15))


def test_branches_are_blended_unscaled_before_ranges_are_known():
    fusion = Fusion(0.25)
    language, memory_values = torch.tensor([0.2, 0.6]), torch.tensor([0.4, 0.0])
    for kind in ("map", "score"):
        assert_close(fusion(language, memory_values, kind), 0.25 * language + 0.75 * memory_values)
    fusion.fit(language_score=torch.tensor([[0.2, 0.6]]), memory_score=torch.tensor([0.3, 0.3]))
    assert_close(fusion(language, memory_values, "score"), torch.tensor([0.075, 0.25 - 0.225]))
    assert_close(fusion(language, memory_values, "map"), 0.25 * language + 0.75 * memory_values)


def test_a_backbone_that_says_nothing_of_its_images_leaves_them_as_they_are():
    assert Variant().on(published_backbone=False).normalize_input is False


@torch.no_grad()
def test_nothing_is_computed_that_nothing_reads(tiny, images, monkeypatch):
    tiny.remember(make_support(2))
    expected = tiny(images)
    for adapters in (tiny.seg_adapters, tiny.det_adapters):
        adapters[-1].fc2 = None  # what the last level would mix into the tokens
    calls = []
    for name in ("level_map", "level_score"):
        compute = getattr(MVFAModel, name)
        monkeypatch.setattr(
            MVFAModel, name, lambda *given, compute=compute, name=name: calls.append(name) or compute(*given)
        )
    assert torch.equal(tiny(images).anomaly_map, expected.anomaly_map)
    assert sorted(calls) == ["level_map"] * 4 + ["level_score"] * 4


def test_images_of_sets_without_masks_have_no_loss_of_the_map(tiny, images):
    labels, masks = torch.tensor([1, 1]), torch.zeros(2, 112, 112)
    masks[:, 20:40, 20:40] = 1
    mixed = training_losses(tiny, images[:2], labels, masks, torch.tensor([True, False]))
    full = training_losses(tiny, images[:2], labels, masks, torch.tensor([True, True]))
    plain = training_losses(tiny, images[:2], labels, masks)
    assert mixed.keys() == full.keys() == plain.keys() == {"bce", "focal", "dice"}
    for name in ("focal", "dice"):
        assert mixed[name][1] == 0
        assert mixed[name][0] == full[name][0] > 0
        assert torch.equal(full[name], plain[name])
    assert training_losses(tiny, images[:2], labels, masks, torch.tensor([False, False])).keys() == {"bce"}
