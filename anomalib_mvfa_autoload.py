# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Makes the stock ``anomalib`` command know MVFA.

``import torch`` calls :func:`install` through the entry point group ``torch.backends``. It only installs an import
hook; the package itself is imported when anomalib's models are. Programs without anomalib pay nothing, and a failure
here becomes a warning. Where the command runs one of our models, other packages' warnings about their own code are off.
"""

import functools
import importlib.abc
import importlib.machinery
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["install"]

# All that our classes build on is imported once the first was executed; torch is always imported before either.
MODELS = "anomalib.models.image"
BENCHMARK = "anomalib.pipelines.benchmark.pipeline"
ENGINE = "anomalib.engine.engine"
COMMAND = "anomalib.utils.config"
LOGGERS = "anomalib.loggers"  # the first of the command's modules that is imported after torch
OURS = re.compile(r"\b(MVFA|mvfa|WinClipAny|anomalib_mvfa|comparison)\b")
CONFIG_LIMIT = 2**20  # bytes
DEBUG = "ANOMALIB_MVFA_DEBUG"
# What packages say about their own code, which a user of the command cannot act on: message, category, module.
NOT_FOR_USERS = (
    ("", FutureWarning, r"(timm|torch|lightning|anomalib)\."),
    ("", DeprecationWarning, r"(timm|torch|lightning|anomalib)\."),
    (r"Found \d+ module\(s\) in eval mode", UserWarning, ""),
    ("Be aware that when using `ckpt_path`", UserWarning, ""),
    ("The dirpath has changed from", UserWarning, ""),
)


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Finds five of anomalib's modules as usual and adds what is ours once they were executed."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in (MODELS, BENCHMARK, ENGINE, COMMAND, LOGGERS):
            return None
        try:
            if fullname == LOGGERS and not _is_our_command():
                return None
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
        elif module.__name__ == COMMAND:
            _honour_seed(module)
        elif module.__name__ == LOGGERS:
            from anomalib_mvfa.console import quieten

            quieten(module, DEBUG)
        else:
            from anomalib_mvfa.registration import extend_benchmark

            extend_benchmark(module.Benchmark)
    except Exception as error:
        _warn(error)


def _honour_seed(config: ModuleType) -> None:
    """Make the command honour ``--seed_everything`` for our models; anomalib reads it and does not use it."""
    update = config.update_config  # which the command calls before it makes model and data

    @functools.wraps(update)
    def update_config(options: Any) -> Any:
        from lightning import seed_everything

        seed = options.get("seed_everything")
        if type(seed) is int and options["model"]["class_path"].split(".")[0] == "anomalib_mvfa":
            seed_everything(seed, workers=True)
        return update(options)

    config.update_config = update_config  # type: ignore[attr-defined]


def _warn(error: Exception) -> None:
    warnings.warn(f"anomalib-mvfa could not be registered with anomalib: {error!r}", stacklevel=3)


def _is_our_command() -> bool:
    """Return whether this is a command of this package, or ``anomalib`` with one of our models or a comparison."""
    arguments = sys.orig_argv[1:]
    if os.environ.get(DEBUG) or not arguments:
        return False
    if arguments[0] == "-m":
        return "".join(arguments[1:2]).split(".")[0] == "anomalib_mvfa"
    if Path(arguments[0]).stem != "anomalib":
        return False
    if any(OURS.search(argument) for argument in arguments):
        return True
    for argument in arguments:
        path = Path(argument.removeprefix("--config="))
        if (
            path.suffix in (".yaml", ".yml", ".json")
            and path.is_file()
            and path.stat().st_size < CONFIG_LIMIT
            and OURS.search(path.read_text(encoding="utf-8", errors="replace"))
        ):
            return True
    return False


def install() -> None:
    """Install the import hook, once."""
    if not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())
        try:
            ours = _is_our_command()
        except Exception as error:  # such as a configuration that may not be read
            _warn(error)
            ours = False
        if ours:
            for message, category, module in NOT_FOR_USERS:
                warnings.filterwarnings("ignore", message, category, module)
