# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""What the documentation says of the code is there, and the other way round."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from anomalib_mvfa.model.variant import Variant

ROOT = Path(__file__).parents[1]
METHOD = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("choice", [field.name for field in fields(Variant)])
def test_every_choice_of_the_method_is_explained(choice):
    assert f"`{choice}`" in METHOD


def test_files_that_the_method_page_names_exist():
    named = re.findall(r"`((?:model|data|configs|tests)/[\w/]+\.(?:py|yaml|md))`", METHOD)
    assert len(named) > 10
    for name in named:
        assert any((folder / name).is_file() for folder in (ROOT, ROOT / "anomalib_mvfa")), name
