# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The resize before the model, in training and in an exported graph, and the normalisation after it."""

import numpy as np
import openvino
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision.tv_tensors import Image as ImageTensor
from torchvision.tv_tensors import Mask

from anomalib_mvfa.post_processing import MVFAPostProcessor
from anomalib_mvfa.pre_processing import EightBitResize, ExportableResize, MVFAPreProcessor

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


def test_image_of_the_right_size_is_not_rounded(resize_graph):
    image = ImageTensor(torch.rand(3, 48, 40))
    assert torch.equal(EightBitResize((48, 40))(image), image)
    assert torch.equal(ExportableResize((48, 40))(image[None]), image[None])
    assert torch.equal(resize_graph(image[None]), image[None])


@pytest.fixture(scope="module")
def resize_graph(tmp_path_factory):
    """The exportable resize to 48 x 40 as an OpenVINO graph with dynamic sizes."""
    path = tmp_path_factory.mktemp("graph") / "resize.onnx"
    sizes = {axis: torch.export.Dim(name) for axis, name in ((0, "batch"), (2, "height"), (3, "width"))}
    example = (torch.zeros(2, 3, 32, 32),)
    resize = ExportableResize((48, 40)).eval()
    torch.onnx.export(resize, example, path, dynamic_shapes=(sizes,), dynamo=True, opset_version=18, verbose=False)
    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: torch.from_numpy(model(images.numpy())[0].copy())


@pytest.mark.parametrize(
    "shape", [(140, 96), (300, 57), (20, 30), (48, 200), (49, 40), (47, 39), (1, 1), (2047, 3001), (4000, 41)]
)
def test_exported_resize_is_that_of_pillow_to_one_grey_level(resize_graph, shape):
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (2, 3, *shape), generator=generator).float() / 255
    expected = EightBitResize((48, 40))(images)
    for given in (resize_graph(images), ExportableResize((48, 40))(images)):
        levels = ((given - expected) * 255).abs()
        assert float(levels.max()) <= 1 + 1e-3
        assert float((levels > 0.5).float().mean()) < 0.005


def test_exported_resize_clamps_and_rounds_to_eight_bits(resize_graph):
    images = 2 * torch.rand(1, 3, 70, 60, generator=torch.Generator().manual_seed(4)) - 0.5
    given = resize_graph(images)
    assert_close(given * 255, (given * 255).round(), atol=1e-3, rtol=0)
    assert ((given - EightBitResize((48, 40))(images)) * 255).abs().max() <= 1 + 1e-3


def test_order_is_strict_outside_the_validation_range():
    scores = torch.linspace(-3, 4, 400)
    normalised = normalise(scores)
    assert bool((normalised.diff() > 0).all())
    assert 0 <= float(normalised.min()) < float(normalised.max()) <= 1


def test_threshold_is_one_half_and_the_middle_is_linear():
    normalised = normalise(torch.tensor([0.6, 0.6 + 0.06, 0.6 - 0.12]))
    assert_close(normalised, torch.tensor([0.5, 0.6, 0.3]))


def test_without_threshold_the_middle_of_the_range_is_one_half():
    assert float(normalise(torch.tensor([0.5]), threshold=float("nan"))) == pytest.approx(0.5)


def test_without_range_scores_are_squashed_in_their_order():
    scores = torch.tensor([-1.0, 0.0, 0.3, 7.0])
    expected = torch.tensor([0.25, 0.5, 0.5 + 0.15 / 1.3, 0.9375])
    assert_close(normalise(scores, float("nan"), float("nan")), expected)
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
