# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Makes the stock ``anomalib`` command know MVFA.

``import torch`` calls :func:`install` through the entry point group ``torch.backends``. It only installs an import
hook; the package itself is imported when anomalib's models are. Programs without anomalib pay nothing, and a failure
here becomes a warning.
"""

import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

__all__ = ["install"]

# All that our classes build on is imported once the first was executed; torch is always imported before either.
MODELS = "anomalib.models.image"
BENCHMARK = "anomalib.pipelines.benchmark.pipeline"
ENGINE = "anomalib.engine.engine"


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Finds two of anomalib's modules as usual and registers our classes once these modules were executed."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in (MODELS, BENCHMARK, ENGINE):
            return None
        try:
            return self._find_spec(fullname, path, target)
        except Exception as error:  # without a spec of ours the import goes on as if this finder was not there
            _warn(error)
            return None

    def _find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None,
    ) -> importlib.machinery.ModuleSpec | None:
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        for finder in others:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    self._register_after(spec.loader)
                return spec
        return None

    def _register_after(self, loader: importlib.abc.Loader) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]


def _register(module: ModuleType) -> None:
    if module.__name__ == MODELS and "anomalib_mvfa" in sys.modules:  # being imported right now; it registers itself
        return
    try:
        if module.__name__ == MODELS:
            import anomalib_mvfa  # noqa: F401
        elif module.__name__ == ENGINE:
            from anomalib_mvfa.registration import extend_export

            extend_export(module.Engine)
        else:
            from anomalib_mvfa.registration import extend_benchmark

            extend_benchmark(module.Benchmark)
    except Exception as error:
        _warn(error)


def _warn(error: Exception) -> None:
    warnings.warn(f"anomalib-mvfa could not be registered with anomalib: {error!r}", stacklevel=3)


def install() -> None:
    """Install the import hook, once."""
    if not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())
