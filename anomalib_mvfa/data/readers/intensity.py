# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Intensity rules: how stored values become grey levels."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from .files import Pixels, UnreadableImageError

__all__ = ["CT_WINDOWS", "IntensityRule"]

CT_WINDOWS: dict[str, tuple[float, float]] = {
    "brain": (40, 80),
    "subdural": (80, 200),
    "stroke": (40, 40),
    "bone": (400, 1800),
    "lung": (-600, 1500),
    "mediastinum": (50, 350),
    "abdomen": (50, 400),
    "liver": (30, 150),
    "soft_tissue": (40, 400),
}
"""Usual CT windows as ``(centre, width)`` in Hounsfield units."""

PERCENTILES = (0.5, 99.5)
_PERCENT = 100
RuleKind = Literal["auto", "window", "percentile", "dicom"]


@dataclass(frozen=True)
class IntensityRule:
    """How stored values become grey levels in ``[0, 1]``.

    - ``auto``: 8-bit images and colour are divided by their full scale; a grey DICOM image takes its own VOI LUT or
      window, or else percentiles of its series; 16-bit, 32-bit and float images take percentiles of the image, slices
      of a volume those of the whole volume. The percentiles are 0.5 and 99.5.
    - ``window``: ``centre - width / 2`` becomes 0 and ``centre + width / 2`` becomes 1, clipped. Values are in the
      modality's unit (Hounsfield for CT). 8-bit images and colour have none, nor have 8-bit DICOM images without a
      modality transformation: they are assumed to be windowed already and divided by their full scale.
    - ``percentile``: the low and high percentile of the image (of the volume, of the DICOM series in its folder) become
      0 and 1, clipped. Where they coincide, minimum and maximum take their place; a constant image is black.
    - ``dicom``: the file's own VOI LUT or window (the first, where it has several), and an error where it has none.

    A MONOCHROME1 image is inverted afterwards, whatever the rule.

    Args:
        kind: One of the four.
        values: ``(centre, width)`` of a window, ``(low, high)`` in percent of a percentile rule, else empty.

    Raises:
        ValueError: If the numbers do not fit the kind.

    Example:
        >>> IntensityRule.parse("brain")
        IntensityRule(kind='window', values=(40.0, 80.0))
        >>> str(IntensityRule.parse({"percentile": [1, 99]}))
        '{"percentile": [1.0, 99.0]}'
    """

    kind: RuleKind = "auto"
    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check the numbers and fill in the default percentiles."""
        if self.kind not in get_args(RuleKind):
            msg = f"Unknown intensity rule {self.kind!r}. Choose from {[*get_args(RuleKind), *CT_WINDOWS]}."
            raise ValueError(msg)
        values = tuple(float(value) for value in self.values) or (PERCENTILES if self.kind == "percentile" else ())
        object.__setattr__(self, "values", values)
        match self.kind, values:
            case (("auto" | "dicom"), ()):
                valid = True
            case "window", (centre, width):
                valid = math.isfinite(centre) and 0 < width < math.inf
            case "percentile", (low, high):
                valid = 0 <= low < high <= _PERCENT
            case _:
                valid = False
        if not valid:
            wanted = {"window": "[centre, width], width above 0", "percentile": "[low, high], 0 <= low < high <= 100"}
            msg = f"Intensity rule {self.kind!r} takes {wanted.get(self.kind, 'no numbers')}; got {list(values)}."
            raise ValueError(msg)

    @classmethod
    def parse(cls, rule: "IntensityRule | str | Mapping[str, Any] | Sequence[float]") -> "IntensityRule":
        """Read a rule from plain data; a ValueError if it is none of these.

        They are a kind (``"auto"``, ``"dicom"``, ``"percentile"``), the name of a CT window (``"brain"``), a window
        ``[centre, width]`` or ``{"window": [centre, width]}``, percentiles ``{"percentile": [low, high]}``, the JSON
        text of one of these (what ``str(rule)`` returns), or a rule.
        """
        if isinstance(rule, IntensityRule):
            return rule
        data: Any = rule
        if isinstance(data, str) and data.lstrip()[:1] in {"{", "["}:
            data = json.loads(data)
        if isinstance(data, str):
            data = {"window": CT_WINDOWS[data]} if data in CT_WINDOWS else {data: ()}
        elif not isinstance(data, Mapping):
            data = {"window": data}
        if len(data) != 1:
            msg = f'An intensity rule is one entry such as {{"window": [40, 80]}}, got {data!r}.'
            raise ValueError(msg)
        ((kind, values),) = data.items()
        return cls(kind, tuple(values or ()))

    def __str__(self) -> str:
        """Return text that :meth:`parse` accepts: the name of a usual window, a kind, or JSON."""
        names = (name for name, values in CT_WINDOWS.items() if self.kind == "window" and values == self.values)
        return next(names, json.dumps({self.kind: list(self.values)}) if self.values else self.kind)


def limits(values: Pixels, rule: IntensityRule) -> tuple[float, float]:
    """Return the values that become 0 and 1 under a window, or under percentiles of ``values``."""
    if rule.kind == "window":
        centre, width = rule.values
        return centre - width / 2, centre + width / 2
    low, high = np.percentile(values, rule.values or PERCENTILES)
    return (float(low), float(high)) if low < high else (float(values.min()), float(values.max()))


def scale(values: Pixels, low: float, high: float) -> Pixels:
    """Map ``low`` to 0 and ``high`` to 1, clipped; everything to 0 where they coincide."""
    return np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros(values.shape)


def refuse_dicom_rule(rule: IntensityRule, path: Path) -> None:
    """Raise an error under the rule ``dicom``, for a file without a VOI LUT or window."""
    if rule.kind == "dicom":
        reason = 'has no VOI LUT or window of its own; choose another intensity rule, for example "auto"'
        raise UnreadableImageError(path, reason)
