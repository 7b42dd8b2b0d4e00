# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Synthetic lesions: where they lie, what they change, that the mask is exact, and that the seed decides."""

import math

import pytest
import torch
from lightning import seed_everything
from torch import Generator, Tensor

from anomalib_mvfa.training.lesions import LESION_KINDS, LesionSynthesizer, estimate_body

GREY_LEVEL = 1 / 255
KINDS = ("intensity", "cutpaste", "texture", "deformation")
SEEDS = range(12)

each_kind = pytest.mark.parametrize("kind", KINDS)


def seeded(seed: int) -> Generator:
    return torch.Generator().manual_seed(seed)


def synthesizer(*kinds: str, **ranges: tuple[float, float]) -> LesionSynthesizer:
    chosen = LesionSynthesizer()
    chosen.kinds = kinds or KINDS
    for name, value in ranges.items():
        assert hasattr(chosen, name)
        setattr(chosen, name, value)
    return chosen


def disc(height: int, width: int, radius: float) -> Tensor:
    rows, columns = torch.arange(height)[:, None] - height / 2, torch.arange(width)[None] - width / 2
    return torch.hypot(rows, columns) < radius


def slice_like(height: int = 96, width: int = 96, seed: int = 0) -> Tensor:
    """Grey: a disc of coarse and fine structure on black."""
    coarse = torch.rand(1, 1, 8, 8, generator=seeded(seed))
    coarse = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    fine = torch.rand(1, height, width, generator=seeded(seed + 1))
    image = (0.3 + 0.3 * coarse + 0.1 * fine) * disc(height, width, 0.4 * min(height, width))
    return image.expand(3, -1, -1).clone()


def colour_like(seed: int = 0) -> Tensor:
    """Colour, without a background."""
    return torch.rand(3, 80, 80, generator=seeded(seed)) * torch.tensor([0.9, 0.5, 0.8])[:, None, None]


@each_kind
def test_same_generator_state_gives_same_lesion(kind):
    image = slice_like()
    before = image.clone()
    first, first_mask = synthesizer(kind)(image, seeded(3))
    again, again_mask = synthesizer(kind)(image, seeded(3))
    other, _ = synthesizer(kind)(image, seeded(4))
    assert torch.equal(first, again)
    assert torch.equal(first_mask, again_mask)
    assert not torch.equal(first, other)
    assert torch.equal(image, before)


@each_kind
@pytest.mark.parametrize("image", [slice_like(), colour_like()], ids=["grey", "colour"])
def test_mask_is_exactly_where_the_image_changes(kind, image):
    for seed in SEEDS:
        lesioned, mask = synthesizer(kind)(image, seeded(seed))
        change = (lesioned - image).abs().amax(0)
        assert mask.dtype == torch.bool
        assert change[~mask].max() <= GREY_LEVEL
        assert (change[mask] > GREY_LEVEL).float().mean() >= 0.5
        assert change[mask].max() > 5 * GREY_LEVEL
        assert lesioned.min() >= 0
        assert lesioned.max() <= 1


@each_kind
def test_lesions_lie_inside_the_body(kind):
    image = slice_like()
    body = disc(96, 96, 0.4 * 96)
    for seed in SEEDS:
        lesioned, mask = synthesizer(kind)(image, seeded(seed))
        assert (mask & ~body).sum() <= 0.03 * mask.sum()  # the smoothed outline is a pixel wider here and there
        assert torch.equal(lesioned[:, ~disc(96, 96, 0.4 * 96 + 2)], image[:, ~disc(96, 96, 0.4 * 96 + 2)])


@each_kind
def test_grey_images_stay_grey(kind):
    donor = colour_like(5)
    for seed in SEEDS:
        lesioned, _ = synthesizer(kind)(slice_like(), seeded(seed), donor)
        assert torch.equal(lesioned[0], lesioned[1])
        assert torch.equal(lesioned[0], lesioned[2])


