# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Arguments beside a checkpoint are honoured or refused; the ends of a training leave a usable checkpoint."""

from datetime import timedelta

import pytest
import torch
from anomalib.data import ImageBatch, ImageItem
from anomalib.engine import Engine
from lightning.pytorch.callbacks import EarlyStopping
from torch.testing import assert_close
from torch.utils.data import DataLoader

from anomalib_mvfa import MVFA
from anomalib_mvfa.data import FewShot

DIVERGES = EarlyStopping("train_loss", mode="max", patience=1, min_delta=9.0)  # stops in the second epoch


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("arguments")


@pytest.fixture(scope="module")
def folder(root, make_folder_in):
    return lambda **options: make_folder_in(root / "data", **{"normal": 12, "abnormal": 8, **options})


@pytest.fixture(scope="module")
def few_shot(folder):
    def make(**options):
        source = folder(**options)
        source.test_split_ratio = 0.5  # normal images to validate with, too
        return FewShot(source, k_shot=2, train_batch_size=4)

    return make


@pytest.fixture(scope="module")
def new_engine(root):
    def make(**options):
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        return Engine(accelerator="cpu", **{"default_root_dir": root / "results", **quiet, **options})

    return make


@pytest.fixture(scope="module")
def new_model(small_backbone):
    return lambda **options: MVFA(small_backbone, "random", visualizer=False, **options)


@pytest.fixture(scope="module")
def checkpoint(few_shot, new_engine, new_model):
    torch.manual_seed(0)
    engine = new_engine(max_epochs=1)
    engine.fit(new_model(class_name="Brain"), datamodule=few_shot())
    return engine.best_model_path


@pytest.mark.parametrize(
    "end",
    [
        {"max_epochs": 9, "callbacks": [DIVERGES], "check_val_every_n_epoch": 9},
        {"max_steps": 2},
        {"max_time": timedelta(microseconds=1), "check_val_every_n_epoch": 5},
        {"max_epochs": 3, "check_val_every_n_epoch": 2},
    ],
)
def test_every_end_of_a_training_leaves_a_checkpoint_with_bank_and_thresholds(end, few_shot, new_engine, new_model):
    torch.manual_seed(0)
    engine = new_engine(**end)
    engine.fit(new_model(), datamodule=few_shot())
    saved = torch.load(engine.best_model_path, weights_only=False)
    assert saved["global_step"] == engine.trainer.global_step > 0
    assert saved["mvfa"]["calibration"] == {"bank_holds": True, "thresholds_hold": True}
    assert saved["state_dict"]["model.seg_memory.level_0"].numel() > 0
    assert saved["state_dict"]["post_processor._image_threshold"].isfinite()
    model = MVFA.load_from_checkpoint(engine.best_model_path, visualizer=False)
    before = model.model.seg_memory[0].clone()
    new_engine().test(model, datamodule=few_shot())
    assert torch.equal(model.model.seg_memory[0], before)


def test_a_checkpoint_from_the_middle_of_a_training_is_calibrated_by_the_test_data_or_refused(
    few_shot, new_engine, new_model, folder, tmp_path
):
    torch.manual_seed(0)
    engine = new_engine(max_steps=2)
    engine.fit(new_model(), datamodule=few_shot())
    model = engine.model
    model.calibration.drop()
    engine.trainer.save_checkpoint(tmp_path / "middle.ckpt")

    loaded = MVFA.load_from_checkpoint(tmp_path / "middle.ckpt", visualizer=False)
    with pytest.raises(ValueError, match="no memory bank that fits"):
        loaded.to_torch(tmp_path)
    with pytest.raises(ValueError, match=r"no memory bank that fits.*--data FewShot"):
        new_engine().predict(loaded, data_path=folder().root / "abnormal")
    new_engine().test(loaded, datamodule=few_shot())
    assert loaded.calibration.holds
    assert_close(loaded.model.seg_memory[0], model.model.seg_memory[0])
    assert_close(loaded.post_processor.image_threshold, model.post_processor.image_threshold)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"backbone": "tiny"}, r"--model\.backbone"),
        ({"levels": [1, 2]}, r"--model\.levels \[1, 2, 3, 4\]"),
        ({"levels": "middle"}, r"--model\.levels"),
        ({"image_size": 112}, r"--model\.image_size"),
        ({"variant": {"activation": "relu"}}, r"--model\.variant\.activation leaky_relu"),
        ({"variant": "paper"}, r"--model\.variant\."),
    ],
)
def test_what_the_weights_fix_is_refused_beside_a_checkpoint(
    given, named, checkpoint, small_backbone, few_shot, new_engine
):
    with pytest.raises(ValueError, match=named):
        MVFA.load_from_checkpoint(checkpoint, **given)
    with pytest.raises(ValueError, match=named):
        new_engine().test(MVFA(visualizer=False, **given), datamodule=few_shot(), ckpt_path=checkpoint)


