# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Images that say nothing, parts that lack a class, low precision and trainings that diverge: never NaN in silence."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.data.utils import ValSplitMode
from anomalib.engine import Engine
from lightning.pytorch import Callback
from PIL import Image

from anomalib_mvfa import MVFA, MVFAModel
from anomalib_mvfa.callbacks.run_record import data_fingerprint
from anomalib_mvfa.data import FewShot
from anomalib_mvfa.files import content_digest
from anomalib_mvfa.model.loss import training_losses
from anomalib_mvfa.model.memory import Support
from anomalib_mvfa.weights.adapter_files import read_adapters


@pytest.fixture
def engine(tmp_path):
    def make(**options):
        return Engine(
            accelerator="cpu",
            default_root_dir=tmp_path / "results",
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
            **options,
        )

    return make


@pytest.fixture
def model(small_backbone):
    def make(**options):
        torch.manual_seed(0)
        return MVFA(small_backbone, "random", **{"class_name": "Brain", "visualizer": False, **options})

    return make


def write(root, kind, pictures):
    (root / kind).mkdir(parents=True, exist_ok=True)
    for index, pixels in enumerate(pictures):
        Image.fromarray(pixels.astype(np.uint8)).save(root / kind / f"{index}.png")


def folder(root, **options):
    return Folder(
        "odd",
        normal_dir="normal",
        abnormal_dir="abnormal",
        mask_dir="masks",
        root=root,
        train_batch_size=2,
        eval_batch_size=2,
        num_workers=0,
        seed=0,
        **options,
    )


def one_pixel(size=56):
    mask = np.zeros((size, size))
    mask[17, 23] = 255
    return mask


IMAGES = {
    "black": (np.zeros((56, 56)), np.zeros((56, 56))),
    "constant": (np.full((56, 56), 130), np.full((56, 56), 130)),
    "white": (np.full((56, 56), 255), np.full((56, 56), 255)),
    "one-pixel lesion": (np.full((56, 56), 90), np.full((56, 56), 90) + one_pixel() / 3),
}


@pytest.mark.parametrize(("kind", "precision"), [*((kind, "32") for kind in IMAGES), ("black", "bf16-mixed")])
def test_images_that_say_nothing_give_finite_numbers(tmp_path, engine, model, kind, precision):
    normal, abnormal = IMAGES[kind]
    write(tmp_path, "normal", [normal] * 5)
    write(tmp_path, "abnormal", [abnormal] * 4)
    write(tmp_path, "masks", [one_pixel()] * 4)
    running, mvfa = engine(max_epochs=2, precision=precision), model()
    data = FewShot(folder(tmp_path, val_split_mode=ValSplitMode.SAME_AS_TEST), k_shot=1, train_batch_size=4)
    # The images of a class are copies of each other, which validation and test would lose with the supports.
    data._setup = lambda stage=None: setup_with_copies(data, stage)
    running.fit(mvfa, datamodule=data)
    (figures,) = running.test(mvfa, datamodule=data)
    assert all(math.isfinite(value) for value in figures.values())
    state = mvfa.state_dict()
    assert all(bool(value.isfinite().all()) for value in state.values() if value.is_floating_point())
    (table,) = (tmp_path / "results").rglob("predictions.csv")
    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert all(0 <= float(row["score"]) <= 1 for row in rows)


def setup_with_copies(data, stage):
    import anomalib_mvfa.data.few_shot as module

    keep_all = module.drop_copies
    module.drop_copies = lambda samples, **_: list(range(len(samples)))
    try:
        FewShot._setup(data, stage)
    finally:
        module.drop_copies = keep_all