def test_colour_images_shift_hue_only_slightly():
    image = torch.full((3, 64, 64), 0.4)
    image[0] = 0.5
    strong = synthesizer("intensity", contrast_range=(4, 4))
    changes = []
    for seed in SEEDS:
        lesioned, mask = strong(image, seeded(seed))
        changes.append((lesioned - image)[:, mask].mean(1))
    changes = torch.stack(changes)
    spread = (changes.amax(1) - changes.amin(1)) / changes.abs().amax(1)
    assert spread.min() > 0.005
    assert spread.median() < 0.3


@each_kind
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(56, 56), (30, 90)])
def test_constant_images_get_a_visible_lesion(kind, value, shape):
    image = torch.full((3, *shape), value)
    for seed in range(4):
        lesioned, mask = synthesizer(kind)(image, seeded(seed))
        assert torch.isfinite(lesioned).all()
        assert mask.sum() >= 9
        assert not mask.all()
        assert (lesioned - image).abs()[:, mask].mean() >= 0.0125
        assert lesioned.min() >= 0
        assert lesioned.max() <= 1


@each_kind
@pytest.mark.parametrize("shape", [(40, 100), (101, 57), (8, 8)])
def test_any_shape_of_image_and_donor(kind, shape):
    image = torch.rand(3, *shape, generator=seeded(0))
    lesioned, mask = synthesizer(kind)(image, seeded(1), torch.rand(3, 33, 71, generator=seeded(2)))
    assert lesioned.shape == image.shape
    assert mask.shape == shape
    assert mask.any()


