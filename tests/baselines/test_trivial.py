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
    normal = torch.stack([torch.full((3, 64, 64), 0.2), torch.full((3, 64, 64), 0.4)])
    images = torch.full((2, 3, 64, 64), 0.3)
    images[1, :, 40:50, 10:20] = 1.0
    output = DistanceToMean(normal, blur=2.0)(images)
    torch.testing.assert_close(output.pred_score, torch.tensor([0.0, 0.7 * 100 / 64**2]))
    assert output.anomaly_map.shape == (2, 64, 64)
    row, column = divmod(int(output.anomaly_map[1].argmax()), 64)
    assert 43 <= row <= 46
    assert 13 <= column <= 16
