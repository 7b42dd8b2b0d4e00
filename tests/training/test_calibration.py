# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Where supports come from, and ranges over whole sets."""

import pickle
from contextlib import nullcontext
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from anomalib_mvfa.model.memory import Support
from anomalib_mvfa.model.torch_model import SupportOutput
from anomalib_mvfa.post_processing import MVFAPostProcessor
from anomalib_mvfa.training import calibration as calibrating
from anomalib_mvfa.training.calibration import Calibration, branch_extremes, find_support


class Images(list):
    """Images of one value each, some of them abnormal."""

    def __init__(self, labels):
        super().__init__(SimpleNamespace(image=torch.full((3, 2, 2), float(index))) for index, _ in enumerate(labels))
        self.samples = pd.DataFrame({"label_index": labels})


def test_datamodule_is_asked_for_its_supports():
    support = Support(torch.rand(1, 2, 3, 4, 4), torch.rand(1, 3, 4, 4))
    assert find_support(SimpleNamespace(support=support), None, 8, lambda image: image) is support


def test_normal_training_images_are_taken_evenly():
    support = find_support(None, Images([0, 1, 0, 0, 1, 0, 0, 0]), 3, lambda image: image + 0.5)
    assert support.normal.shape == (1, 3, 3, 2, 2)
    assert support.normal[0, :, 0, 0, 0].tolist() == [0.5, 3.5, 6.5]  # 0, 3 and 6 of the normal 0, 2, 3, 5, 6, 7
    assert len(support.abnormal) == 0


def test_without_normal_images_or_a_list_of_them_there_is_no_support(caplog):
    assert find_support(None, Images([1, 1]), 3, lambda image: image) is None
    assert not caplog.records
    assert find_support(None, [1, 2], 3, lambda image: image) is None
    assert "no samples to remember" in caplog.text


def test_ranges_cover_all_batches_of_all_loaders(tiny):
    images = torch.rand(5, 3, 112, 112, generator=torch.Generator().manual_seed(0))

    def collate(items):
        return SimpleNamespace(image=torch.stack(items))

    loaders = [DataLoader(list(part), batch_size=2, collate_fn=collate) for part in (images[:3], images[3:])]
    assert branch_extremes(tiny, loaders, lambda image: image, torch.device("cpu")) == []
    tiny.remember(Support(images[None, :2], images[:0]))
    extremes = branch_extremes(tiny, loaders, lambda image: image, torch.device("cpu"))
    assert len(extremes) == 3
    with torch.no_grad():
        branches = tiny.branches(images)
    for index, branch in enumerate(branches):
        for field in ("anomaly_map", "score"):
            kept = torch.cat([getattr(pair[index], field) for pair in extremes])
            values = getattr(branch, field)
            torch.testing.assert_close(kept.aminmax(), values.aminmax(), atol=1e-5, rtol=1e-5)
    assert not extremes[0][0].score.requires_grad


@pytest.mark.parametrize(
    ("trained", "adapters", "memory", "empty", "holds", "refusal"),
    [
        (True, None, True, False, (True, True), None),
        (True, None, False, True, (True, True), None),
        (False, "brain.pth", False, True, (False, False), None),
        (False, None, False, True, (False, False), "The adapters are untrained"),
        (True, None, True, True, (True, True), "The memory bank is empty"),
        (True, None, True, False, (False, True), "no memory bank that fits"),
        (True, None, True, False, (True, False), "thresholds of the checkpoint do not fit"),
    ],
)
def test_only_what_is_trained_and_calibrated_is_exported(trained, adapters, memory, empty, holds, refusal):
    options = {"adapters": adapters, "memory": memory}
    model = SimpleNamespace(memory=SimpleNamespace(is_empty=empty))
    module = SimpleNamespace(trained=trained, option=options.__getitem__, model=model)
    with pytest.raises(ValueError, match=refusal) if refusal else nullcontext():
        Calibration(bank_holds=holds[0], thresholds_hold=holds[1]).check(module)


def test_a_copy_of_a_calibration_leaves_the_data_behind():
    datamodule = Images([0])
    calibration = Calibration(bank_holds=True)
    calibration.end(SimpleNamespace(trainer=SimpleNamespace(datamodule=datamodule)))
    copy = pickle.loads(pickle.dumps(calibration))
    assert copy.state() == {"bank_holds": True, "thresholds_hold": True}
    assert calibration._data() is datamodule
    assert copy._data is None
    calibration.drop()
    assert calibration.state() == {"bank_holds": False, "thresholds_hold": False}


def test_given_adapters_are_calibrated_anew_for_other_data(monkeypatch):
    def module(datamodule):
        options = {"memory": False, "fusion_scale": "support"}
        trainer = SimpleNamespace(datamodule=datamodule, testing=True)
        return SimpleNamespace(trained=False, option=options.get, trainer=trainer, fit_state=None)

    first, second, dropped = Images([0]), Images([0]), []
    calibration = Calibration(bank_holds=True)
    calibration.end(module(first))
    monkeypatch.setattr(calibration, "drop", lambda: dropped.append(True))
    calibration.complete(module(first))
    assert not dropped
    calibration.complete(module(second))
    assert dropped == [True]
    calibration.complete(module(None))
    assert dropped == [True, True]


