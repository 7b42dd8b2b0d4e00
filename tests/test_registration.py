# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""That anomalib knows the model and the datamodules, whatever is imported first, and bears a broken package.

Each question needs an interpreter of its own, which takes seconds to import anomalib.
"""

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

KNOWN = """
import sys
import anomalib.data
import anomalib.models
assert anomalib.models.MVFA.__module__ == "anomalib_mvfa.model.lightning_model", anomalib.models.MVFA
assert hasattr(anomalib.data, "FewShot") and hasattr(anomalib.data, "MedicalBMAD")
print("known")
"""


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a folder, which comes first on the path of modules."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_models_are_got_by_name_without_importing_the_package(tmp_path):
    # torch comes first here, as in most programs; it alone must not load anomalib.
    done = python(
        "import sys, torch\n"
        "assert 'anomalib' not in sys.modules and 'anomalib_mvfa' not in sys.modules\n"
        "from anomalib.models import get_model\n"
        "by_name = get_model('mvfa', backbone='tiny')\n"
        "by_path = get_model({'class_path': 'MVFA', 'init_args': {'backbone': 'tiny'}})\n"
        "assert by_name.hparams['backbone'] == by_path.hparams['backbone'] == 'tiny'\n"
        "print(type(by_name).__name__, type(by_path).__name__)\n" + KNOWN,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["MVFA", "MVFA", "known"]


@pytest.mark.parametrize("first", ["anomalib.data", "anomalib_mvfa", "anomalib.models"])
def test_names_are_known_whatever_is_imported_first(first, tmp_path):
    done = python(f"import {first}\n{KNOWN}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["known"]


def test_broken_package_becomes_a_warning(tmp_path):
    package = tmp_path / "anomalib_mvfa"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('this copy is broken')\n")
    done = python(
        "import torch, anomalib.models\nprint(hasattr(anomalib.models, 'Padim'), hasattr(anomalib.models, 'MVFA'))",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "False"]
    assert "anomalib-mvfa could not be registered with anomalib: ImportError('this copy is broken')" in done.stderr


def test_command_is_the_one_of_anomalib():
    owners = [(point.dist.name, point.value) for point in entry_points(group="console_scripts", name="anomalib")]
    assert owners == [("anomalib", "anomalib.cli.cli:main")]