@pytest.mark.parametrize(("normal", "abnormal"), [(1, 1), (1, 0), (2, 0)])
def test_a_single_support_gives_finite_numbers(small_backbone, normal, abnormal):
    torch.manual_seed(0)
    mvfa = MVFAModel(small_backbone, "random", class_name="Brain").eval()
    for versions in (1, 11):
        mvfa.remember(Support(torch.rand(versions, normal, 3, 56, 56), torch.rand(abnormal, 3, 56, 56)))
        with torch.no_grad():
            found = mvfa(torch.cat([torch.rand(2, 3, 56, 56), torch.zeros(1, 3, 56, 56)]))
        assert bool(found.pred_score.isfinite().all())
        assert bool(found.anomaly_map.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gives_finite_losses_gradients_and_scores(model, dtype):
    mvfa = model()
    mvfa.configure_model()
    images = torch.stack([torch.rand(3, 56, 56), torch.zeros(3, 56, 56), torch.ones(3, 56, 56)])
    masks = torch.zeros(3, 56, 56)
    masks[0, 5, 5] = 1
    with torch.autocast("cpu", dtype):
        losses = training_losses(mvfa.model, images, torch.tensor([1, 0, 0]), masks)
        torch.stack(list(losses.values())).sum().backward()
        mvfa.model.remember(Support(images[None], images[:1]))
        with torch.no_grad():
            found = mvfa.model(images)
    gradients = [weight.grad for weight in mvfa.model.parameters() if weight.grad is not None]
    assert gradients
    for values in (*losses.values(), *gradients, found.pred_score, found.anomaly_map):
        assert bool(values.isfinite().all())
    assert found.pred_score.dtype == torch.float32


def test_no_abnormal_validation_images_give_labels_all_the_same(make_folder, engine, model):
    source = make_folder(10, 4)
    source.val_split_mode, source.val_split_ratio = ValSplitMode.FROM_TRAIN, 0.3
    running, mvfa = engine(max_epochs=1), model()
    data = FewShot(source, k_shot=2, abnormal_source="test")
    running.fit(mvfa, datamodule=data)
    assert set(data.val_data.samples.label_index) == {0}
    assert math.isfinite(float(mvfa.post_processor.image_threshold))
    assert math.isfinite(float(mvfa.post_processor.pixel_threshold))
    (figures,) = running.test(mvfa, datamodule=data)
    assert all(math.isfinite(value) for value in figures.values())


class Poison(Callback):
    """Breaks a training at a step."""

    def __init__(self, step, what):
        self.step, self.what, self.good = step, what, None

    def on_train_epoch_start(self, trainer, pl_module):
        self.good = {name: value.clone() for name, value in pl_module.model.state_dict().items() if "adapt" in name}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            if self.what == "image":
                batch.image[0, 0, 0, 0] = float("nan")
            elif self.what == "adapters":
                with torch.no_grad():
                    next(pl_module.model.det_adapters.parameters())[0, 0] = float("inf")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step and self.what == "gradient":
            next(weight for weight in pl_module.parameters() if weight.grad is not None).grad[0] = float("nan")


@pytest.mark.parametrize(
    ("what", "step", "told"),
    [
        ("image", 8, r"epoch 2, step 9.*Pixels are not finite in .*\.png"),
        ("adapters", 8, r"epoch 2, step 9.*The adapters are not finite.*learning_rate"),
        ("gradient", 8, r"epoch 2, step 10.*The adapters are not finite.*learning_rate"),
        ("gradient", 11, r"epoch 2, step 13.*The adapters are"),  # the last step: the validation would come next
    ],
)
def test_a_diverging_training_stops_with_a_diagnosis_and_the_last_good_adapters(
    make_folder, engine, model, tmp_path, what, step, told
):
    mvfa, poison = model(), Poison(step, what)
    data = FewShot(make_folder(4, 4), k_shot=1, train_batch_size=4)
    with pytest.raises(FloatingPointError, match=told) as caught:
        engine(max_epochs=2, check_val_every_n_epoch=2, callbacks=[poison]).fit(mvfa, datamodule=data)
    assert "The adapters of 1 complete epochs are in" in str(caught.value)
    (path,) = (tmp_path / "results").rglob("last_good.safetensors")
    for kind, tensors in read_adapters(path).weights.items():
        for name, value in tensors.items():
            assert torch.equal(value, poison.good[f"{kind}.{name}"])
            assert torch.equal(mvfa.model.state_dict()[f"{kind}.{name}"], value)


def test_a_training_that_diverges_at_once_says_so(make_folder, engine, model, tmp_path):
    with pytest.raises(FloatingPointError, match="epoch 1, step 1"):
        engine(max_epochs=2, callbacks=[Poison(0, "image")]).fit(
            model(), datamodule=FewShot(make_folder(4, 4), k_shot=1)
        )
    assert not list((tmp_path / "results").rglob("last_good.safetensors"))


# Reproducibility


def test_two_trainings_of_one_seed_are_equal_bit_for_bit_and_say_how_they_were_made(
    make_folder, engine, model, tmp_path
):
    source = make_folder(5, 5)
    states = []
    for _ in range(2):
        mvfa = model()
        data = FewShot(source, k_shot=2, train_batch_size=4)
        engine(max_epochs=1).fit(mvfa, datamodule=data)
        states.append({name: value for name, value in mvfa.state_dict().items() if "tower" not in name})
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())

    records = [json.loads(path.read_text("utf-8")) for path in sorted((tmp_path / "results").rglob("run.json"))]
    assert records[0] == records[1]
    record = records[0]
    assert record["model"]["learning_rate"] == 1e-3
    assert record["data"]["class"] == "FewShot"
    assert record["data"]["k_shot"] == 2
    assert record["data"]["source"]["class"] == "Folder"
    assert record["trainer"]["max_epochs"] == 1
    assert record["seeds"]["torch"] == 0
    assert record["versions"]["torch"]
    samples = data.train_data.samples
    for label, name in enumerate(("normal", "abnormal")):
        paths = samples.image_path[samples.label_index == label]
        assert record["supports"][name] == [content_digest(path) for path in paths]
    assert record["fingerprints"]["test"] == data_fingerprint(data.test_data)
    assert str(tmp_path) not in json.dumps(record)


def test_the_fingerprint_is_of_contents_not_of_names(make_folder, tmp_path):
    source = make_folder(4, 4)
    source.setup()
    before = data_fingerprint(source.test_data)
    samples = source.test_data.samples.copy()
    moved = tmp_path / "another name.png"
    moved.write_bytes(Path(samples.image_path[0]).read_bytes())
    samples.loc[0, "image_path"] = str(moved)
    source.test_data._samples = samples
    assert data_fingerprint(source.test_data) == before
    moved.write_bytes(moved.read_bytes() + b"x")
    assert data_fingerprint(source.test_data) != before
