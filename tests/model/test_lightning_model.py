# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Training, checkpoints and results through anomalib's engine, with the embedded backbone and synthetic images."""

import csv
import logging
from pathlib import Path

import pytest
import torch
from anomalib import LearningType
from anomalib.data.utils import ValSplitMode, read_image
from anomalib.engine import Engine
from lightning.pytorch import Callback
from PIL import Image
from torch.testing import assert_close

from anomalib_mvfa import MVFA
from anomalib_mvfa.data import FewShot
from anomalib_mvfa.weights.adapter_files import read_adapters


@pytest.fixture
def few_shot(make_folder):
    """Make datamodules with 2 + 2 supports of the same images."""
    source = []

    def make(k_shot=2, **arguments):
        source[:] = source or [make_folder(**arguments)]
        return FewShot(source[0], k_shot=k_shot)

    return make


@pytest.fixture
def engine(tmp_path):
    def make(**arguments):
        return Engine(
            accelerator="cpu",
            default_root_dir=tmp_path / "results",
            enable_progress_bar=False,
            logger=False,
            **arguments,
        )

    return make


def fit(engine, datamodule, epochs=1, model=None, seed=0, **arguments):
    if seed is not None:
        torch.manual_seed(seed)
    model = model or MVFA("tiny", class_name="Brain", visualizer=False)
    running = engine(max_epochs=epochs)
    running.fit(model, datamodule=datamodule, **arguments)
    return model, running, Path(running.trainer.checkpoint_callback.last_model_path or running.best_model_path)


def adapters(model):
    return {name: value.clone() for name, value in model.model.state_dict().items() if "adapters" in name}


def rows(tmp_path):
    (path,) = (tmp_path / "results").rglob("predictions.csv")
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_checkpoint_is_small_and_complete_without_the_backbone(few_shot, engine):
    datamodule = few_shot(k_shot=1)
    model, running, path = fit(engine, datamodule)
    contents = torch.load(path, weights_only=False)
    assert not [name for name in contents["state_dict"] if name.startswith("model.tower.")]
    bank = sum(value.numel() for name, value in contents["state_dict"].items() if "_memory." in name)
    learned = sum(value.numel() for value in adapters(model).values())
    assert path.stat().st_size < 2 * bank + 3 * 4 * learned + 200_000  # Adam keeps two values a weight

    loaded = MVFA.load_from_checkpoint(path, weights_only=False).eval()
    assert loaded.model._text is None
    assert loaded.model.class_name == "Brain"
    batch = next(iter(datamodule.test_dataloader())).image
    with torch.no_grad():
        before, after = model.eval()(batch), loaded(batch)
    assert_close(after.pred_score, before.pred_score, atol=1e-3, rtol=0)
    assert_close(after.anomaly_map, before.anomaly_map, atol=1e-3, rtol=0)
    assert running.trainer.current_epoch == 1


def test_resumed_training_equals_uninterrupted_training(few_shot, engine):
    straight, _, _ = fit(engine, few_shot(k_shot=1), epochs=2)
    _, _, path = fit(engine, few_shot(k_shot=1), epochs=1)
    resumed, _, _ = fit(engine, few_shot(k_shot=1), epochs=2, seed=1, ckpt_path=path)
    for name, value in adapters(straight).items():
        assert_close(adapters(resumed)[name], value, atol=1e-7, rtol=0)


def test_a_second_fit_equals_the_first_of_a_new_model(few_shot, engine):
    datamodule = few_shot(k_shot=1)
    model, _, _ = fit(engine, datamodule)
    first = adapters(model)
    for weight in (*model.model.seg_adapters.parameters(), *model.model.det_adapters.parameters()):
        weight.data.zero_()  # so that nothing of the first fit could be learned from
    again, _, _ = fit(engine, datamodule, model=model, seed=5)
    fresh = MVFA("tiny", class_name="Brain", visualizer=False)
    fresh.configure_model()
    torch.manual_seed(5)
    fresh.model.reset()  # the random numbers that the second fit draws
    expected, _, _ = fit(engine, datamodule, model=fresh, seed=None)
    for name, value in adapters(expected).items():
        assert_close(adapters(again)[name], value, atol=1e-6, rtol=0)
        assert not torch.equal(value, first[name]) or value.ndim == 0


