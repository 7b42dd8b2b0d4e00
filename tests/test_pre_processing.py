# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The resize before and the normalisation after the model."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.tv_tensors import Image as ImageTensor
from torchvision.tv_tensors import Mask

from anomalib_mvfa.post_processing import MVFAPostProcessor
from anomalib_mvfa.pre_processing import EightBitResize, MVFAPreProcessor

SIZES = [((97, 61), (40, 40)), ((30, 50), (56, 112)), ((40, 80), (40, 40))]


def normalise(scores, low=0.2, high=0.8, threshold=0.6):
    limits = (torch.tensor(value) for value in (low, high, threshold))
    return MVFAPostProcessor._normalize(scores, *limits)


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_images_equal_pillows_bicubic_in_every_bit(source, target):
    pixels = np.random.default_rng(0).integers(0, 256, (*source, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize(target[::-1], Image.Resampling.BICUBIC))
    image = ImageTensor(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
    resized = EightBitResize(target)(image)
    assert torch.equal((resized * 255).round().to(torch.uint8).permute(1, 2, 0), torch.from_numpy(expected.copy()))
    assert torch.equal(EightBitResize(target)(image[None].expand(3, -1, -1, -1))[2], resized)


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_masks_equal_pillows_nearest(source, target):
    pixels = (np.random.default_rng(1).random(source) > 0.7).astype(np.uint8)
    expected = np.array(Image.fromarray(pixels).resize(target[::-1], Image.Resampling.NEAREST))
    assert torch.equal(
        torch.as_tensor(EightBitResize(target)(Mask(torch.from_numpy(pixels)))), torch.from_numpy(expected)
    )


def test_image_of_the_right_size_is_not_rounded():
    image = ImageTensor(torch.rand(3, 16, 16))
    assert torch.equal(EightBitResize((16, 16))(image), image)


def test_order_is_strict_outside_the_validation_range():
    scores = torch.linspace(-3, 4, 400)
    normalised = normalise(scores)
    assert bool((normalised.diff() > 0).all())
    assert 0 <= float(normalised.min()) < float(normalised.max()) <= 1


def test_threshold_is_one_half_and_the_middle_is_linear():
    normalised = normalise(torch.tensor([0.6, 0.6 + 0.06, 0.6 - 0.12]))
    torch.testing.assert_close(normalised, torch.tensor([0.5, 0.6, 0.3]))


def test_without_threshold_the_middle_of_the_range_is_one_half():
    assert float(normalise(torch.tensor([0.5]), threshold=float("nan"))) == pytest.approx(0.5)


def test_without_range_scores_are_squashed_in_their_order():
    scores = torch.tensor([-1.0, 0.0, 0.3, 7.0])
    expected = torch.tensor([0.25, 0.5, 0.5 + 0.15 / 1.3, 0.9375])
    torch.testing.assert_close(normalise(scores, float("nan"), float("nan")), expected)
    assert MVFAPostProcessor._normalize(None, *torch.zeros(3)) is None


def test_range_of_width_zero_stays_finite():
    normalised = normalise(torch.tensor([0.2, 0.5, 0.9]), low=0.5, high=0.5, threshold=0.5)
    assert bool(normalised.isfinite().all())
    assert bool((normalised.diff() > 0).all())


def test_checkpoint_config_restores_the_size():
    restored = MVFAPreProcessor((8, 8))
    restored.load_checkpoint_config(MVFAPreProcessor((24, 40)).checkpoint_config())
    assert restored.checkpoint_config() == {"image_size": [24, 40]}
    image = torch.rand(3, 33, 20)
    assert torch.equal(restored.transform(image), EightBitResize((24, 40))(image))


def test_transform_stays_the_same_object_when_a_checkpoint_changes_its_size():
    pre_processor = MVFAPreProcessor((240, 240))
    held_by_a_dataset = pre_processor.transform
    pre_processor.load_checkpoint_config({"image_size": [112, 96]})
    assert pre_processor.transform is held_by_a_dataset
    assert held_by_a_dataset(torch.rand(3, 50, 40)).shape == (3, 112, 96)
    assert pre_processor.export_transform(torch.rand(1, 3, 50, 40)).shape == (1, 3, 112, 96)
