# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Trainings that are killed and resumed, and disks that are full."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data.utils import ValSplitMode
from anomalib.engine import Engine
from lightning.pytorch import Callback
from torchvision.transforms.v2 import RandomHorizontalFlip

from anomalib_mvfa import MVFA
from anomalib_mvfa.callbacks.fitting import ResumePoint
from anomalib_mvfa.data import FewShot
from anomalib_mvfa.files import partial_name, replacing

EPOCHS = 3


class Killed(BaseException):
    """Nothing in the libraries catches it."""


class Killer(Callback):
    """Ends the training at a step, before or after the update, or in the validation that follows."""

    def __init__(self, step: int, hook: str) -> None:
        self.step, self.hook = step, hook

    def _strike(self, trainer: object, hook: str) -> None:
        if hook == self.hook and trainer.global_step >= self.step:
            raise Killed

    def on_train_batch_start(self, trainer, *args):
        self._strike(trainer, "on_train_batch_start")

    def on_train_batch_end(self, trainer, *args):
        self._strike(trainer, "on_train_batch_end")

    def on_before_optimizer_step(self, trainer, *args):
        self._strike(trainer, "on_before_optimizer_step")

    def on_validation_batch_start(self, trainer, *args):
        self._strike(trainer, "on_validation_batch_start")


@pytest.fixture(autouse=True)
def every_epoch(monkeypatch):
    monkeypatch.setattr(ResumePoint, "SECONDS", 0.0)


