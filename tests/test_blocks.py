# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Every command and code block of README and documentation runs, or is marked and parsed; the examples run.

A block below ``<!-- parsed only: reason -->`` needs data or weights that tests do not have: its commands are parsed by
the real parsers. Every other block is executed, training for one epoch, in a folder of generated images under the names
that the pages use.
"""

import argparse
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from anomalib.cli import AnomalibCLI
from anomalib.data import Folder, get_datamodule
from anomalib.engine import Engine
from markdown_it import MarkdownIt

from anomalib_mvfa import MVFA
from anomalib_mvfa.comparison.runner import Comparison
from anomalib_mvfa.data import FewShot
from anomalib_mvfa.demo.phantoms import write_phantoms

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))]
MARK = "<!-- parsed only:"
PROGRAMS = ("anomalib", "bash", "make", "pip", "python", "ray")
QUICK = {
    "train": ("--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"),
    "test": ("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"),
    "predict": ("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"),
    "anomalib_mvfa.demo.phantoms": ("--counts={train: 4, valid: 6, test: 6}", "--size=64"),
}
"""What the test adds to a command so that it takes seconds."""

EXAMPLES = sorted(
    path.name for path in ROOT.glob("examples/*.py") if "argparse" not in path.read_text(encoding="utf-8")
)
"""Those without arguments; the others are programs with tests of their own."""
DATA = (
    ("--data.source", "Folder"),
    ("--data.source.name", "mri"),
    ("--data.source.root", "DIR"),
    ("--data.source.normal_dir", "normal"),
)


class Block(NamedTuple):
    """A code block, whether it is only parsed, and where it stands."""

    language: str
    text: str
    parsed_only: bool
    line: int


def blocks(page: str) -> Iterator[Block]:
    marked = False
    for token in MarkdownIt("commonmark").parse((ROOT / page).read_text(encoding="utf-8")):
        if token.type == "html_block":
            marked = token.content.startswith(MARK)
        elif token.type in {"fence", "code_block"}:
            language = token.info.strip()
            if token.type == "code_block" and token.content.split()[0] in PROGRAMS:
                language = "bash"
            elif token.type == "code_block" and marked:
                language = "python"
            yield Block(language, token.content, marked, token.map[0] + 1)
            marked = False


def commands(block: Block) -> list[list[str]]:
    """The commands of a block; ``...`` at the end of one stands for the options of the data."""
    lines = block.text.replace("\\\n", " ").splitlines()
    found = [words for line in lines if (words := shlex.split(line, comments=True))]
    for words in found:
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # a variable of the environment
            del words[0]
        if words[-1] == "...":
            words[-1:] = [word for name, value in DATA if name not in words for word in (name, value)]
    return found


class ParseOnly(AnomalibCLI):
    """The stock command up to the point where it makes objects of its arguments."""

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass


class ParsedError(Exception):
    """Ends a program once its arguments were parsed."""


def parse_module(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, args=None, namespace=None):
        parse(parser, args, namespace)
        raise ParsedError

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments])
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(ParsedError):
            run_module(module)


def run_module(module: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the module may have been imported before
        runpy.run_module(module, run_name="__main__")


def check_command(words: list[str], parsed_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    match words:
        case ["ray", subcommand, *arguments] if parsed_only:
            from ray.scripts.scripts import cli

            cli.commands[subcommand].make_context(subcommand, list(arguments))
        case ["make", *targets]:
            known = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert {target for target in targets if "=" not in target} <= set(known)
        case ["pip", "install", what]:
            assert what.partition("[")[0] in {".", "anomalib-mvfa"}
            project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
            for extra in re.findall(r"[\w-]+(?=[,\]])", what):
                assert re.search(rf"^{extra} = \[", project, flags=re.MULTILINE)
        case ["anomalib", subcommand, *arguments] if parsed_only:
            ParseOnly(args=[subcommand, *arguments], run=False)
        case ["anomalib", subcommand, *arguments]:
            AnomalibCLI(args=[subcommand, *arguments, *QUICK.get(subcommand, ())])
        case ["python", "-m", module, *arguments] if parsed_only:
            parse_module(module, arguments, monkeypatch)
        case ["python", "-m", module, *arguments]:
            monkeypatch.setattr(sys, "argv", [module, *arguments, *QUICK.get(module, ())])
            run_module(module)
        case ["python" | "bash", script, *_] if parsed_only:
            assert (ROOT / script).is_file()
        case _:
            pytest.fail(f"no rule for: {shlex.join(words)}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folders and files that the pages name, of generated images and a small model."""
    root = tmp_path_factory.mktemp("docs")
    drawn = write_phantoms(root / "drawn", ["brain_mri"], {"train": 10, "valid": 4, "test": 10}, size=64) / "BrainMRI"
    shutil.copytree(drawn / "train/good", root / "DIR/normal")
    shutil.copytree(drawn / "test/Ungood/img", root / "DIR/abnormal")
    shutil.copytree(drawn / "test/Ungood/label", root / "DIR/masks")
    for name in ("FOLDER", "scans"):
        (root / name).mkdir()
        shutil.copy(drawn / "test/good/img/0000.png", root / name / "a.png")
    (root / "configs").symlink_to(ROOT / "configs")
    source = Folder("mri", "normal", root / "DIR", "abnormal", mask_dir="masks", num_workers=0, eval_batch_size=8)
    model = MVFA(backbone="tiny")
    engine = Engine(max_epochs=1, default_root_dir=root / "made", enable_progress_bar=False, accelerator="cpu")
    engine.fit(model, datamodule=FewShot(source, k_shot=1, train_batch_size=8))
    engine.trainer.save_checkpoint(root / "model.ckpt")
    return root


