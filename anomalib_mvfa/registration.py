# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Registers our classes as attributes of ``anomalib.models`` and ``anomalib.data``.

The command line finds classes among the imported subclasses; ``get_model({"class_path": ...})`` and the benchmark
pipeline look for attributes of these two modules.
"""

import functools
import logging
import sys
from typing import Any

logger = logging.getLogger(__name__)

__all__ = ["extend_benchmark", "extend_export", "register"]


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


def extend_export(engine: Any) -> None:
    """Make ``Engine.export`` honour the arguments of the model beside a checkpoint, which anomalib drops."""
    export = engine.export

    @functools.wraps(export)
    def run(self: Any, model: Any, *args: Any, ckpt_path: Any = None, **kwargs: Any) -> Any:
        from anomalib_mvfa import MVFA

        if ckpt_path is not None and isinstance(model, MVFA):
            given = {name: model.hparams_initial[name] for name in model.explicit}
            model, ckpt_path = type(model).load_from_checkpoint(ckpt_path, **given), None
        return export(self, model, *args, ckpt_path=ckpt_path, **kwargs)

    engine.export = run


def extend_benchmark(pipeline: Any) -> None:
    """Make ``anomalib.pipelines.Benchmark`` run configurations with a section ``comparison``."""
    run_grid = pipeline.run

    @functools.wraps(run_grid)
    def run(self: Any, args: Any = None) -> None:
        config = self._get_args(args)
        if "comparison" not in config:
            run_grid(self, args)
            return
        from anomalib_mvfa.comparison.runner import Comparison, run_comparison, write_report

        comparison = Comparison.from_config(config["comparison"])
        failed = run_comparison(comparison)
        page = write_report(comparison)
        logger.info("Tables and page: %s", page.resolve())
        if failed:
            names = "\n".join(f"  {folder / 'cell.json'}" for folder in failed)
            msg = f"{len(failed)} cells failed; the same command tries them again. The reasons are in\n{names}"
            raise SystemExit(msg)

    pipeline.run = run
