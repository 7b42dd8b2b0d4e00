# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""What the command prints with our models: every message once, errors as messages, other models left alone."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

import anomalib_mvfa_autoload
from anomalib_mvfa.console import _is_for_user, _is_useful

COMMAND = Path(sys.executable).with_name("anomalib")


def _run(*arguments, **environment):
    return subprocess.run(
        [COMMAND, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "ours"),
    [
        (["/bin/anomalib", "train", "--model", "MVFA"], True),
        (["/bin/anomalib", "train", "--model.class_path=anomalib_mvfa.model.MVFA"], True),
        (["/bin/anomalib", "test", "--model", "WinClipAny"], True),
        (["/bin/anomalib", "train", "--model", "Padim", "--data", "FewShot"], False),
        (["/bin/other", "--model", "MVFA"], False),
        (["-m", "anomalib_mvfa.comparison"], True),
        (["-m", "pytest", "MVFA"], False),
        (["-c", "import torch"], False),
        ([], False),
    ],
)
def test_only_commands_with_our_models_are_quietened(arguments, ours, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", *arguments])
    assert anomalib_mvfa_autoload._is_our_command() is ours


@pytest.mark.parametrize("text", ["model: MVFA", "model:\n  class_path: Padim"])
def test_a_configuration_is_searched_for_our_models(text, tmp_path, monkeypatch):
    path = tmp_path / "train.yaml"
    path.write_text(text)
    monkeypatch.setattr(sys, "orig_argv", ["python", "/bin/anomalib", "train", "--config", str(path)])
    assert anomalib_mvfa_autoload._is_our_command() is ("MVFA" in text)


def test_errors_raised_for_users_are_told_from_faults():
    from anomalib_mvfa.demo.phantoms import draw_phantom

    with pytest.raises(ValueError, match="knee") as raised:
        draw_phantom("knee")
    assert _is_for_user(raised.tb)
    with pytest.raises(TypeError) as raised:
        draw_phantom("brain_mri", size="large")
    assert not _is_for_user(raised.tb)


def test_advertisements_and_host_internals_are_dropped():
    def record(text):
        return logging.LogRecord("x", logging.INFO, "", 0, text, None, None)

    assert not _is_useful(record("💡 Tip: install something"))
    assert not _is_useful(record("The following callbacks returned in `LightningModule.configure_callbacks` ..."))
    assert _is_useful(record("GPU available: False, used: False"))


def test_a_bad_folder_is_reported_in_one_line_and_with_a_traceback_for_debugging(tmp_path):
    arguments = ("train", "--model", "MVFA", "--model.backbone", "tiny", "--data", "FewShot", "--data.source")
    arguments = (*arguments, "MedicalBMAD", "--data.source.root", str(tmp_path), "--default_root_dir", str(tmp_path))
    result = _run(*arguments)
    assert result.returncode == 1
    assert "error: " in result.stderr
    assert "No set 'Brain' under" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert "FutureWarning" not in result.stderr
    messages = [line for line in (result.stdout + result.stderr).splitlines() if "Initializing MVFA model" in line]
    assert len(messages) == 1
    debug = _run(*arguments, ANOMALIB_MVFA_DEBUG="1")
    assert "Traceback" in debug.stdout + debug.stderr