@pytest.fixture
def inside(folder, monkeypatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_code_of_a_page_work(page, inside, monkeypatch):
    for block in blocks(page):
        if block.language == "python":
            code = compile(block.text, f"{page}:{block.line}", "exec")
            if not block.parsed_only:
                exec(code, {"__name__": "page"})
        elif block.language == "bash":
            for words in commands(block):
                print(f"{page}:{block.line}", shlex.join(words))  # noqa: T201 - says which one fails
                check_command(words, block.parsed_only, monkeypatch)
        elif block.language == "yaml":
            section = yaml.safe_load(block.text)
            sets, methods = section.get("sets", {}), section.get("methods", {"MVFA": {}})
            assert sets or "methods" in section, f"{page}:{block.line}"
            assert all(get_datamodule(source).name == name for name, source in sets.items())
            Comparison.from_config(
                {"output": "out", "sets": sets or {"mri": {"class_path": "Folder"}}, "methods": methods}
            )
        else:
            known = {"text", "csv", "mermaid", "latex"}
            assert block.language in known or block.language.startswith("{") or not block.language
            code = (*PROGRAMS, "engine", "from", "import", "model")
            assert not block.text.startswith(tuple(f"{word} " for word in code)), f"{page}:{block.line}"


def test_pages_have_commands_that_run_and_commands_that_are_parsed():
    found = [block for page in PAGES for block in blocks(page) if block.language == "bash"]
    assert sum(not block.parsed_only for block in found) > 8
    assert sum(block.parsed_only for block in found) > 8


@pytest.mark.parametrize("name", EXAMPLES)
def test_python_example_runs(name, tmp_path, monkeypatch):
    text = (ROOT / "examples" / name).read_text(encoding="utf-8")
    if "import nibabel" in text:
        pytest.importorskip("nibabel")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def test_shell_example_runs(tmp_path):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "EPOCHS": "1", "OMP_NUM_THREADS": "1"}
    script = ["bash", str(ROOT / "examples/few_shot.sh")]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "path,score,label,threshold" in done.stdout


def test_notebook_runs_and_keeps_its_outputs(tmp_path, monkeypatch):
    import matplotlib as mpl

    mpl.use("agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("logging.disable", lambda level: None)  # it would silence the tests that follow
    notebook = json.loads((ROOT / "examples/few_shot.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert sum(bool(cell["outputs"]) for cell in cells) >= 5
    assert "image/png" in json.dumps(cells)
    outputs = json.dumps([cell["outputs"] for cell in cells])
    assert "Traceback" not in outputs
    text = re.sub(r'"image/png": "[^"]*"', "", outputs)
    assert not re.search(r"(?<![\w.])/[a-z]+/\w+[/.]", text), "the outputs name a path of a machine"
    namespace = {"__name__": "notebook"}
    with mpl.rc_context():
        for number, cell in enumerate(cells):
            code = "".join(cell["source"]).replace("max_epochs=10, check_val_every_n_epoch=10", "max_epochs=1")
            exec(compile(code, f"cell {number}", "exec"), namespace)
    assert 0 <= namespace["figures"]["image_AUROC"] <= 1
