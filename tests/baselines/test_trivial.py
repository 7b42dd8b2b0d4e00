# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""What the trivial baselines answer to, and what not."""

import torch

from anomalib_mvfa.baselines import DistanceToMean, GreyLevels


def test_brightness_and_variance_see_only_themselves():
    flat = torch.tensor([0.2, 0.6]).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    stripes = flat.clone()
    stripes[..., ::2] += 0.1
    stripes[..., 1::2] -= 0.1
    torch.testing.assert_close(GreyLevels()(stripes).pred_score, torch.tensor([0.2, 0.6]))
    torch.testing.assert_close(GreyLevels(variance=True)(stripes).pred_score, torch.tensor([0.01, 0.01]))
    torch.testing.assert_close(GreyLevels(variance=True)(flat).pred_score, torch.zeros(2))


def test_distance_finds_what_no_normal_image_has():
    ramp = torch.linspace(0, 0.3, 64)
    normal = ramp + torch.stack([torch.full((3, 64, 64), 0.1), torch.full((3, 64, 64), 0.3)])
    images = (ramp + 0.2).repeat(2, 3, 64, 1)
    images[1, :, 40:50, 10:20] += 0.7
    output = DistanceToMean(normal, blur=2.0)(images)
    torch.testing.assert_close(output.pred_score, torch.tensor([0.0, 0.7 * 100 / 64**2]))
    assert output.anomaly_map.shape == (2, 64, 64)
    row, column = divmod(int(output.anomaly_map[1].argmax()), 64)
    assert 43 <= row <= 46
    assert 13 <= column <= 16


def test_the_map_is_blurred_by_the_given_standard_deviation_over_two_of_them_on_either_side():
    image = torch.zeros(1, 3, 64, 64)
    image[..., 32, 32] = 1.0
    for options, blur, side in (({"blur": 2.0}, 2.0, 9), ({}, 4.0, 17)):
        found = DistanceToMean(torch.zeros(1, 3, 64, 64), **options)(image).anomaly_map[0]
        kernel = torch.exp(-(((torch.arange(side) - side // 2) / blur) ** 2) / 2)
        kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
        start, stop = 32 - side // 2, 33 + side // 2
        torch.testing.assert_close(found[start:stop, start:stop], kernel, rtol=1e-4, atol=1e-6)
        assert int((found > 0).sum()) == side**2
