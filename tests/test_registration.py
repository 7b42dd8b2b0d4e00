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


OTHER_FINDERS = """
import sys

class WithoutFindSpec:  # as before Python 3.4; up to 3.11 they are asked by their old method
    def find_module(self, name, path=None): return None

class Loader:
    __slots__ = ("inner",)
    def __init__(self, inner): self.inner = inner
    def create_module(self, spec): return self.inner.create_module(spec)
    def exec_module(self, module): self.inner.exec_module(module)

class Wrapping:  # its loaders take no attributes
    def find_spec(self, name, path, target=None):
        if name != "anomalib.models.image":
            return None
        later = sys.meta_path[sys.meta_path.index(self) + 1:]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in later)))
        spec.loader = Loader(spec.loader)
        return spec

class Refusing:
    def find_spec(self, name, path, target=None):
        if name == "anomalib.models.image":
            raise ImportError("refused by a policy")
"""


def test_finders_without_find_spec_are_skipped(tmp_path):
    done = python(f"{OTHER_FINDERS}\nsys.meta_path.insert(0, WithoutFindSpec())\nimport torch\n{KNOWN}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["known"]


@pytest.mark.parametrize(
    ("finder", "imported", "reason"), [("Wrapping", "True", "AttributeError"), ("Refusing", "False", "ImportError")]
)
def test_other_finders_decide_as_without_the_plug_in(tmp_path, finder, imported, reason):
    # anomalib.models turns the failed import of its models into a warning of its own.
    code = "try:\n    import anomalib.models.image\nexcept ImportError as error:\n    print(error)\n"
    loaded = "print('anomalib.models.image' in sys.modules, 'anomalib_mvfa' in sys.modules)"
    done = python(f"{OTHER_FINDERS}\nsys.meta_path.insert(0, {finder}())\nimport torch\n{code}{loaded}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == [imported, "False"]
    assert ("refused by a policy" in done.stdout) == (finder == "Refusing")
    assert f"anomalib-mvfa could not be registered with anomalib: {reason}(" in done.stderr


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
