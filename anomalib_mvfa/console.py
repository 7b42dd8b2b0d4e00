# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""What the ``anomalib`` command prints when it runs one of our models.

Messages appear once, exporters report warnings only, and an error that this package raises for its user is shown as its
message. ``ANOMALIB_MVFA_DEBUG=1`` shows everything, with tracebacks. Runs of other models are left alone.
"""

import functools
import linecache
import logging
import sys
from traceback import walk_tb
from types import ModuleType, TracebackType
from typing import Any

__all__ = ["quieten"]

EXPORTERS = ("onnx_ir", "onnxscript", "torch.onnx", "openvino", "nncf")
LIGHTNING = ("lightning.pytorch", "lightning.fabric", "lightning_fabric", "pytorch_lightning")
NOT_FOR_USERS = ("💡", "The following callbacks returned in", "TPU available: False")
"""How messages of Lightning begin that advertise, or that every model of anomalib causes."""


def quieten(loggers: ModuleType, debug: str) -> None:
    """Replace ``configure_logger`` of ``anomalib.loggers``, which the command calls when it starts, by ours."""
    configure = loggers.configure_logger

    @functools.wraps(configure)
    def configure_logger(*args: Any, **kwargs: Any) -> None:
        configure(*args, **kwargs)
        for name in (None, "lightning.pytorch"):
            _keep_one_handler(logging.getLogger(name))
        for name in EXPORTERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        for name in LIGHTNING:
            logging.getLogger(f"{name}.utilities.rank_zero").addFilter(_is_useful)
        sys.excepthook = functools.partial(_show_error, sys.excepthook, debug)

    loggers.configure_logger = configure_logger  # type: ignore[attr-defined]


def _keep_one_handler(logger: logging.Logger) -> None:
    """Keep rich's handler in a terminal; elsewhere the plain one, which does not break lines."""
    rich = [handler for handler in logger.handlers if type(handler).__name__ == "RichHandler"]
    plain = [handler for handler in logger.handlers if isinstance(handler, logging.StreamHandler)]
    if rich and plain:
        for handler in plain if sys.stderr.isatty() else rich:
            logger.removeHandler(handler)


def _is_useful(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NOT_FOR_USERS)


def _show_error(
    show: Any,
    debug: str,
    kind: type[BaseException],
    error: BaseException,
    traceback: TracebackType | None,
) -> None:
    """Print the message of an error that is meant for the user; `show` any other with its traceback."""
    if not _is_for_user(traceback):
        show(kind, error, traceback)
        return
    print(f"error: {error}\n(with {debug}=1 the command shows where this was raised)", file=sys.stderr)  # noqa: T201


def _is_for_user(traceback: TracebackType | None) -> bool:
    """Return whether a ``raise`` statement of this package raised the error: its message then was written for users."""
    if traceback is None:
        return False
    *_, (frame, number) = walk_tb(traceback)
    package = frame.f_globals.get("__name__", "").split(".")[0]
    line = linecache.getline(frame.f_code.co_filename, number)
    return package == __name__.split(".")[0] and line.lstrip().startswith("raise ")