@pytest.fixture
def train(tmp_path, small_backbone):
    """Train a fresh model; the seed stands for what differs between one start of a program and the next."""

    def run(datamodule, seed=0, callbacks=(), ckpt_path=None, **options):
        torch.manual_seed(seed)
        model = MVFA(small_backbone, "random", class_name="Brain", visualizer=False, **options)
        engine = Engine(
            accelerator="cpu",
            max_epochs=EPOCHS,
            check_val_every_n_epoch=1 if options else EPOCHS,
            default_root_dir=tmp_path / "results",
            callbacks=list(callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
        )
        engine.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
        return {name: value.clone() for name, value in model.state_dict().items() if "tower" not in name}

    return run


@pytest.fixture
def few_shot(make_folder):
    source = make_folder(4, 4)
    return lambda **options: FewShot(source, k_shot=1, train_batch_size=4, **options)


def newest(tmp_path, name="resume.ckpt"):
    paths = sorted((tmp_path / "results").rglob(name), key=lambda path: path.stat().st_mtime_ns)
    return paths[-1] if paths else None


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    differing = [name for name, value in expected.items() if not torch.equal(value, state[name])]
    assert not differing


def kill_and_resume(train, make, tmp_path, step, hook, **options):
    with pytest.raises(Killed):
        train(make(), callbacks=[Killer(step, hook)], **options)
    point = newest(tmp_path)
    # Without a resume point the training begins anew, as it would by hand.
    state = train(make(), seed=0 if point is None else 99, ckpt_path=point, **options)
    assert newest(tmp_path) is None or point is not None
    for path in (tmp_path / "results").rglob("resume.ckpt"):
        path.unlink()
    return state


def test_few_shot_training_killed_at_random_steps_ends_bit_for_bit_the_same(train, few_shot, tmp_path):
    expected = train(few_shot())
    draw = random.Random(0)
    hooks = ("on_train_batch_start", "on_train_batch_end", "on_before_optimizer_step")
    steps = [draw.randrange(1, 6 * EPOCHS) for _ in range(10)]
    for step in steps:
        assert_same(kill_and_resume(train, few_shot, tmp_path, step, draw.choice(hooks)), expected)


def test_synthetic_lesions_are_the_same_after_a_kill(train, few_shot, tmp_path):
    def make():
        return few_shot(abnormal_source="synthetic")

    expected = train(make())
    for step in random.Random(1).sample(range(1, 6 * EPOCHS), 4):
        assert_same(kill_and_resume(train, make, tmp_path, step, "on_train_batch_end"), expected)


def test_random_order_and_augmentations_of_other_datamodules_are_the_same_after_a_kill(train, make_folder, tmp_path):
    def make():
        source = make_folder(8, 4)
        source.train_augmentations = RandomHorizontalFlip()
        source.train_batch_size = 2
        return source

    expected = train(make())
    for step in random.Random(2).sample(range(1, 3 * EPOCHS), 4):
        assert_same(kill_and_resume(train, make, tmp_path, step, "on_train_batch_end"), expected)


@pytest.mark.parametrize("step", [7, 11, 16])
def test_the_best_epoch_of_before_the_kill_counts(train, make_folder, tmp_path, step):
    source = make_folder(8, 8)
    source.val_split_mode = ValSplitMode.SAME_AS_TEST
    options = {"selection": "best", "learning_rate": 0.03}

    def make():
        return FewShot(source, k_shot=1, train_batch_size=4)

    expected = train(make(), **options)
    state = kill_and_resume(train, make, tmp_path, step, "on_train_batch_end", **options)
    adapters = {name: value for name, value in expected.items() if "adapters" in name}
    assert_same({name: state[name] for name in adapters}, adapters)
    kept = MVFA.load_from_checkpoint(newest(tmp_path, "model.ckpt")).state_dict()
    assert_same({name: kept[name] for name in adapters}, adapters)


def test_a_resume_point_is_removed_when_the_training_is_complete(train, few_shot, tmp_path):
    seen = []

    class Look(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen.append(newest(tmp_path) is not None)

    train(few_shot(), callbacks=[Look()])
    assert seen == [False, True, True]
    assert newest(tmp_path) is None
    assert newest(tmp_path, "model.ckpt")


def test_another_intensity_rule_is_refused_when_resuming(train, few_shot, tmp_path, monkeypatch):
    rule = ["brain"]
    monkeypatch.setattr(FewShot, "intensity", property(lambda _: rule[0]))
    with pytest.raises(Killed):
        train(few_shot(), callbacks=[Killer(8, "on_train_batch_end")])
    rule[0] = "lung"
    with pytest.raises(ValueError, match=r"trained on images read with the intensity rule 'brain'.*with 'lung'"):
        train(few_shot(), ckpt_path=newest(tmp_path))


SCRIPT = """
import sys, torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib_mvfa import MVFA
from anomalib_mvfa.data import FewShot
from anomalib_mvfa.callbacks.fitting import ResumePoint
ResumePoint.SECONDS = 0
torch.set_num_threads(1)
torch.manual_seed(0)
root, out, backbone = sys.argv[1:]
names = {"normal_dir": "normal", "abnormal_dir": "abnormal", "mask_dir": "masks"}
folder = Folder("disks", root=root, num_workers=0, seed=0, **names)
model = MVFA(backbone, "random", class_name="Brain", visualizer=False)
engine = Engine(accelerator="cpu", max_epochs=10000, default_root_dir=out, logger=False, enable_progress_bar=False)
engine.fit(model, datamodule=FewShot(folder, k_shot=1))
"""


def test_a_process_killed_by_the_system_leaves_complete_files(make_folder, tmp_path, small_backbone, train):
    make_folder(4, 4)
    out = tmp_path / "results"
    arguments = [sys.executable, "-c", SCRIPT, tmp_path / "data", out, small_backbone]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while newest(tmp_path) is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(random.Random().random())
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    for path in out.rglob("*.ckpt"):
        if not path.name.startswith("partial-"):
            assert torch.load(path, weights_only=True)["mvfa"]
    contents = torch.load(newest(tmp_path), weights_only=True)
    assert contents["epoch"] >= 0


# Full disks. /dev/full takes nothing: every write to it fails like one to a full disk.

full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")


def fill(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("/dev/full")


@full
@pytest.mark.parametrize("name", ["table.csv", "picture.png", "x" * 240 + ".png", "\N{SNOWMAN}" * 80 + ".nii.gz"])
def test_a_full_disk_leaves_what_was_there(tmp_path, name):
    path = tmp_path / name
    path.write_text("before", encoding="utf-8")
    fill(partial_name(path))
    with pytest.raises(OSError, match="No space left"), replacing(path) as partial:
        partial.write_text("after", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@full
def test_a_checkpoint_on_a_full_disk_leaves_the_one_before(train, few_shot, tmp_path):
    class Fill(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                path = Path(trainer.checkpoint_callback.dirpath) / "resume.ckpt"
                self.before = path.read_bytes()
                fill(partial_name(path))

    filler = Fill()
    with pytest.raises(OSError, match="No space left"):
        train(few_shot(), callbacks=[filler])
    point = newest(tmp_path)
    assert point.read_bytes() == filler.before
    assert not partial_name(point).is_symlink()
    train(few_shot(), ckpt_path=point)


@full
def test_predictions_on_a_full_disk_leave_the_table_before(train, few_shot, tmp_path):
    train(few_shot())
    checkpoint = newest(tmp_path, "model.ckpt")
    table = tmp_path / "out" / "MVFA" / "latest" / "images" / "predictions.csv"
    table.parent.mkdir(parents=True)
    table.write_text("before", encoding="utf-8")
    fill(partial_name(table))
    engine = Engine(accelerator="cpu", default_root_dir=tmp_path / "out", logger=False, enable_progress_bar=False)
    with pytest.raises(OSError, match="No space left"):
        engine.predict(MVFA(visualizer=False), data_path=tmp_path / "data" / "normal", ckpt_path=checkpoint)
    assert table.read_text(encoding="utf-8") == "before"


@full
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_adapters_on_a_full_disk_leave_those_before(tmp_path, small_backbone, suffix):
    model = MVFA(small_backbone, "random", class_name="Brain")
    model.configure_model()
    path = model.save_adapters(tmp_path / f"adapters{suffix}")
    before = path.read_bytes()
    fill(partial_name(path))
    with pytest.raises(OSError, match="No space left"):
        model.save_adapters(path)
    assert path.read_bytes() == before


@full
def test_volumes_on_a_full_disk_leave_those_before(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    from anomalib_mvfa.data.readers import write_volume

    like, path = tmp_path / "like.nii.gz", tmp_path / "a.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4)), like)
    write_volume(path, np.zeros((4, 4, 4)), like)
    before = path.read_bytes()
    fill(partial_name(path))
    with pytest.raises(OSError, match="No space left"):
        write_volume(path, np.ones((4, 4, 4)), like)
    assert path.read_bytes() == before