def test_adapters_beside_a_checkpoint_are_refused(checkpoint, root):
    path = MVFA.load_from_checkpoint(checkpoint).save_adapters(root / "brain.pth")
    with pytest.raises(ValueError, match=r"--ckpt_path or --model\.adapters"):
        MVFA.load_from_checkpoint(checkpoint, adapters=path)


def test_the_arguments_of_the_checkpoint_may_be_given_again(checkpoint, small_backbone):
    same = {"backbone": small_backbone, "levels": [1, 2, 3, 4], "image_size": 56, "variant": "released", "memory": True}
    assert MVFA.load_from_checkpoint(checkpoint, **same).calibration.holds


EVALUATION = [
    {"class_name": "retinal OCT"},
    {"memory": False},
    {"language_weight": 0.9},
    {"coreset": 0.3},
    {"threshold": "fpr", "target_fpr": 0.3},
    {"variant": {"map_blur": 2.0}},
    {"variant": {"pooling": "max", "window_sizes": [1, 3]}},
    {"fusion_scale": "test"},
]


@pytest.mark.parametrize("given", EVALUATION, ids=str)
def test_what_concerns_evaluation_is_honoured_with_thresholds_of_its_own(
    given, checkpoint, few_shot, new_engine, small_backbone
):
    data = few_shot()
    beside = MVFA(visualizer=False, **given)
    new_engine().test(beside, datamodule=data, ckpt_path=checkpoint)
    loaded = MVFA.load_from_checkpoint(checkpoint, visualizer=False, **given)
    new_engine().test(loaded, datamodule=few_shot())
    plain = MVFA.load_from_checkpoint(checkpoint, visualizer=False)
    new_engine().test(plain, datamodule=few_shot())

    images = next(iter(data.test_dataloader())).image
    with torch.no_grad():
        found, again, without = (each.eval()(each.pre_processed(images)) for each in (beside, loaded, plain))
    assert_close(found.pred_score, again.pred_score)
    assert float((found.pred_score - without.pred_score).abs().max()) > 1e-4

    expected = MVFA.load_from_checkpoint(checkpoint, visualizer=False, **given)
    if given != {"fusion_scale": "test"}:  # a validation would take the ranges from other images
        new_engine().validate(expected, datamodule=few_shot())
        for name in ("image_threshold", "pixel_threshold"):
            assert_close(getattr(beside.post_processor, name), getattr(expected.post_processor, name))


def test_thresholds_are_set_in_the_ranges_of_the_test_set(checkpoint, few_shot, new_engine):
    model = MVFA.load_from_checkpoint(
        checkpoint, visualizer=False, fusion_scale="test", threshold="fpr", target_fpr=0.5
    )
    data = few_shot()
    new_engine().test(model, datamodule=data)
    scores = []
    with torch.no_grad():
        for batch in data.val_dataloader():
            scores.append(model.model(model.pre_processed(batch.image)).pred_score[~batch.gt_label.bool()])
    ranks = torch.cat(scores).sort().values
    assert float(model.post_processor.image_threshold) in [pytest.approx(float(score), abs=1e-5) for score in ranks]


@pytest.mark.parametrize("given", [{"language_weight": 0.9}, {"threshold": "fpr"}, {"class_name": "Liver"}])
def test_an_argument_whose_thresholds_cannot_be_set_is_refused(given, checkpoint, folder, new_engine, tmp_path):
    model = MVFA.load_from_checkpoint(checkpoint, visualizer=False, **given)
    with pytest.raises(ValueError, match=r"do not fit|no memory bank that fits"):
        new_engine().predict(model, data_path=folder().root / "abnormal")
    with pytest.raises(ValueError, match=r"do not fit|no memory bank that fits"):
        model.to_torch(tmp_path)


def test_an_export_of_a_checkpoint_honours_or_refuses_what_is_given_beside_it(checkpoint, new_engine, tmp_path):
    with pytest.raises(ValueError, match="do not fit"):
        new_engine().export(MVFA(language_weight=0.9), "torch", tmp_path, ckpt_path=checkpoint)
    with pytest.raises(ValueError, match=r"--model\.image_size"):
        new_engine().export(MVFA(image_size=112), "torch", tmp_path, ckpt_path=checkpoint)
    path = new_engine().export(MVFA(), "torch", tmp_path, ckpt_path=checkpoint)
    assert path.stat().st_size < 30e6


def test_a_resumed_training_refuses_other_arguments(checkpoint, few_shot, new_engine, new_model):
    with pytest.raises(ValueError, match=r"--model\.learning_rate 0\.001, but 0\.01.*goes on with the arguments"):
        new_engine(max_epochs=2).fit(new_model(learning_rate=0.01), datamodule=few_shot(), ckpt_path=checkpoint)


