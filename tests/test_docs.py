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
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))
METHOD = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("choice", [field.name for field in fields(Variant)])
def test_every_choice_of_the_method_is_explained(choice):
    assert f"`{choice}`" in METHOD


@pytest.mark.parametrize("page", ["docs/method.md", "docs/architecture.md"])
def test_files_that_a_page_names_exist(page):
    named = re.findall(r"`([\w/]+\.(?:py|yaml|md))`", (ROOT / page).read_text(encoding="utf-8"))
    assert len(named) > 10
    for name in named:
        assert any((folder / name).is_file() for folder in (ROOT, ROOT / "anomalib_mvfa")), name


def headings(path: Path) -> set[str]:
    """The anchors that a page has for its headings."""
    lines = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", [*PAGES, "README.md", "CONTRIBUTING.md", "anomalib_mvfa/backbones/README.md"])
def test_links_to_files_and_headings_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)", path.read_text(encoding="utf-8")):
        name, _, heading = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), target
        assert not heading or heading in headings(linked), target


def test_the_packages_and_files_in_the_layout_are_those_that_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    layout = re.search(r"```text\nanomalib_mvfa/\n(.*?)```", text, re.DOTALL)
    assert layout is not None
    named = set(re.findall(r"[\w/]+(?:\.py|/)(?=\s)", layout[1]))
    package = ROOT / "anomalib_mvfa"
    for name in named:
        assert any(package.glob(f"**/{name}")) or (ROOT / name).exists(), name
    rooms = [path for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    assert {f"{path.name}/" if path.is_dir() else path.name for path in rooms} - {"__init__.py"} <= named
    for folder in ("model", "training", "callbacks", "weights", "deploy"):
        assert {path.name for path in (package / folder).glob("*.py")} - {"__init__.py"} <= named


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
