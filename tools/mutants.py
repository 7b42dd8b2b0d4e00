# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Puts small faults into the code, one at a time, and lists those that the tests of the same area do not catch.

    python -m tools.mutants statistics
    python -m tools.mutants --sample 120 model runner

Runs mutmut on a copy of the project in ``results/mutants/<area>``. What was found is kept there: the same command
continues a run that was stopped, and tries again what survived and what has changed. The texts of messages get no
faults: tests look for a part of them only. Functions with a decorator get none either (mutmut leaves them alone), nor
have constructors whose arguments Lightning reads from their frame, which mutmut would hide from it.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mutmut.configuration import reset_config
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.stats import status_by_exit_code
from mutmut.utils.file_utils import change_cwd, walk_mutatable_files
from mutmut.utils.format_utils import get_mutant_name
from scipy.stats import binomtest

MODEL = ("torch_model", "golden", "prompts", "arguments", "lightning_model")
SPLITS = ("few_shot", "splits", "leave_one_out", "bmad")
SPLIT_TESTS = ("few_shot", "support_lists", "leave_one_out", "bmad")
AREAS: dict[str, tuple[list[str], list[str]]] = {
    # files that get faults, tests that have to catch them
    "statistics": (["comparison/statistics.py"], ["comparison/test_statistics.py"]),
    "report": (["comparison/report.py", "comparison/cells.py"], ["comparison/test_report.py"]),
    "runner": (["comparison/runner.py", "comparison/methods.py"], ["comparison/test_runner.py"]),
    "baselines": (["baselines/*"], ["baselines", "backbones/test_towers.py"]),
    "model": (["model/*"], [f"model/test_{name}.py" for name in MODEL]),
    "calibration": (["training/calibration.py"], ["training/test_calibration.py", "model/test_arguments.py"]),
    "thresholds": (["post_processing.py"], ["test_post_processing.py"]),
    "readers": (["data/readers/*"], ["data/test_readers.py", "data/test_reader_rules.py"]),
    "splits": ([f"data/{name}.py" for name in SPLITS], [f"data/test_{name}.py" for name in SPLIT_TESTS]),
    "checks": (["data/base.py"], ["data/test_base.py", "data/test_few_shot.py"]),
}
# Takes longer than all others of its area together, and finds what the others find.
SLOW = "tests/baselines/test_win_clip.py::test_equals_anomalibs_with_its_own_backbone_and_weights"
COPIED = ("anomalib_mvfa", "anomalib_mvfa_autoload.py", "tests", "tools", "configs", "pyproject.toml")
CAUGHT = {"killed", "timeout", "segfault", "suspicious"}
LOGGING = {"debug", "info", "warning", "warn", "error", "exception", "_warn_once"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run quick files first, and quick tests first in each file: mutmut stops at the first failure."""
    stats = Path("mutmut-stats.json")
    if not stats.exists():
        return
    seconds: dict[str, float] = json.loads(stats.read_text(encoding="utf-8"))["duration_by_test"]
    of_file: dict[Path, float] = {}
    for item in items:
        of_file[item.path] = of_file.get(item.path, 0.0) + seconds.get(item.nodeid, 0.0)
    items.sort(key=lambda item: (of_file[item.path], str(item.path), seconds.get(item.nodeid, 0.0)))


def untouched_lines(source: str) -> set[str]:
    r"""Return the lines of a module that belong to messages, or to the constructor of a Lightning module.

    >>> sorted(untouched_lines("if a > b:\n    msg = f'{a} is too large.'\n    raise ValueError(msg)"))
    ["    msg = f'{a} is too large.'", '    raise ValueError(msg)']
    """
    lines = source.splitlines()
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        is_message = (
            isinstance(node, ast.Raise)
            or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "msg")
            or (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOGGING)
        )
        if is_message and isinstance(node, ast.stmt | ast.expr):
            found.update(lines[node.lineno - 1 : node.end_lineno])
        if isinstance(node, ast.ClassDef) and "AnomalibModule" in map(ast.unparse, node.bases):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    found.update(line for line in lines[method.lineno - 1 : method.end_lineno] if line.strip(" )"))
    return found


def prepare(area: str, folder: Path) -> list[str]:
    """Copy the project to ``folder``, write mutmut's configuration and return the names of all faults of the area."""
    mutated, tests = AREAS[area]
    (folder / "mutants").mkdir(parents=True, exist_ok=True)  # before Python looks for it
    shutil.rmtree(folder / "mutants" / "tests", ignore_errors=True)
    for name in COPIED:
        if Path(name).is_dir():
            shutil.rmtree(folder / name, ignore_errors=True)
            shutil.copytree(name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(name, folder)
    patterns = [f"anomalib_mvfa/{pattern}" for pattern in mutated]
    files = sorted(path for pattern in patterns for path in Path().glob(pattern) if path.suffix == ".py")
    untouched = sorted({line for path in files for line in untouched_lines(path.read_text(encoding="utf-8"))})
    arguments = ["-p", "no:cacheprovider", "-p", "tools.mutants", "-W", "ignore", f"--deselect={SLOW}"]
    with (folder / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write(
            f'\n[tool.mutmut]\nsource_paths = ["anomalib_mvfa"]\nonly_mutate = {patterns}\n'
            f"pytest_add_cli_args_test_selection = {[f'tests/{test}' for test in tests]}\n"
            f"pytest_add_cli_args = {arguments}\n"
            f"do_not_mutate_patterns = {json.dumps([f'^{re.escape(line)}$' for line in untouched])}\n"
            'also_copy = ["anomalib_mvfa_autoload.py", "tools", "configs"]\nuse_git_change_detection = false\n'
            "timeout_multiplier = 4.0\ntimeout_constant = 5.0\n"  # (seconds of the tests + 5) x 4
        )
    with change_cwd(folder):
        reset_config()
        return sorted(
            get_mutant_name(path, name)
            for path in walk_mutatable_files()
            for name in mutate_file_contents(str(path), path.read_text(encoding="utf-8")).mutant_names
        )


def states(names: list[str]) -> dict[str, str]:
    """Return what became of faults, by their names, in the current folder."""
    found: dict[str, int | None] = {}
    for path in walk_mutatable_files():
        data = SourceFileMutationData(path=path)
        data.load()
        found |= data.exit_code_by_key
    return {name: status_by_exit_code[found.get(name)] for name in names}


def run(area: str, root: Path, jobs: int, sample: int | None, seed: int) -> None:
    """Try the faults of an area, or a random sample of them, and print those that survived."""
    folder = root / area
    names = prepare(area, folder)
    total = len(names)
    if sample is not None and sample < total:
        # By a hash, so that the sample stays when other functions change, and with it what is known of its faults.
        names = sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())[:sample]
    environment = os.environ | {"PYTHONPATH": str((folder / "mutants").resolve()), "OMP_NUM_THREADS": "1"}
    print(f"{area}: trying {len(names)} of {total} faults, see {folder / 'mutmut.log'}", flush=True)
    with change_cwd(folder):
        if todo := [name for name, state in states(names).items() if state not in CAUGHT]:
            command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(jobs), *todo]
            with Path("mutmut.log").open("w", encoding="utf-8") as log:
                failed = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False).returncode  # noqa: S603
            if failed:
                sys.exit(f"mutmut failed with {failed} on the area {area}; see {folder / 'mutmut.log'}.")
        tried = {name: state for name, state in states(names).items() if state != "not checked"}
        survived = [name for name, state in tried.items() if state not in CAUGHT]
        for name in survived:
            changed = [line for line in get_diff_for_mutant(name).splitlines() if line.startswith(("+", "-"))]
            print(f"\n{name} ({tried[name]})")
            print("\n".join(line for line in changed if not line.startswith(("+++", "---"))))
    caught, timeouts = len(tried) - len(survived), sum(state == "timeout" for state in tried.values())
    share = binomtest(caught, len(tried)).proportion_ci(method="wilson")
    of_all = "all" if len(names) == total else f"a random sample of {total}, seed {seed}"
    print(
        f"\n{area}: {caught} of {len(tried)} faults ({of_all}) caught, {caught / len(tried):.1%} "
        f"(95 % interval {share.low:.1%} to {share.high:.1%}), {timeouts} of them by the time limit",
        flush=True,
    )


def main() -> None:
    """Run the areas that are named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("areas", nargs="*", help=f"any of {', '.join(AREAS)} (default: all)")
    parser.add_argument("--root", type=Path, default=Path("results/mutants"))
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side (default: 1)")
    parser.add_argument("--sample", type=int, help="try so many faults of each area, drawn at random (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default: 0)")
    options = parser.parse_args()
    for area in options.areas or AREAS:
        run(area, options.root, options.jobs, options.sample, options.seed)


if __name__ == "__main__":
    main()