@each_kind
def test_a_black_and_white_pattern_gets_a_lesion(kind):
    stripes = (torch.arange(64) // 2 % 2).float().expand(3, 64, 64)
    for seed in SEEDS:
        lesioned, mask = synthesizer(kind)(stripes, seeded(seed))
        assert torch.isfinite(lesioned).all()
        assert mask.sum() >= 9


def test_lesions_are_visible_at_56_pixels():
    for seed in range(40):
        image = slice_like(56, 56, seed)
        _, mask = synthesizer(size_range=(0.01, 0.02))(image, seeded(seed))
        assert 9 <= mask.sum() < 200


def test_all_kinds_are_about_equally_frequent(monkeypatch):
    chosen = []
    for kind, alter in LESION_KINDS.items():
        monkeypatch.setitem(
            LESION_KINDS, kind, lambda *args, kind=kind, alter=alter: chosen.append(kind) or alter(*args)
        )
    image, finished = slice_like(), []
    for seed in range(120):
        LesionSynthesizer()(image, seeded(seed))
        finished.append(chosen[-1])
    assert set(finished) == set(KINDS) == set(LESION_KINDS)
    assert all(finished.count(kind) >= 15 for kind in KINDS)


def test_intensity_is_brighter_in_some_and_darker_in_other_lesions():
    image = torch.full((3, 64, 64), 0.5)
    signs = set()
    for seed in range(20):
        lesioned, mask = synthesizer("intensity")(image, seeded(seed))
        signs.add(bool((lesioned - image)[:, mask].mean() > 0))
    assert signs == {True, False}


def test_intensity_turns_where_there_is_room():
    for value, sign in ((0.02, 1), (0.98, -1)):
        image = torch.full((3, 64, 64), value)
        for seed in SEEDS:
            lesioned, mask = synthesizer("intensity", contrast_range=(4, 4))(image, seeded(seed))
            assert sign * (lesioned - image)[:, mask].mean() > 0.02


def test_cutpaste_brings_the_donors_structure():
    flat = torch.full((3, 96, 96), 0.5)
    stripes = 0.3 + 0.4 * (torch.arange(96) // 3 % 2).float().expand(3, 96, 96)
    for seed in SEEDS:
        from_flat, mask = synthesizer("cutpaste", size_range=(0.3, 0.3))(flat, seeded(seed), flat)
        smooth = from_flat[0][mask].std()
        from_stripes, mask = synthesizer("cutpaste", size_range=(0.3, 0.3))(flat, seeded(seed), stripes)
        assert from_stripes[0][mask].std() > 0.06
        assert smooth < 0.05


def test_texture_keeps_the_mean_brightness():
    image = torch.rand(1, 96, 96, generator=seeded(0)).mul(0.4).add(0.3).expand(3, -1, -1)
    for seed in SEEDS:
        lesioned, mask = synthesizer("texture", size_range=(0.4, 0.4))(image, seeded(seed))
        change = (lesioned - image)[0][mask]
        assert abs(change.mean()) < 0.35 * change.abs().mean()


def test_deformation_moves_edges_and_invents_no_brightness(monkeypatch):
    monkeypatch.setitem(LESION_KINDS, "intensity", lambda *_: pytest.fail("a warp of stripes needs no replacement"))
    stripes = 0.2 + 0.5 * (torch.arange(96) // 6 % 2).float().expand(3, 96, 96)
    for seed in SEEDS:
        lesioned, mask = synthesizer("deformation")(stripes, seeded(seed))
        assert lesioned.min() >= 0.2 - 1e-6
        assert lesioned.max() <= 0.7 + 1e-6
        assert (lesioned - stripes)[0][mask].abs().max() > 0.1


def test_deformation_of_a_flat_image_becomes_an_intensity_lesion():
    image = torch.full((3, 64, 64), 0.5)
    lesioned, mask = synthesizer("deformation")(image, seeded(0))
    assert (lesioned - image)[:, mask].mean().abs() > 0.0125


def test_size_range_sets_the_diameter_relative_to_the_body():
    image = torch.full((3, 200, 200), 0.5)
    for size in (0.1, 0.2, 0.4):
        diameters = []
        for seed in range(30):
            _, mask = synthesizer("intensity", size_range=(size, size), softness_range=(0.05, 0.05))(
                image, seeded(seed)
            )
            diameters.append(2 * math.sqrt(mask.sum() / math.pi) / 200)
        assert sum(diameters) / 30 == pytest.approx(size, rel=0.2)


def test_contrast_range_sets_the_strength():
    image = slice_like()

    def strength(contrast: float) -> float:
        total = 0.0
        for seed in SEEDS:
            lesioned, mask = synthesizer("intensity", contrast_range=(contrast, contrast))(image, seeded(seed))
            total += float((lesioned - image).abs()[:, mask].mean())
        return total

    assert strength(3) > 1.8 * strength(1)


@pytest.mark.parametrize("radius", [15, 40])
def test_body_is_the_disc_with_holes_filled_and_specks_dropped(radius):
    body = disc(100, 120, radius)
    image = 0.4 * body.float() + 0.03 * torch.rand(100, 120, generator=seeded(0))
    image[disc(100, 120, radius / 3)] = 0.01  # a dark ventricle
    image[2:5, 20:24] = 1.0  # a marker
    found = estimate_body(image.expand(3, -1, -1))
    assert (found & body).sum() / (found | body).sum() > 0.93
    assert found[50, 60]
    assert not found[3, 22]


def test_body_may_be_darker_than_its_background():
    body = disc(100, 100, 30)
    image = torch.where(body, 0.4, 0.95).expand(3, -1, -1)
    found = estimate_body(image)
    assert (found & body).sum() / (found | body).sum() > 0.93


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_padding_is_not_body_and_gets_no_lesion(fill):
    image = 0.2 + 0.5 * torch.rand(1, 100, 100, generator=seeded(0)).expand(3, -1, -1).clone()
    padding = torch.arange(100)[:, None] > 60 + torch.arange(100)[None] / 3
    image[:, padding] = fill
    image[:, 20:26, 20:26] = fill  # a bright or dark spot inside is no padding
    found = estimate_body(image)
    assert (found & ~padding).sum() / (found | ~padding).sum() > 0.99
    for seed in SEEDS:
        _, mask = LesionSynthesizer()(image, seeded(seed))
        assert (mask & padding).sum() <= 0.02 * mask.sum()


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(3, 40, 60),
        torch.ones(3, 40, 60),
        torch.rand(1, 90, 70, generator=seeded(0)).expand(3, -1, -1),
        torch.linspace(0.1, 0.9, 80).expand(3, 60, 80),
        disc(100, 100, 5).float().expand(3, -1, -1),
    ],
    ids=["black", "white", "noise", "ramp", "speck"],
)
def test_body_is_everything_where_no_background_is_found(image):
    assert estimate_body(image).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(1, 20, 20), r"image must be floating point of shape \(3, H, W\)"),
        (torch.zeros(3, 20, 20, dtype=torch.uint8), "floating point"),
        (torch.full((3, 20, 20), 200.0), r"\[0, 1\]"),
        (torch.full((3, 20, 20), math.nan), "NaN"),
    ],
    ids=["one channel", "bytes", "0 to 255", "nan"],
)
def test_wrong_images_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        LesionSynthesizer()(image, seeded(0))
    with pytest.raises(ValueError, match="donor"):
        LesionSynthesizer()(torch.zeros(3, 20, 20), seeded(0), image)


