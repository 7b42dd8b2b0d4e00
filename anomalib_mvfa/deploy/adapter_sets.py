# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""One backbone, many organs: named adapter sets that are switched on one live model."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from anomalib.data import InferenceBatch
from anomalib.data.utils import read_image
from torch import Tensor, nn

from anomalib_mvfa.model.memory import MemoryBank, Support
from anomalib_mvfa.model.variant import Variant
from anomalib_mvfa.training.calibration import Calibration
from anomalib_mvfa.weights.adapter_files import check_facts, load_adapters
from anomalib_mvfa.weights.checkpoints import checkpoint_facts, read_checkpoint

if TYPE_CHECKING:
    from anomalib_mvfa.model import MVFA

__all__ = ["AdapterSets"]

PARTS = ("seg_adapters", "det_adapters", "seg_memory", "det_memory", "fusion")
"""Modules of the network that belong to a set; the tower is shared."""
POST_PROCESSOR = "post_processor."
POST_PROCESSOR_CONFIG = "anomalib_post_processor_config"


class AdapterSet(NamedTuple):
    """All that differs between two organs on the same backbone.

    Args:
        parts: Adapters, memory banks and ranges, by their names in the network.
        text_features: ``(E, 2)``.
        post_processor: Thresholds and normalisation.
        variant: Choices of the method.
        class_name: What the images show.
        has_masks: Whether map and memory come from the segmentation adapters.
        intensity: Rule by which the training images were read.
    """

    parts: dict[str, nn.Module]
    text_features: Tensor
    post_processor: nn.Module | None
    variant: Variant
    class_name: str
    has_masks: bool
    intensity: str | None