def test_the_test_after_a_resumed_training_is_of_the_trained_model(checkpoint, few_shot, new_engine, new_model):
    trained = new_engine(max_epochs=3)
    figures = trained.train(new_model(), datamodule=few_shot(), ckpt_path=checkpoint)
    straight = MVFA.load_from_checkpoint(trained.best_model_path, visualizer=False)
    expected = new_engine().test(straight, datamodule=few_shot())
    stale = new_engine().test(MVFA.load_from_checkpoint(checkpoint, visualizer=False), datamodule=few_shot())
    assert figures[0]["pixel_AUROC"] == pytest.approx(expected[0]["pixel_AUROC"], abs=1e-3)
    assert figures[0]["pixel_AUROC"] != pytest.approx(stale[0]["pixel_AUROC"], abs=1e-3)


def test_given_epochs_are_honoured_and_the_published_number_is_the_default(few_shot, new_engine, new_model):
    for options, expected in (({"max_epochs": 1000, "max_steps": 1}, 1000), ({"max_steps": 1}, -1)):
        engine = new_engine(**options)
        engine.fit(new_model(), datamodule=few_shot())
        assert engine.trainer.max_epochs == expected
    engine = new_engine(limit_train_batches=1, limit_val_batches=0)
    engine.fit(new_model(), datamodule=few_shot())
    assert engine.trainer.max_epochs == engine.trainer.current_epoch == 50


def test_a_second_fit_with_the_same_engine_is_refused(few_shot, new_engine, new_model):
    engine = new_engine(max_epochs=1)
    engine.fit(new_model(), datamodule=few_shot())
    with pytest.raises(RuntimeError, match="Make a new Engine"):
        engine.fit(new_model(), datamodule=few_shot())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_adapters_of_a_set_without_masks_are_scored_by_the_detection_adapters(
    suffix, few_shot, new_engine, new_model, root
):
    torch.manual_seed(0)
    model = new_model(class_name="Chest X-ray film")
    new_engine(max_epochs=1).fit(model, datamodule=few_shot(masks=False))
    path = model.save_adapters(root / f"chest{suffix}")
    given = new_model(adapters=path, class_name="Chest X-ray film")
    data = few_shot(masks=False)
    new_engine().test(given, datamodule=data)
    assert given.model.has_masks is False
    image = next(iter(data.test_dataloader())).image
    with torch.no_grad():
        languages = [each.model.branches(each.pre_processed(image))[0].score for each in (model, given)]
    assert_close(*languages)


def test_a_plain_loader_without_masks_trains_the_detection_adapters_alone(new_engine, new_model, tmp_path):
    items = [ImageItem(image=torch.rand(3, 56, 56), gt_label=torch.tensor(index % 2)) for index in range(4)]
    loader = DataLoader(items, batch_size=2, collate_fn=ImageBatch.collate)
    model = new_model()
    new_engine(max_epochs=1, default_root_dir=tmp_path).fit(model, train_dataloaders=loader, val_dataloaders=loader)
    assert model.model.has_masks is False


def test_training_in_bfloat16_keeps_ranges_and_thresholds_in_float32(few_shot, new_engine, new_model):
    model = new_model()
    engine = new_engine(max_epochs=1, precision="bf16-true")
    engine.fit(model, datamodule=few_shot())
    assert model.model.seg_adapters[0].fc1[0].weight.dtype == torch.bfloat16
    assert model.model.fusion.memory_map.dtype == model.post_processor.image_threshold.dtype == torch.float32
    results = engine.test(model, datamodule=few_shot())
    assert 0.5 < results[0]["pixel_AUROC"] <= 1
    assert model.post_processor.image_threshold.isfinite()


def test_a_fit_that_sets_no_thresholds_leaves_none_of_an_earlier_fit(few_shot, folder, new_engine, new_model):
    model = new_model(memory=False)
    new_engine(max_epochs=1).fit(model, datamodule=few_shot())
    assert model.post_processor.image_threshold.isfinite()
    new_engine(max_epochs=1, limit_val_batches=0).fit(model, datamodule=few_shot())
    assert model.post_processor.image_threshold.isnan()
    assert model.post_processor.image_max.isnan()


def test_a_bank_of_an_evaluation_can_be_replaced_by_that_of_a_checkpoint(checkpoint, few_shot, new_engine, new_model):
    model = new_model(class_name="Brain")
    new_engine().validate(model, datamodule=few_shot())  # the bank is built in inference mode
    assert not model.model.memory.is_empty
    assert not any(value.is_inference() for value in model.state_dict().values())
    new_engine().test(model, datamodule=few_shot(), ckpt_path=checkpoint)
    saved = torch.load(checkpoint, weights_only=False)["state_dict"]["model.seg_memory.level_0"]
    assert_close(model.model.seg_memory[0], saved.float())
