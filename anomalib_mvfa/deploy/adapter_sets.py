# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""One backbone, many organs: named adapter sets that are switched on one live model."""

from collections.abc import Callable, Iterable, Iterator, Sized
from copy import deepcopy
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from anomalib.data import InferenceBatch
from anomalib.data.utils import read_image
from torch import Tensor

from anomalib_mvfa.model.fusion import Fusion
from anomalib_mvfa.model.memory import MemoryBank, Support
from anomalib_mvfa.training.calibration import Calibration
from anomalib_mvfa.weights.adapter_files import check_facts, load_adapters
from anomalib_mvfa.weights.checkpoints import checkpoint_facts, read_checkpoint

if TYPE_CHECKING:
    from anomalib_mvfa.model import MVFA

__all__ = ["AdapterSets"]

PARTS = ("seg_adapters", "det_adapters", "seg_memory", "det_memory", "fusion")
"""Modules of the network that belong to a set; the tower is shared."""
NETWORK = (*PARTS, "text_features", "variant", "class_name", "has_masks")
"""Attributes of the network that belong to a set."""
MODULE = ("post_processor", "intensity")
"""Attributes of the model around the network that belong to a set."""


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
        self._sets: dict[str, dict[str, Any]] = {}  # attributes by name
        self.active: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sets, in the order in which they were added."""
        return tuple(self._sets)

    def add(self, name: str, source: str | Path, class_name: str | None = None, support: Support | None = None) -> None:
        """Read a set and keep it under a name. The set in use stays in use.

        Args:
            name: Name for :meth:`use` and routes.
            source: A checkpoint (``.ckpt``), which holds all of a set; or adapters (``.safetensors``, ``.pth``,
                ``hf-hub:owner/name``), without thresholds.
            class_name: For the prompts of adapters that do not name it.
            support: For adapters: images for bank and ranges. Without any the set is zero-shot.

        Raises:
            ValueError: If the source was made for another network, or with another image size.
            FileNotFoundError: If there is no such file.
        """
        is_checkpoint = Path(source).suffix == ".ckpt"
        added = self._from_checkpoint(source) if is_checkpoint else self._from_adapters(source, class_name)
        self._sets[name] = added
        if support is not None and not is_checkpoint:
            model = self.mvfa.model
            before = {name: getattr(model if name in NETWORK else self.mvfa, name) for name in (*NETWORK, *MODULE)}
            self._put(added)
            model.remember(support)
            self._put(before)

    def use(self, name: str) -> None:
        """Make a set the one in use.

        Raises:
            KeyError: If there is no set of this name.
        """
        if name not in self._sets:
            known = ", ".join(self.names) or "none"
            msg = f"There is no adapter set '{name}'. Known: {known}; add(name, source) adds one."
            raise KeyError(msg)
        self._put(self._sets[name])
        self.active = name
        # What the engine and the export would otherwise settle anew: prompts, and whether there is a bank to fill.
        mvfa = self.mvfa
        mvfa.hparams.update(
            class_name=mvfa.model.class_name,
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
            read: Returns the image ``(3, H, W)`` in [0, 1] of an item. Defaults to anomalib's reader of paths.
            batch_size: Images in one forward pass at most.

        Yields:
            For each item, in their order: score and label ``(1,)``, map and mask ``(1, H, W)``, post-processed.

        Raises:
            KeyError: If a route names no set.
            ValueError: If the column has another length.
        """
        read = read or (lambda path: torch.as_tensor(read_image(path, as_tensor=True)))
        named = ((route(item), item) for item in items) if callable(route) else _pair(route, items)
        for name, run in groupby(named, key=lambda pair: pair[0]):
            while chunk := [item for _, item in islice(run, batch_size)]:
                images = torch.stack([self.mvfa.pre_processed(read(item)) for item in chunk])
                self.use(name)
                prediction = self.mvfa.model(images.to(self.mvfa.device))
                if self.mvfa.post_processor is not None:
                    prediction = self.mvfa.post_processor(prediction)
                for index in range(len(chunk)):
                    yield InferenceBatch(*(value if value is None else value[[index]] for value in prediction))

    def _put(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(self.mvfa.model if name in NETWORK else self.mvfa, name, value)

    def _from_checkpoint(self, source: str | Path) -> dict[str, Any]:
        checkpoint = read_checkpoint(source, self.mvfa.checkpoint_safe_globals(), mmap=True)
        facts = checkpoint_facts(checkpoint, source)
        made = self._blank(source, facts)
        state: dict[str, Tensor] = checkpoint["state_dict"]
        for part in PARTS:
            made[part].load_state_dict(_under(state, f"model.{part}."))
        if not checkpoint["anomalib_components_enabled"]["post_processor"]:
            made["post_processor"] = None
        else:
            made["post_processor"].load_checkpoint_config(checkpoint.get("anomalib_post_processor_config") or {})
            made["post_processor"].load_state_dict(_under(state, "post_processor."))
        features = state["model.text_features"].clone().to(self.mvfa.device)
        return {**made, "text_features": features, "class_name": facts["class_name"]}

    def _from_adapters(self, source: str | Path, class_name: str | None) -> dict[str, Any]:
        adapters = [deepcopy(getattr(self.mvfa.model, kind)) for kind in ("seg_adapters", "det_adapters")]
        facts = load_adapters(source, *adapters)
        made = self._blank(source, facts)
        name = class_name or facts.get("class_name")
        if name is None:
            msg = f"{source} does not name what its images show. Give add(..., class_name=...), such as 'Brain'."
            raise ValueError(msg)
        made["seg_adapters"], made["det_adapters"] = adapters
        features = self.mvfa.model.encode_classes([str(name)])[str(name)]
        return {**made, "text_features": features, "class_name": str(name)}

    def _blank(self, source: str | Path, facts: dict[str, Any]) -> dict[str, Any]:
        """Check that a set fits the network, and make one without weights."""
        model = self.mvfa.model
        check_facts(source, facts, model)
        size = facts.get("image_size", list(model.image_size))
        if list(size) != list(model.image_size):
            msg = (
                f"{source} was made for images of {' x '.join(map(str, size))} pixels, but this model reads "
                f"{' x '.join(map(str, model.image_size))}. Sets on one backbone share the image size: build the model "
                f"with image_size={list(size)}."
            )
            raise ValueError(msg)
        language_weight = float(facts.get("language_weight", model.fusion.language_weight))
        made = {
            "seg_adapters": deepcopy(model.seg_adapters),
            "det_adapters": deepcopy(model.det_adapters),
            "seg_memory": MemoryBank(len(model.levels), model.memory.coreset),
            "det_memory": MemoryBank(len(model.levels), model.memory.coreset),
            "fusion": Fusion(language_weight),
            "post_processor": self.mvfa.configure_post_processor(),
        }
        return {name: module.to(self.mvfa.device) for name, module in made.items()} | {
            "variant": replace(model.variant, **(facts.get("variant") or {})),
            "has_masks": bool(facts.get("has_masks", True)),
            "intensity": str(facts.get("intensity") or "") or None,
        }


def _pair(route: Iterable[str], items: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    if isinstance(route, Sized) and isinstance(items, Sized) and len(route) != len(items):
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