class AdapterSets:
    """Named adapter sets on one live model.

    A set has adapters, memory bank, text features, ranges and thresholds of its own. Switching exchanges references:
    nothing is copied and the backbone is not touched. After :meth:`use` the model is, for the engine, for export and
    for everything else, the one that the set was made from.

    Args:
        mvfa: The model whose backbone the sets share. Its network is built if need be.

    Example:
        >>> from anomalib_mvfa import MVFA
        >>> sets = AdapterSets(MVFA("tiny", class_name="Brain"))
        >>> sets.names
        ()
    """

    def __init__(self, mvfa: "MVFA") -> None:
        mvfa.ensure_model()
        self.mvfa = mvfa.eval()
        self._sets: dict[str, AdapterSet] = {}
        self.active: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sets, in the order in which they were added."""
        return tuple(self._sets)

    def add(self, name: str, source: str | Path, class_name: str | None = None, support: Support | None = None) -> None:
        """Read a set and keep it under a name. The set in use stays in use.

        Args:
            name: What :meth:`use` and routes call it.
            source: A checkpoint (``.ckpt``), which holds all of a set; or adapters (``.safetensors``, ``.pth``,
                ``hf-hub:owner/name``), to which text features are made and, with supports, bank and ranges. Adapters
                come without thresholds.
            class_name: For the prompts of adapters that do not tell it.
            support: For adapters: images to remember. Without any the set is zero-shot.

        Raises:
            ValueError: If the source was made for another network, or with another image size.
            FileNotFoundError: If there is no such file.
        """
        is_checkpoint = Path(source).suffix == ".ckpt"
        added = self._from_checkpoint(source) if is_checkpoint else self._from_adapters(source, class_name)
        self._sets[name] = added
        if support is not None and not is_checkpoint:
            before, active = self._snapshot(), self.active
            self._put(added)
            self.mvfa.model.remember(support)
            self._put(before)
            self.active = active

    def use(self, name: str) -> None:
        """Make a set the one in use.

        Args:
            name: As given to :meth:`add`.

        Raises:
            KeyError: If there is no such set.
        """
        if name not in self._sets:
            known = ", ".join(self.names) or "none"
            msg = f"There is no adapter set '{name}'. Known: {known}; add(name, source) adds one."
            raise KeyError(msg)
        chosen = self._sets[name]
        self._put(chosen)
        self.active = name
        # What the engine and the export would otherwise settle anew: prompts, and whether there is a bank to fill.
        mvfa = self.mvfa
        mvfa.hparams.update(
            class_name=chosen.class_name,
            memory=not mvfa.model.memory.is_empty,
            coreset=mvfa.model.memory.coreset,
            language_weight=mvfa.model.fusion.language_weight,
        )
        mvfa.trained = True
        mvfa.calibration = Calibration(bank_holds=True, thresholds_hold=True)

    @torch.no_grad()
    def predict(
        self,
        items: Iterable[Any],
        route: Callable[[Any], str] | Iterable[str],
        read: Callable[[Any], Tensor] | None = None,
        batch_size: int = 8,
    ) -> Iterator[InferenceBatch]:
        """Predict a mixed list, each item with the set that its route names.

        Neighbours of the same set share a batch; a list in the order of its sets is therefore the fastest.

        Args:
            items: Paths of images, or whatever ``read`` understands. May be a stream.
            route: Name of the set by item: a function of the item, or a column as long as ``items``.
            read: Gives an image ``(3, H, W)`` in [0, 1]. Defaults to anomalib's reader of paths.
            batch_size: Images in one forward pass at most.

        Yields:
            For each item, in their order: score and label ``(1,)``, map and mask ``(1, H, W)``, post-processed.

        Raises:
            KeyError: If a route names no set.
            ValueError: If the column has another length.
        """
        read = read or _read
        named = ((route(item), item) for item in items) if callable(route) else _pair(route, items)
        for name, run in groupby(named, key=lambda pair: pair[0]):
            while chunk := [item for _, item in islice(run, batch_size)]:
                images = torch.stack([self.mvfa.pre_processed(read(item)) for item in chunk])
                self.use(name)
                prediction = self.mvfa.model(images.to(self.mvfa.device))
                if self.mvfa.post_processor is not None:
                    prediction = self.mvfa.post_processor(prediction)
                for index in range(len(chunk)):
                    yield InferenceBatch(
                        *(None if value is None else value[index : index + 1] for value in prediction),
                    )

    def _snapshot(self) -> AdapterSet:
        """Give what is in use now."""
        model = self.mvfa.model
        return AdapterSet(
            {part: getattr(model, part) for part in PARTS},
            model.text_features,
            self.mvfa.post_processor,
            model.variant,
            model.class_name or "",
            model.has_masks,
            self.mvfa.intensity,
        )

    def _put(self, chosen: AdapterSet) -> None:
        """Exchange references."""
        model = self.mvfa.model
        for part, module in chosen.parts.items():
            setattr(model, part, module)
        model.text_features = chosen.text_features
        model.variant = chosen.variant
        model.class_name = chosen.class_name
        model.has_masks = chosen.has_masks
        self.mvfa.intensity = chosen.intensity
        self.mvfa.post_processor = chosen.post_processor

    def _from_checkpoint(self, source: str | Path) -> AdapterSet:
        checkpoint = read_checkpoint(source, self.mvfa.checkpoint_safe_globals())
        facts = checkpoint_facts(checkpoint, source)
        made = self._blank(source, facts)
        state: dict[str, Tensor] = checkpoint["state_dict"]
        for part, module in made.parts.items():
            module.load_state_dict(_under(state, f"model.{part}."))
        post_processor = made.post_processor if checkpoint["anomalib_components_enabled"]["post_processor"] else None
        if post_processor is not None:
            config = checkpoint.get(POST_PROCESSOR_CONFIG)
            if config is not None:
                post_processor.load_checkpoint_config(config)  # type: ignore[operator]  # of anomalib's post-processors
            post_processor.load_state_dict(_under(state, POST_PROCESSOR))
        text_features = state["model.text_features"].clone().to(self.mvfa.device)
        return made._replace(
            text_features=text_features,
            post_processor=post_processor,
            class_name=facts["class_name"],
        )

    def _from_adapters(self, source: str | Path, class_name: str | None) -> AdapterSet:
        parts = self._blank_parts()
        facts = load_adapters(source, parts["seg_adapters"], parts["det_adapters"])  # type: ignore[arg-type]
        made = self._blank(source, facts)
        made.parts.update({kind: parts[kind] for kind in ("seg_adapters", "det_adapters")})
        name = class_name or facts.get("class_name")
        if name is None:
            msg = f"{source} does not name what its images show. Give add(..., class_name=...), such as 'Brain'."
            raise ValueError(msg)
        features = self.mvfa.model.encode_classes([str(name)])[str(name)]
        return made._replace(text_features=features, class_name=str(name))

    def _blank_parts(self) -> dict[str, nn.Module]:
        model = self.mvfa.model
        parts = {part: deepcopy(getattr(model, part)) for part in ("seg_adapters", "det_adapters", "fusion")}
        # An empty bank is made anew: copying the present one would cost its size.
        parts |= {part: MemoryBank(len(model.levels), model.memory.coreset) for part in ("seg_memory", "det_memory")}
        return {part: parts[part].to(self.mvfa.device) for part in PARTS}

    def _blank(self, source: str | Path, facts: dict[str, Any]) -> AdapterSet:
        """Check that a set fits the network, and make one without weights."""
        model = self.mvfa.model
        check_facts(source, facts, model.fingerprint, model.levels, model.variant)
        size = facts.get("image_size", list(model.image_size))
        if list(size) != list(model.image_size):
            msg = (
                f"{source} was made for images of {' x '.join(map(str, size))} pixels, but this model reads "
                f"{' x '.join(map(str, model.image_size))}. Sets on one backbone share the image size: build the model "
                f"with image_size={list(size)}."
            )
            raise ValueError(msg)
        parts = self._blank_parts()
        fusion: Any = parts["fusion"]
        fusion.language_weight = float(facts.get("language_weight", fusion.language_weight))
        fusion.fit(**{name: torch.tensor([0.0, 1.0]) for name, _ in fusion.named_buffers()})
        choices: dict[str, Any] = facts.get("variant") or {}
        intensity = facts.get("intensity")
        return AdapterSet(
            parts,
            model.text_features,
            self.mvfa.configure_post_processor().to(self.mvfa.device),
            replace(model.variant, **choices),
            "",
            bool(facts.get("has_masks", True)),
            str(intensity) if intensity else None,
        )


def _read(path: str | Path) -> Tensor:
    return torch.as_tensor(read_image(path, as_tensor=True))


def _pair(route: Iterable[str], items: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    if isinstance(route, Sequence) and isinstance(items, Sequence) and len(route) != len(items):
        msg = f"The route names {len(route)} sets for {len(items)} items. Give one name for each item."
        raise ValueError(msg)
    return zip(route, items, strict=True)


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    # Banks are stored in half precision and used in full precision.
    return {
        name.removeprefix(prefix): value.float() if value.is_floating_point() else value
        for name, value in state.items()
        if name.startswith(prefix)
    }