def test_a_network_is_built_again_for_other_arguments_and_not_for_the_same():
    model = MVFA("tiny", class_name="Brain", visualizer=False)
    assert model.ensure_model()
    network = model.model
    assert not model.ensure_model()
    assert model.model is network
    model.hparams["levels"] = [1, 2]
    assert model.ensure_model()
    assert model.model.levels == (1, 2)


def test_checkpoints_of_other_weights_and_of_other_models_are_refused(few_shot, engine, tmp_path):
    _, _, path = fit(engine, few_shot(k_shot=1))
    contents = torch.load(path, weights_only=False)
    other = {**contents, "mvfa": {**contents["mvfa"], "fingerprint": "0" * 16}}
    torch.save(other, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other weights of backbone 'tiny'.*--model\.pretrained"):
        MVFA.load_from_checkpoint(tmp_path / "other.ckpt", weights_only=False)
    del contents["mvfa"]
    torch.save(contents, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="not made by MVFA"):
        MVFA.load_from_checkpoint(tmp_path / "foreign.ckpt", weights_only=False)


class Validations(Callback):
    """Adapters and selection score of every validation."""

    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        score = float(trainer.callback_metrics["selection_score"])
        self.seen.append((score, adapters(pl_module)))


def test_selection_keeps_the_best_validation_in_the_model_and_in_the_checkpoint(make_folder, engine, small_backbone):
    source = make_folder(8, 8)
    source.val_split_mode = ValSplitMode.SAME_AS_TEST
    validations = Validations()
    torch.manual_seed(0)
    model = MVFA(small_backbone, "random", visualizer=False, selection="best", learning_rate=0.03)
    running = engine(max_epochs=4, callbacks=[validations])
    running.fit(model, datamodule=FewShot(source, k_shot=1))
    assert len(validations.seen) == 4
    best, expected = max(validations.seen, key=lambda seen: seen[0])
    assert best > min(score for score, _ in validations.seen)
    saved = MVFA.load_from_checkpoint(running.best_model_path)
    for name, value in expected.items():
        assert torch.equal(adapters(model)[name], value)
        assert torch.equal(adapters(saved)[name], value)


@pytest.mark.parametrize(("epochs", "every", "expected"), [(3, 50, [3]), (4, 2, [2, 4]), (3, 2, [2, 3])])
def test_the_last_epoch_is_always_validated_and_saved(few_shot, engine, small_backbone, epochs, every, expected):
    class Epochs(Callback):
        def __init__(self):
            self.seen = []

        def on_validation_end(self, trainer, pl_module):
            self.seen.append(trainer.global_step // trainer.num_training_batches)

    epochs_seen = Epochs()
    running = engine(max_epochs=epochs, check_val_every_n_epoch=every, callbacks=[epochs_seen])
    running.fit(MVFA(small_backbone, "random", visualizer=False), datamodule=few_shot(k_shot=1))
    assert epochs_seen.seen == expected
    contents = torch.load(running.best_model_path, weights_only=False)
    assert contents["global_step"] == epochs * running.trainer.num_training_batches
    assert contents["mvfa"]["calibration"] == {"bank_holds": True, "thresholds_hold": True}


def test_learning_type_follows_from_adapters_and_memory():
    assert MVFA("tiny").learning_type == LearningType.ONE_CLASS
    assert MVFA("tiny", memory=False).learning_type == LearningType.ONE_CLASS
    assert MVFA("tiny", adapters="a.pth").learning_type == LearningType.FEW_SHOT
    assert MVFA("tiny", adapters="a.pth", memory=False).learning_type == LearningType.ZERO_SHOT


@pytest.mark.parametrize(
    ("choice", "named"),
    [
        ({"fusion_scale": "train"}, "fusion_scale"),
        ({"selection": "first"}, "selection"),
        ({"threshold": "youden"}, "threshold"),
        ({"variant": {"pooling": "median"}}, "pooling"),
        ({"variant": "draft"}, "variant"),
    ],
)
def test_unknown_choices_are_refused_at_once(choice, named):
    with pytest.raises(ValueError, match=named):
        MVFA("tiny", **choice)


@pytest.mark.parametrize("memory", [True, False])
def test_given_adapters_are_evaluated_without_training(few_shot, engine, tmp_path, memory):
    torch.manual_seed(6)
    source = MVFA("tiny", class_name="Brain")
    source.configure_model()
    path = source.save_adapters(tmp_path / "given.safetensors")
    model = MVFA("tiny", adapters=path, class_name="Brain", memory=memory, visualizer=False)
    results = engine().train(model, datamodule=few_shot())
    assert all(torch.equal(value, adapters(source)[name]) for name, value in adapters(model).items())
    assert model.model.memory.is_empty is not memory
    assert 0 <= results[0]["image_AUROC"] <= 1


def test_supports_without_masks_leave_the_segmentation_adapters_alone(few_shot, engine):
    torch.manual_seed(0)
    model = MVFA("tiny", class_name="Brain", visualizer=False)
    model.configure_model()
    before = adapters(model)
    fit(engine, few_shot(masks=False), model=model)
    assert model.model.has_masks is False
    moved = {name for name, value in adapters(model).items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("det_") for name in moved)
    assert model.model.seg_memory.is_empty
    assert not model.model.det_memory.is_empty


def test_normal_images_alone_train_with_synthetic_lesions(make_folder, engine, caplog):
    torch.manual_seed(0)
    model = MVFA("tiny", visualizer=False)
    model.configure_model()
    before = adapters(model)
    with caplog.at_level(logging.INFO, logger="anomalib_mvfa"):
        fit(engine, make_folder(normal=8, abnormal=0), model=model)
    assert "synthetic lesions" in caplog.text
    after = adapters(model)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {name for name in after if "fc1" in name} <= moved
    assert model.model.has_masks is True
    assert not model.model.seg_memory.is_empty


def test_results_have_a_row_and_a_panel_at_its_own_size_for_each_image(few_shot, engine, tmp_path):
    datamodule = few_shot(size=(100, 64))
    torch.manual_seed(0)
    model = MVFA("tiny", class_name="Brain")
    running = engine(max_epochs=1)
    running.fit(model, datamodule=datamodule)
    running.test(model, datamodule=datamodule)
    paths = set(datamodule.test_data.samples.image_path)
    table = rows(tmp_path)
    assert list(table[0]) == ["path", "score", "label", "threshold", "abnormal_area", "true_label"]
    assert len(table) == len(paths)
    assert {row["path"] for row in table} == paths
    assert {row["true_label"] for row in table} == {"0", "1"}
    pictures = list((tmp_path / "results").rglob("*.png"))
    assert len(pictures) == len(paths)
    for picture in pictures:
        with Image.open(picture) as image:
            panels, rest = divmod(image.width, 100)
            assert (image.height, rest) == (64, 0)
            assert panels >= 3

    running.predict(model, data_path=tmp_path / "data" / "abnormal")
    table = rows(tmp_path)
    assert list(table[0]) == ["path", "score", "label", "threshold", "abnormal_area", "error"]
    assert sorted(row["path"] for row in table) == sorted(map(str, (tmp_path / "data" / "abnormal").glob("*.png")))
    for row in table:
        assert 0 <= float(row["score"]) <= 1
        assert 0 <= float(row["abnormal_area"]) <= 1
        assert row["label"] == str(int(float(row["score"]) > float(row["threshold"])))


def test_fusion_range_comes_from_the_test_set_only_when_asked(make_folder, engine):
    datamodule = make_folder()
    model, running, _ = fit(engine, datamodule)
    fitted = model.model.fusion.language_map.clone()
    running.test(model, datamodule=datamodule)
    assert torch.equal(model.model.fusion.language_map, fitted)

    model.hparams["fusion_scale"] = "test"
    running.test(model, datamodule=datamodule)
    values = []
    with torch.no_grad():
        for batch in datamodule.test_dataloader():
            language, memory = model.model.branches(model.pre_processor.transform(batch.image))
            values.append((language, memory))
    for index, branch in enumerate(("language", "memory")):
        maps = torch.cat([pair[index].anomaly_map.flatten() for pair in values])
        expected = torch.stack([maps.min(), maps.max()])
        assert_close(getattr(model.model.fusion, f"{branch}_map"), expected, atol=1e-5, rtol=0)


def without_validation(make_folder, k_shot=2):
    source = make_folder()
    source.val_split_mode = ValSplitMode.NONE
    return FewShot(source, k_shot=k_shot, abnormal_source="synthetic")


def test_without_validation_the_normal_supports_set_the_thresholds(make_folder, engine, tmp_path):
    datamodule = without_validation(make_folder)
    model = MVFA("tiny", class_name="Brain", visualizer=False, threshold="fpr", target_fpr=0.4)
    model, running, path = fit(engine, datamodule, model=model)
    post = model.post_processor
    with torch.no_grad():
        output = model.model.remember(datamodule.support)
        expected = model.model.fuse(output.language, output.memory)
    assert output.labels.tolist() == [False] * 2 + [True] * 2
    scores = expected.pred_score[:2]
    assert float(post.image_threshold) == pytest.approx(float(scores.max()), abs=1e-4)  # one of three is the largest
    pixels = expected.anomaly_map[:2].flatten()
    assert float((pixels > post.pixel_threshold).float().mean()) == pytest.approx(0.4, abs=1e-3)
    assert float(post.image_max) == pytest.approx(float(expected.pred_score.max()), abs=1e-4)

    loaded = MVFA.load_from_checkpoint(path)
    assert torch.equal(loaded.post_processor.image_threshold, post.image_threshold)
    assert not loaded.model.memory.is_empty
    assert loaded.post_processor.threshold == "fpr"
    running.test(loaded, datamodule=datamodule)
    with torch.no_grad():
        for row in rows(tmp_path):
            image = model.pre_processed(read_image(row["path"], as_tensor=True))
            raw = loaded.model(image[None]).pred_score
            assert row["label"] == str(int(raw > post.image_threshold))


def test_fpr_without_normal_images_is_refused_before_training(make_folder, engine):
    datamodule = without_validation(make_folder)
    model = MVFA("tiny", class_name="Brain", visualizer=False, memory=False, threshold="fpr")
    with pytest.raises(ValueError, match=r"threshold='fpr'.*no validation part"):
        fit(engine, datamodule, model=model)


def test_given_adapters_without_validation_are_tested_with_bank_and_labels(make_folder, engine, tmp_path):
    torch.manual_seed(6)
    source = MVFA("tiny", class_name="Brain")
    source.configure_model()
    path = source.save_adapters(tmp_path / "given.safetensors")
    model = MVFA("tiny", adapters=path, class_name="Brain", visualizer=False)
    engine().test(model, datamodule=without_validation(make_folder))
    assert not model.model.memory.is_empty
    assert {row["label"] for row in rows(tmp_path)} <= {"0", "1"}
    assert model.post_processor.image_threshold.isfinite()


def test_supports_do_not_replace_validation_images_that_come_later(make_folder, engine, caplog):
    source = make_folder(normal=12)
    source.test_split_ratio = 0.5
    model = MVFA("tiny", class_name="Brain", visualizer=False, threshold="fpr", target_fpr=0.3)
    datamodule = FewShot(source, k_shot=2)
    with caplog.at_level(logging.WARNING, logger="anomalib_mvfa"):
        fit(lambda **options: engine(check_val_every_n_epoch=2, **options), datamodule, epochs=2, model=model)
    assert "normal supports" not in caplog.text
    with torch.no_grad():
        batches = [model.validation_step(batch) for batch in datamodule.val_dataloader()]
    scores = torch.cat([batch.pred_score[~batch.gt_label.bool()] for batch in batches])
    assert float(model.post_processor.image_threshold) == pytest.approx(float(scores.max()), abs=1e-4)


def test_training_and_figures_are_told_by_the_checkpoint_and_the_adapters_file(few_shot, engine, tmp_path):
    datamodule = few_shot()
    model, running, path = fit(engine, datamodule, epochs=2)
    results = running.test(model, datamodule=datamodule, verbose=False)[0]
    facts = read_adapters(model.save_adapters(tmp_path / "a.safetensors")).metadata
    assert facts["training"] == {
        "data": "disks",
        "classes": ["Brain"],
        "k_shot": 2,
        "seed": 0,
        "synthetic_lesions": False,
        "epochs": 2,
        "learning_rate": 1e-3,
    }
    assert facts["figures"]["images"] == len(datamodule.test_data)
    assert facts["figures"]["metrics"]["image_AUROC"] == pytest.approx(results["image_AUROC"])
    assert str(tmp_path) not in str(facts)
    assert MVFA.load_from_checkpoint(path).facts()["training"] == facts["training"]
