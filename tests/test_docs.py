# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""What the documentation says of the code is there, and the other way round."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import anomalib_mvfa
from anomalib_mvfa.model.variant import Variant

ROOT = Path(__file__).parents[1]
METHOD = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("choice", [field.name for field in fields(Variant)])
def test_every_choice_of_the_method_is_explained(choice):
    assert f"`{choice}`" in METHOD


def test_files_that_the_method_page_names_exist():
    named = re.findall(r"`((?:(?:model|data|configs|tests|weights)/)?[\w/]+\.(?:py|yaml|md))`", METHOD)
    assert len(named) > 10
    for name in named:
        assert any((folder / name).is_file() for folder in (ROOT, ROOT / "anomalib_mvfa")), name


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "anomalib_mvfa/backbones/README.md"])
def test_links_to_files_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_every_page_is_in_the_table_of_contents():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = {name for tree in re.findall(r"```{toctree}\n(.*?)```", index, re.DOTALL) for name in tree.split()}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"} <= listed


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{anomalib_mvfa.__version__}"' in project
    assert str(citation["version"]) == anomalib_mvfa.__version__
    assert anomalib_mvfa.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
