# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Every message of the package and its demonstration is explained on the troubleshooting page, and no others are."""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
GAP = "…"  # what a message fills in


def template(node: ast.expr, constants: Mapping[str, ast.expr]) -> Iterator[str]:
    """Yield the texts that an expression can have, what is filled in replaced by a gap."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.Name(id=name) if name in constants:
            yield from template(constants[name], {})
        case ast.JoinedStr():
            yield "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
        case ast.IfExp():
            yield from template(node.body, constants)
            yield from template(node.orelse, constants)
        case ast.Call(func=ast.Attribute(attr="join"), args=[ast.List(elts=[first, *_])]):
            yield from template(first, constants)


def texts(tree: ast.Module, functions: Mapping[str, ast.FunctionDef]) -> Iterator[ast.expr]:
    """Yield what a module calls a message or a reason, raises, or logs as a warning or an error."""
    for node in ast.walk(tree):
        match node:
            case (
                ast.Assign(targets=[ast.Name(id="msg" | "reason")], value=value)
                | ast.AugAssign(target=ast.Name(id="msg"), value=value)
                | ast.Call(func=ast.Name(id="UnreadableImageError" | "unreadable"), args=[_, value])
                | ast.Call(func=ast.Attribute(attr="warning" | "error" | "_warn_once"), args=[value, *_])
                | ast.Raise(exc=ast.Call(args=[value, *_]))
            ):
                if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in functions:
                    lines = ast.walk(functions[value.func.id])
                    yield from (line.value for line in lines if isinstance(line, ast.Return) and line.value)
                else:
                    yield value


def messages(tree: ast.Module) -> Iterator[str]:
    """Yield the messages of a module."""
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    constants = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for text in texts(tree, functions):
        yield from template(text, constants)


def key(message: str) -> str:
    """Return the longest text that the message always has."""
    text = re.sub(r"%\.?\d*[sdfg]", GAP, message)
    return " ".join(max(text.split(GAP), key=len).split())


def all_messages() -> list[str]:
    """Return each message once, without single words, which are errors that the package itself handles."""
    found: dict[str, None] = {}
    for path in sorted([*(ROOT / "anomalib_mvfa").rglob("*.py"), *(ROOT / "tools" / "demo").rglob("*.py")]):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found.update(dict.fromkeys(text for text in messages(tree) if " " in key(text) or key(text).endswith(".")))
    return list(found)


MESSAGES = all_messages()
EXPLAINED = " ".join(PAGE.split())


def test_the_search_finds_the_messages_of_every_kind():
    assert len(MESSAGES) > 100
    for sample in (
        "k_shot must be at least 1",
        "the file is empty",
        "are not on this machine",
        "cannot be used. Repair",
        "has no memory bank that fits",  # a constant of the module, raised by name
        "normal supports, each compared with the others",  # logged once
        "Repair or remove them.",  # returned by a function
    ):
        assert any(sample in message for message in MESSAGES)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda text: key(text)[:60])
def test_every_message_is_explained(message):
    assert key(message) in EXPLAINED, f"docs/troubleshooting.md lacks: {message}"


def test_every_message_on_the_page_is_one_of_ours():
    keys = [key(message) for message in MESSAGES]
    entries = re.findall(r"^``? ?(.+?) ?``?\n:", PAGE, flags=re.MULTILINE)
    assert len(entries) > 80
    for entry in entries:
        text = " ".join(entry.split())
        assert any(known in text for known in keys), entry
