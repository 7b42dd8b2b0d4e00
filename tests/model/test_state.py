# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""One object, any sequence of steps: each gives what a fresh object gives."""

import copy
from datetime import timedelta

import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.engine import Engine
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch.testing import assert_close
from torch.utils.data import DataLoader

from anomalib_mvfa import MVFA
from anomalib_mvfa.data import FewShot

SETS = {
    "masks": {"normal": 6, "abnormal": 6, "size": (60, 56)},
    "labels": {"normal": 5, "abnormal": 5, "masks": False},
    "normals": {"normal": 6, "abnormal": 0},
}
ENDS = {
    "complete": dict,
    "steps": lambda: {"max_steps": 3},
    "early": lambda: {"callbacks": [EarlyStopping("train_loss", mode="max", patience=1, min_delta=9.0)]},
    "interval": lambda: {"check_val_every_n_epoch": 3},
    "time": lambda: {"max_time": timedelta(microseconds=1)},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_folder_in):
    """Make datamodules of three sets: with masks, with labels alone, and of normal images alone."""
    sources = {}
    for name, options in SETS.items():
        sources[name] = make_folder_in(tmp_path_factory.mktemp(name), **options)
        sources[name]._name = name

    def make(name, k_shot=2):
        source = copy.deepcopy(sources[name])
        return source if name == "normals" else FewShot(source, k_shot=k_shot, train_batch_size=4)

    return make


@pytest.fixture(scope="module")
def new_engine(tmp_path_factory):
    root = tmp_path_factory.mktemp("state")

    def make(**options):
        return Engine(
            accelerator="cpu",
            default_root_dir=root,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
            **{"max_epochs": 2, **options},
        )

    return make


@pytest.fixture(scope="module")
def new_model(small_backbone):
    def make(**options):
        return MVFA(small_backbone, "random", visualizer=False, **options)

    return make


def state(model):
    """All that a step may leave behind, by name."""
    network = {name: value for name, value in model.state_dict().items() if "tower" not in name}
    facts = (model.model.has_masks, model.model.class_name, model.intensity, model.history["training"])
    return network, facts, model.calibration.state()


def assert_same_state(model, expected):
    (network, *others), (wanted, *wanted_others) = state(model), state(expected)
    assert others == wanted_others
    assert network.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_close(
            network[name], value, equal_nan=True, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def fit(model, engine, datamodule, seed):
    torch.manual_seed(seed)
    engine.fit(model, datamodule=datamodule)
    return engine


def scores(predictions):
    return torch.cat([batch.pred_score for batch in predictions])


def save(model, path):
    trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)


def twin_of(model, new_model, path):
    """A fresh object in the state of another: from its checkpoint once it was trained, else with its adapters."""
    if model.trained:
        for memory in (model.model.seg_memory, model.model.det_memory):
            for level in range(memory.num_levels):
                memory[level].copy_(memory[level].half())  # as a checkpoint keeps it
        save(model, path)
        return MVFA.load_from_checkpoint(path, visualizer=False)
    twin = new_model()
    if "model" in model._modules:
        twin.configure_model()
        for kind in ("seg_adapters", "det_adapters"):
            getattr(twin.model, kind).load_state_dict(getattr(model.model, kind).state_dict())
    return twin


FITS = st.tuples(st.just("fit"), st.sampled_from(list(SETS)), st.sampled_from(list(ENDS)))
OTHERS = st.one_of(
    st.tuples(st.sampled_from(["validate", "test"]), st.sampled_from(["masks", "labels"])),
    st.tuples(st.sampled_from(["predict", "export", "reload"])),
)


@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    steps=st.lists(st.one_of(FITS, OTHERS), min_size=3, max_size=5).filter(lambda steps: any("fit" in s for s in steps))
)
@example(steps=[("fit", "masks", "complete"), ("reload",), ("fit", "labels", "steps"), ("test", "labels"), ("export",)])
@example(
    steps=[
        ("test", "masks"),
        ("fit", "normals", "early"),
        ("validate", "masks"),
        ("fit", "masks", "interval"),
        ("predict",),
    ]
)
def test_each_step_of_any_sequence_gives_what_a_fresh_object_gives(steps, data, new_engine, new_model, tmp_path):
    model = new_model()
    for number, (step, *choices) in enumerate(steps):
        if step == "fit":
            name, end = choices
            fresh = new_model()
            for each in (model, fresh):
                fit(each, new_engine(**ENDS[end]()), data(name), seed=number)
            assert model.calibration.holds
            assert_same_state(model, fresh)
        elif step in {"validate", "test"}:
            twin = twin_of(model, new_model, tmp_path / "twin.ckpt")
            metrics = []
            for each in (model, twin):
                torch.manual_seed(number)
                metrics.append(getattr(new_engine(), step)(each, datamodule=data(choices[0])))
            found, expected = ((results or [{}])[0] for results in metrics)
            assert found == pytest.approx(expected, nan_ok=True)
            if model.trained:
                assert_same_state(model, twin)
        elif step == "predict" and model.trained:
            twin = twin_of(model, new_model, tmp_path / "twin.ckpt")
            loader = DataLoader(
                images := PredictDataset(data("masks").source.root / "abnormal"), collate_fn=images.collate_fn
            )
            found, expected = (new_engine().predict(each, dataloaders=loader) for each in (model, twin))
            assert_close(scores(found), scores(expected), atol=1e-5, rtol=0)
            assert_same_state(model, twin)
        elif step == "export" and model.trained:
            twin = twin_of(model, new_model, tmp_path / "twin.ckpt")
            image = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(number))
            exported = torch.load(model.to_torch(tmp_path), weights_only=False)["model"]
            with torch.no_grad():
                assert_close(exported(image).pred_score, twin.eval()(image).pred_score, atol=1e-5, rtol=0)
            assert_same_state(model, twin)
        elif step == "reload" and model.trained:
            save(model, tmp_path / "reload.ckpt")
            model = MVFA.load_from_checkpoint(tmp_path / "reload.ckpt", visualizer=False)
