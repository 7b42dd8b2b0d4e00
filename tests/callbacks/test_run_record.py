# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The record of a training, whatever else is installed beside the package."""

from importlib import metadata

from lightning.pytorch import Trainer

from anomalib_mvfa import MVFA
from anomalib_mvfa.callbacks.run_record import _record


def test_remains_of_other_packages_do_not_disturb_the_versions(tmp_path, monkeypatch):
    (tmp_path / "ghost-1.0.dist-info").mkdir()  # as an interrupted installation leaves it, without METADATA
    monkeypatch.syspath_prepend(tmp_path)
    trainer = Trainer(logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    versions = _record(trainer, MVFA("tiny"), {})["versions"]
    assert versions["anomalib"] == metadata.version("anomalib")
    assert versions["open-clip-torch"] == metadata.version("open-clip-torch")
