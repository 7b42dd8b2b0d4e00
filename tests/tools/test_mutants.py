# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The search for faults that tests do not catch: what it covers and what it leaves out."""

from pathlib import Path

import pytest

pytest.importorskip("mutmut")

from tools.mutants import AREAS, SLOW, untouched_lines

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("area", AREAS)
def test_every_area_names_files_and_tests_that_exist(area):
    mutated, tests = AREAS[area]
    assert all(list((ROOT / "anomalib_mvfa").glob(pattern)) for pattern in mutated)
    assert all((ROOT / "tests" / test).exists() for test in tests)


def test_the_test_that_is_left_out_exists():
    file, _, name = SLOW.partition("::")
    assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")


def test_lines_of_messages_are_found_and_no_others():
    source = """
def halve(number):
    if number % 2:
        msg = (
            f"{number} is odd."
        )
        raise ValueError(msg)
    logger.warning("%d is even.", number)
    text = "half"
    return number // 2, text
"""
    expected = ["        msg = (", '            f"{number} is odd."', "        )", "        raise ValueError(msg)"]
    assert untouched_lines(source) == {*expected, '    logger.warning("%d is even.", number)'}


def test_constructors_of_lightning_modules_are_left_alone_and_no_other_method():
    source = """
class Model(Mixin, AnomalibModule):
    def __init__(self, width=3):
        super().__init__()
        self.width = width

    def double(self):
        return 2 * self.width


class Other:
    def __init__(self, height=3):
        self.height = height
"""
    expected = ["    def __init__(self, width=3):", "        super().__init__()", "        self.width = width"]
    assert untouched_lines(source) == set(expected)
