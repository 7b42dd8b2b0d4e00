# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Support lists in the published text format."""

from pathlib import Path

import pytest
from pandas import DataFrame

from anomalib_mvfa.data.few_shot import find_support, read_support_list

PUBLISHED = "n-0: 17.png 203.png\na-0: 8.png 54.png\nn-1: 3.png 17.png\na-1: 54.png 60.png\n"


@pytest.fixture
def support_list(tmp_path: Path) -> Path:
    path = tmp_path / "2-shot.txt"
    path.write_text(PUBLISHED, encoding="utf-8")
    return path


@pytest.fixture
def samples() -> DataFrame:
    """Abnormal images first, and one file name that both labels have."""
    abnormal, normal = ["8.png", "17.png", "54.png"], ["17.png", "203.png", "3.JPG"]
    paths = [f"valid/Ungood/img/{name}" for name in abnormal] + [f"valid/good/img/{name}" for name in normal]
    return DataFrame({"image_path": paths, "split": "val", "label_index": [1, 1, 1, 0, 0, 0]})


def test_each_draw_is_read_in_its_order(support_list: Path) -> None:
    assert read_support_list(support_list) == (["17.png", "203.png"], ["8.png", "54.png"])
    assert read_support_list(support_list, draw=1) == (["3.png", "17.png"], ["54.png", "60.png"])


def test_blank_lines_windows_line_ends_and_byte_order_mark_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfn-0:  17.png\t203.png \r\n\r\na-0: 8.png\r\n")
    assert read_support_list(path) == (["17.png", "203.png"], ["8.png"])


def test_draw_without_abnormal_line_is_normal_only(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("n-0: 17.png\n", encoding="utf-8")
    assert read_support_list(path) == (["17.png"], [])


def test_absent_draw_names_the_lines_that_are_there(support_list: Path) -> None:
    with pytest.raises(ValueError, match=r"2-shot\.txt has no line 'n-2:', it has n-0, a-0, n-1, a-1"):
        read_support_list(support_list, draw=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n-0: 1.png\n1.png 2.png\n", r"line 2: expected 'n-<draw>: names'"),
        ("n-0: 1.png\nn-0: 2.png\n", "line 2: n-0 or one of its file names stands twice"),
        ("\nn-0: 1.png 1.png\n", "line 2: n-0 or one of its file names stands twice"),
    ],
)
def test_malformed_lines_are_named_by_number(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "list.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_support_list(path)


def test_supports_are_found_within_their_label_in_list_order(samples: DataFrame) -> None:
    assert find_support(samples, ["203.png", "17.png"], label=0) == [4, 3]
    assert find_support(samples, ["17.png", "8.png"], label=1) == [1, 0]


def test_supports_are_found_without_extension_and_below_a_folder(samples: DataFrame) -> None:
    assert find_support(samples, ["3", "img/203"], label=0) == [5, 4]


def test_missing_support_names_list_line_and_image(samples: DataFrame, support_list: Path) -> None:
    _, abnormal = read_support_list(support_list, draw=1)
    message = r"2-shot\.txt, line a-1: 1 of 2 names .* one abnormal image .*: 60\.png \(0 matches\)"
    with pytest.raises(ValueError, match=message):
        find_support(samples, abnormal, label=1, path=support_list, draw=1)


def test_ambiguous_support_is_refused(samples: DataFrame) -> None:
    samples.loc[5, "image_path"] = "valid/good/img/17.jpg"
    assert find_support(samples, ["17.jpg", "17.png"], label=0) == [5, 3]
    with pytest.raises(ValueError, match=r"line n-0: .*: 17 \(2 matches\)"):
        find_support(samples, ["17"], label=0)
