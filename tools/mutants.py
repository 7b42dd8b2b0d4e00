# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Puts small faults into the code, one at a time, and lists those that the tests of the same area do not catch.

    python -m tools.mutants statistics

Runs mutmut on a copy of the project in ``results/mutants/<area>``. What was found is kept there: the same command
continues a run that was stopped, and tests again what has changed.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

AREAS: dict[str, tuple[list[str], list[str]]] = {
    # files that get faults, tests that have to catch them
    "statistics": (["anomalib_mvfa/comparison/statistics.py"], ["tests/comparison/test_statistics.py"]),
    "report": (
        ["anomalib_mvfa/comparison/report.py", "anomalib_mvfa/comparison/cells.py"],
        ["tests/comparison/test_report.py"],
    ),
    "runner": (
        ["anomalib_mvfa/comparison/runner.py", "anomalib_mvfa/comparison/methods.py"],
        ["tests/comparison/test_runner.py"],
    ),
    "baselines": (["anomalib_mvfa/baselines/*"], ["tests/baselines"]),
    "model": (["anomalib_mvfa/model/*"], ["tests/model"]),
    "calibration": (["anomalib_mvfa/training/calibration.py"], ["tests/training/test_calibration.py"]),
    "thresholds": (["anomalib_mvfa/post_processing.py"], ["tests/test_post_processing.py"]),
    "readers": (
        ["anomalib_mvfa/data/readers.py", "anomalib_mvfa/data/readers/*"],
        ["tests/data/test_readers.py", "tests/data/test_reader_rules.py"],
    ),
    "splits": (
        [f"anomalib_mvfa/data/{name}.py" for name in ("few_shot", "splits", "leave_one_out", "bmad")],
        [f"tests/data/test_{name}.py" for name in ("few_shot", "support_lists", "leave_one_out", "bmad")],
    ),
}
COPIED = ("anomalib_mvfa", "anomalib_mvfa_autoload.py", "tests", "configs", "pyproject.toml")


def run(area: str, root: Path, jobs: int) -> None:
    """Copy the project, write mutmut's configuration, run it and print what survived."""
    mutated, tests = AREAS[area]
    folder = root / area
    (folder / "mutants").mkdir(parents=True, exist_ok=True)  # before Python looks for it
    for name in COPIED:
        if Path(name).is_dir():
            shutil.copytree(name, folder / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(name, folder)
    tests = [test for test in tests if (folder / test).exists()]
    with (folder / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write(
            f'\n[tool.mutmut]\nsource_paths = ["anomalib_mvfa"]\nonly_mutate = {mutated}\n'
            f"pytest_add_cli_args_test_selection = {tests}\n"
            'also_copy = ["anomalib_mvfa_autoload.py", "configs"]\n'
            'pytest_add_cli_args = ["-p", "no:cacheprovider", "-W", "ignore"]\nuse_git_change_detection = false\n'
        )
    environment = os.environ | {"PYTHONPATH": str((folder / "mutants").resolve()), "OMP_NUM_THREADS": "1"}
    mutmut = [sys.executable, "-m", "mutmut"]
    subprocess.run([*mutmut, "run", "--max-children", str(jobs)], cwd=folder, env=environment, check=False)  # noqa: S603
    found = subprocess.run(  # noqa: S603
        [*mutmut, "results", "--all", "true"], cwd=folder, env=environment, check=True, capture_output=True, text=True
    ).stdout
    states = dict(line.strip().rsplit(": ", 1) for line in found.splitlines() if ": " in line)
    tried = {name: state for name, state in states.items() if state not in {"not checked", "skipped"}}
    survived = sorted(name for name, state in tried.items() if state in {"survived", "no tests"})
    for name in survived:
        difference = subprocess.run(  # noqa: S603
            [*mutmut, "show", name], cwd=folder, env=environment, check=True, capture_output=True, text=True
        ).stdout
        print(f"\n{name} ({tried[name]})")
        changed = [line for line in difference.splitlines() if line.startswith(("+", "-"))]
        print("\n".join(line for line in changed if not line.startswith(("+++", "---"))))
    print(f"\n{area}: {len(tried) - len(survived)} of {len(tried)} faults caught; {len(states) - len(tried)} not tried")


def main() -> None:
    """Run the areas that are named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("areas", nargs="*", help=f"any of {', '.join(AREAS)} (default: all)")
    parser.add_argument("--root", type=Path, default=Path("results/mutants"))
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    for area in options.areas or AREAS:
        run(area, options.root, options.jobs)


if __name__ == "__main__":
    main()
