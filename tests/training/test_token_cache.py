# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The cache of tokens below the first adapter."""

import torch
from torch import Tensor

from anomalib_mvfa import MVFA
from anomalib_mvfa.model import MVFAModel
from anomalib_mvfa.model.loss import training_losses
from anomalib_mvfa.training.token_cache import TokenCache


class Counter:
    """Doubles images and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, images: Tensor) -> Tensor:
        """Double images."""
        self.count += len(images)
        return 2 * images


def test_an_image_is_computed_once_whatever_batch_it_comes_in() -> None:
    """Keys are the content of the images, not their place."""
    images, compute = torch.rand(4, 3, 8, 8), Counter()
    cache = TokenCache(2**20, max_images=4)
    cache(images, compute)
    shuffled = cache(images[[2, 0]].clone(), compute)
    assert compute.count == 4
    assert torch.equal(shuffled, 2 * images[[2, 0]])


def test_memory_is_bounded_in_bytes() -> None:
    """Images that find no room are computed again."""
    images, compute = torch.rand(4, 3, 8, 8), Counter()
    cache = TokenCache(max_bytes=2 * 3 * 64 * 4, max_images=4)
    cache(images, compute)
    assert len(cache) == 2
    cache(images, compute)
    assert compute.count == 6


def test_images_that_change_close_the_cache() -> None:
    """Augmented anew in every epoch, images are never met again."""
    compute = Counter()
    cache = TokenCache(2**20, max_images=4)
    for _ in range(3):
        images = torch.rand(2, 3, 8, 8)
        assert torch.equal(cache(images, compute), 2 * images)
    assert not cache.open
    assert not len(cache)


def test_tokens_of_another_precision_are_not_mixed_up() -> None:
    """The same image has tokens of its own under autocast."""
    model = MVFAModel(backbone="tiny", class_name="Brain")
    images, cache = torch.rand(1, 3, 112, 112), TokenCache(2**20, max_images=4)
    full = cache(images, model.first_level_tokens)
    with torch.autocast("cpu", torch.bfloat16):
        half = cache(images, model.first_level_tokens)
    assert len(cache) == 2
    assert not torch.equal(full.float(), half.float())


def test_losses_and_gradients_are_those_without_a_cache() -> None:
    """What the cache keeps is below everything that is trained."""
    torch.manual_seed(0)
    model = MVFA(backbone="tiny", class_name="Brain")
    model.configure_model()
    images, labels = torch.rand(3, 3, 112, 112), torch.tensor([0, 1, 1])
    masks = torch.rand(3, 112, 112) > 0.5
    results = []
    for cache in (None, TokenCache(2**24, max_images=8)):
        for _ in range(2):  # the second time from the cache
            model.zero_grad()
            terms = training_losses(model.model, images, labels, masks, cache=cache)
            loss = torch.stack(list(terms.values())).sum()
            loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((loss.detach(), gradients))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-7)
