# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Makes our classes attributes of ``anomalib.models`` and ``anomalib.data``.

The command line finds classes among the imported subclasses; ``get_model({"class_path": ...})`` and the benchmark
pipeline look for attributes of these two modules.
"""

import sys

__all__ = ["register"]


def register() -> None:
    """Register the models and the datamodules with anomalib.

    Works while ``anomalib.models`` is still being imported, and any number of times.
    """
    from anomalib_mvfa import baselines, data, model

    setattr(sys.modules["anomalib.models"], "MVFA", model.MVFA)  # noqa: B010 - mypy knows no such attribute
    for name in baselines.MODELS:
        setattr(sys.modules["anomalib.models"], name, getattr(baselines, name))
    for name in data.DATAMODULES:
        setattr(sys.modules["anomalib.data"], name, getattr(data, name))