def test_interpolation_overshoot_is_clamped():
    image = slice_like() * (1.001 / slice_like().max())
    lesioned, _ = synthesizer("intensity")(image, seeded(0))
    assert lesioned.max() <= 1
    assert image.max() - 1 == pytest.approx(0.001, rel=0.01)


@pytest.fixture
def normals():
    torch.manual_seed(11)
    return torch.stack([slice_like(seed=seed) for seed in range(5)])


def test_every_second_image_of_a_batch_gets_a_lesion_and_the_others_in_the_next_epoch(normals):
    before = normals.clone()
    lesions = LesionSynthesizer()
    lesioned, masks, labels = lesions.draw_on_half(normals, epoch=0, number=0)
    assert labels.tolist() == [True, False, True, False, True]
    assert masks.flatten(1).any(dim=1).tolist() == labels.tolist()
    assert torch.equal(lesioned[~labels], normals[~labels])
    assert all(not torch.equal(lesioned[index], normals[index]) for index in (0, 2, 4))
    assert torch.equal(normals, before)
    assert lesions.draw_on_half(normals, epoch=1, number=0)[2].tolist() == (~labels).tolist()
    assert lesions.draw_on_half(normals, epoch=0, number=1)[2].tolist() == (~labels).tolist()


def test_lesions_follow_the_global_seed(normals):
    def lesioned(epoch=0):
        return LesionSynthesizer().draw_on_half(normals, epoch, number=0)[0]

    seed_everything(3)
    first, in_epoch_2 = lesioned(), lesioned(2)
    torch.rand(7)  # what else is drawn in a training has no influence
    assert torch.equal(lesioned(), first)
    assert not torch.equal(in_epoch_2, first)
    state = torch.get_rng_state()
    seed_everything(4)
    other = lesioned()
    assert all(not torch.equal(first[index], other[index]) for index in (0, 2, 4))
    torch.set_rng_state(state)  # as a resumed training does
    assert torch.equal(lesioned(), first)


def test_lesion_of_an_image_does_not_depend_on_how_processes_share_the_images(normals):
    lesions = synthesizer("intensity", "texture", "deformation")
    whole, masks, _ = lesions.draw_on_half(normals, 0, number=0)
    for index in (0, 2, 4):
        alone, mask, _ = lesions.draw_on_half(normals[index : index + 1], 0, number=2 * index)
        assert torch.equal(alone[0], whole[index])
        assert torch.equal(mask[0], masks[index])


def test_two_images_get_different_lesions(normals):
    normals[2] = normals[0]
    normals[2, :, 48, 48] += 0.01
    _, masks, _ = synthesizer("intensity").draw_on_half(normals, 0, number=0)
    assert (masks[0] != masks[2]).sum() > 0.2 * masks[0].sum()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("epoch", [0, 1])
def test_pieces_come_from_images_without_a_lesion(normals, size, epoch, monkeypatch):
    donors = []
    cutpaste = LESION_KINDS["cutpaste"]
    monkeypatch.setitem(LESION_KINDS, "cutpaste", lambda *args: donors.append(args[3]) or cutpaste(*args))
    _, _, labels = synthesizer("cutpaste").draw_on_half(normals[:size], epoch, number=0)
    clean = normals[:size][~labels] if size > 1 else normals[:1]
    assert bool(donors) == bool(labels.any())
    for donor in donors:
        assert any(torch.equal(donor, image) for image in clean)