@pytest.mark.parametrize("scale", ["support", "test"])
def test_ranges_of_a_validation_come_from_its_images_where_that_is_asked_for(scale, monkeypatch):
    calls = []
    monkeypatch.setattr(calibrating, "_scale_by", lambda *given: calls.append(given))
    monkeypatch.setattr(calibrating, "_offer", lambda *given: calls.append(given))
    options = {"memory": False, "fusion_scale": scale}
    trainer = SimpleNamespace(val_dataloaders="loaders")
    module = SimpleNamespace(trained=False, option=options.get, trainer=trainer, fit_state=None)
    Calibration().begin(module)
    assert calls == [(module, "loaders")] * (scale == "test") + [(module, None)]


@pytest.mark.parametrize(
    ("scale", "testing", "expected"), [("support", True, 0), ("test", False, 0), ("test", True, 1)]
)
def test_ranges_of_a_test_come_from_its_images_where_that_is_asked_for(scale, testing, expected, monkeypatch, caplog):
    calls = []
    monkeypatch.setattr(calibrating, "_scale_by", lambda *given: calls.append(given))
    trainer = SimpleNamespace(testing=testing, test_dataloaders="loaders")
    options = {"memory": False, "fusion_scale": scale}
    module = SimpleNamespace(trained=True, option=options.get, trainer=trainer, fit_state=None)
    Calibration(bank_holds=True, thresholds_hold=True).complete(module)
    assert calls == [(module, "loaders")] * expected
    assert ("taken from the whole test set" in caplog.text) == bool(expected)


def test_a_trained_model_without_data_to_calibrate_it_is_refused():
    options = {"memory": False, "fusion_scale": "support"}
    trainer = SimpleNamespace(testing=True, datamodule=None)
    module = SimpleNamespace(trained=True, option=options.get, trainer=trainer, fit_state=None)
    calibration = Calibration(bank_holds=True)
    with pytest.raises(ValueError, match="thresholds of the checkpoint do not fit"):
        calibration.complete(module)
    assert not calibration.holds
    module.fit_state = SimpleNamespace()  # a training that is not validated goes on
    calibration.complete(module)
    module.trained, module.fit_state = False, None  # given adapters need none
    Calibration().complete(module)


@pytest.mark.parametrize(
    ("trained", "holds", "fitting", "built"),
    [(True, True, False, False), (True, False, False, True), (False, True, False, True), (True, True, True, True)],
)
def test_the_bank_is_built_from_the_data_at_hand_where_it_is_due(trained, holds, fitting, built, monkeypatch):
    asked, offered = [], []
    monkeypatch.setattr(calibrating, "find_support", lambda *given: asked.append(given) or "support")
    monkeypatch.setattr(calibrating, "training_data", lambda trainer: trainer.data)
    monkeypatch.setattr(calibrating, "_offer", lambda _, output: offered.append(output))
    module = SimpleNamespace(
        trained=trained,
        option={"memory": True, "max_support": 5, "fusion_scale": "bank"}.get,
        trainer=SimpleNamespace(datamodule="datamodule", data="data"),
        fit_state=SimpleNamespace() if fitting else None,
        model=SimpleNamespace(remember=lambda support: f"outputs of the {support}"),
        pre_processed=len,
    )
    calibration = Calibration(bank_holds=holds)
    calibration.begin(module)
    assert asked == [("datamodule", "data", 5, len)] * built
    assert offered == ["outputs of the support" if built else None]
    assert calibration.bank_holds


def test_supports_set_the_thresholds_of_a_test_without_a_validation_part(monkeypatch):
    given = []
    monkeypatch.setattr(calibrating, "_set_thresholds", lambda *arguments: given.append(arguments))
    monkeypatch.setattr(calibrating, "_validation_loader", lambda module: None)
    monkeypatch.setattr(Calibration, "_remember", lambda *_: "outputs")
    trainer = SimpleNamespace(testing=True, datamodule=None)
    module = SimpleNamespace(trained=True, option={"fusion_scale": "bank"}.get, trainer=trainer, fit_state=None)
    Calibration(bank_holds=True).complete(module)
    assert given == [(module, None, "outputs")]


def test_supports_are_offered_with_both_branches(monkeypatch):
    given = []
    monkeypatch.setattr(MVFAPostProcessor, "set_support", lambda _, *arguments: given.append(arguments))
    module = SimpleNamespace(
        post_processor=MVFAPostProcessor(),
        model=SimpleNamespace(fuse=lambda language, memory: (language, memory)),
        option={"memory": True, "fusion_scale": "bank"}.get,
    )
    monkeypatch.setattr(Calibration, "_remember", lambda *_: SupportOutput("language", "memory", "labels"))
    Calibration().begin(module)
    assert given == [(("language", "memory"), "labels")]
