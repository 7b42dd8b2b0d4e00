# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""WinCLIP on any backbone against anomalib's own, and what its arguments do."""

import copy
from importlib.metadata import version

import open_clip
import pytest
import torch
from anomalib import LearningType
from anomalib.cli import AnomalibCLI
from anomalib.engine import Engine
from anomalib.metrics import Evaluator
from anomalib.models import WinClip
from anomalib.models.image.winclip import torch_model
from anomalib.pre_processing import PreProcessor
from packaging.version import Version
from torchvision.tv_tensors import Image

from anomalib_mvfa import MVFA
from anomalib_mvfa.backbones.loading import fingerprint, resolve_backbone
from anomalib_mvfa.baselines import WinClipAny, win_clip
from anomalib_mvfa.data import FewShot
from anomalib_mvfa.metrics import MVFAEvaluator
from anomalib_mvfa.pre_processing import EightBitResize
from anomalib_mvfa.visualization import MVFAVisualizer

anomalibs_is_right = pytest.mark.skipif(
    Version(version("open-clip-torch")) >= Version("2.26.1"), reason="anomalib's windows are wrong on this open_clip"
)
EMBEDDINGS = ("_text_embeddings", "_patch_embeddings")


@pytest.fixture
def anomalibs_own(monkeypatch):
    """Build anomalib's WinCLIP, its backbone and download replaced by a given CLIP."""

    def build(backbone, clip, **arguments):
        def create(name, pretrained):
            assert (name, pretrained) == (backbone, torch_model.PRETRAINED)
            with torch.device("meta"):  # the architecture that anomalib would build, without filling it
                architecture = open_clip.create_model(name, device="meta")
            shapes = {key: value.shape for key, value in architecture.state_dict().items()}
            assert shapes == {key: value.shape for key, value in clip.state_dict().items()}
            return copy.deepcopy(clip), None, None

        monkeypatch.setattr(torch_model.open_clip, "create_model_and_transforms", create)
        return WinClip(**arguments)

    return build


@pytest.fixture
def small_name(small_backbone):
    """The small tower under a name of open_clip, which anomalib's WinCLIP needs."""
    open_clip.add_model_config(small_backbone)
    yield "small"
    open_clip.factory._MODEL_CONFIGS.pop("small")


def assert_equal_models(ours, theirs, images):
    for got, expected in zip(ours(images), theirs(images), strict=True):
        if expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    for name in EMBEDDINGS:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-6)


@anomalibs_is_right
def test_equals_anomalibs_with_its_own_backbone_and_weights(anomalibs_own):
    ours = WinClipAny(pretrained="random")
    theirs = anomalibs_own(torch_model.BACKBONE, ours.model.clip)
    assert ours.model.grid_size == theirs.model.grid_size == (15, 15)
    for model in (ours, theirs):  # two of twelve blocks will do, and are six times as fast
        model.model.clip.visual.transformer.resblocks = model.model.clip.visual.transformer.resblocks[:2]
    picture = Image(torch.rand(3, 300, 260, generator=torch.Generator().manual_seed(1)))
    image = ours.pre_processor.transform(picture)[None]
    # anomalib resizes in floating point, we as CLIP's own pre-processing does; what follows the resize is the same.
    resized = EightBitResize((240, 240))(picture)
    torch.testing.assert_close(image, theirs.pre_processor.transform(resized)[None], rtol=0, atol=0)
    # anomalib's ensemble takes long on a text tower of this size; the small tower below meets it.
    ours.model.ensemble = {"normal_states": ["{}"], "abnormal_states": ["damaged {}"], "templates": ["a {}."]}
    ours.model.setup("transistor", image.flip(-1))
    theirs.model._text_embeddings = ours.model.text_embeddings
    theirs.model.setup(reference_images=image.flip(-1))
    assert_equal_models(ours.model, theirs.model, image)


@anomalibs_is_right
@pytest.mark.parametrize("shots", [0, 3])
def test_equals_anomalibs_on_the_same_small_tower(shots, anomalibs_own, small_name, small_backbone, monkeypatch):
    monkeypatch.setattr(torch_model, "BACKBONE", small_name)
    ours = WinClipAny(small_backbone, "random").model
    theirs = anomalibs_own(small_name, ours.clip).model
    images = torch.randn(5, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    references = torch.randn(shots, 3, 56, 56, generator=torch.Generator().manual_seed(2)) if shots else None
    for model in (ours, theirs):
        model.setup("Brain", references)
    assert ours.k_shot == theirs.k_shot == shots
    assert_equal_models(ours, theirs, images)


@torch.no_grad()
def test_windows_are_the_same_on_every_release_of_open_clip(golden, golden_files):
    model = win_clip.WinClipAnyModel(resolve_backbone(*golden_files), (2, 3))
    _, (small, large), _ = model.encode_image(golden["test/images"][:2])
    # As anomalib's own computes them on open_clip 2.24.
    expected = torch.tensor([0.59238, -0.48666, -0.23970]), torch.tensor([0.72053, -0.50815, -0.35839])
    torch.testing.assert_close(small[1, 4, :3], expected[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(large[0, 2, :3], expected[1], rtol=0, atol=2e-5)


def test_sees_the_tower_of_mvfa(small_backbone):
    mvfa = MVFA(small_backbone, "random")
    mvfa.configure_model()
    for backbone, pretrained, size in ((small_backbone, "random", (56, 56)), ("tiny", None, (112, 112))):
        model = WinClipAny(backbone, pretrained)
        assert model.pre_processor.transform(torch.rand(3, 90, 70)).shape == (3, *size)
        if backbone == small_backbone:
            assert fingerprint(model.model.clip.visual) == mvfa.model.fingerprint


def test_prompts_and_size_and_normalisation_are_arguments(small_backbone):
    ensemble = {"normal_states": ["{}"], "abnormal_states": ["ill {}"], "templates": ["{}"]}
    model = WinClipAny(small_backbone, "random", image_size=84, prompts=ensemble, normalize_input=False, scales=(2,))
    model.model.setup("liver")
    expected = model.model.clip.encode_text(model.model.tokenizer(["liver", "ill liver"]))
    torch.testing.assert_close(model.model.text_embeddings, expected)
    assert model.model.grid_size == (6, 6)
    assert [list(masks.shape) for masks in model.model.masks] == [[4, 25]]
    white = model.pre_processor.transform(Image(torch.ones(3, 90, 90)))
    assert white.shape == (3, 84, 84)
    torch.testing.assert_close(white, torch.ones_like(white))
    texts = [WinClipAny(small_backbone, "random", prompts=name).model for name in ("winclip", "mvfa")]
    for text in texts:
        text.setup("liver")
    assert not torch.allclose(texts[0].text_embeddings, texts[1].text_embeddings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "unknown"}, "prompts must be one of winclip, mvfa or a mapping"),
        ({"prompts": {"templates": ["{}"]}}, "prompts lacks normal_states, abnormal_states"),
        ({"k_shot": -1}, "k_shot is a number of images"),
        ({"scales": (0, 2)}, "side lengths of windows"),
        ({"scales": ()}, "side lengths of windows"),
        ({"scales": (2, 9)}, r"side lengths of windows within the grid of 4 x 4, got \(2, 9\)"),
    ],
)
def test_unknown_arguments_are_refused(arguments, message, small_backbone):
    with pytest.raises(ValueError, match=message):
        WinClipAny(small_backbone, "random", **arguments)


def test_references_are_the_normal_supports_pre_processed(make_folder, small_backbone, tmp_path):
    data = FewShot(make_folder(normal=8, abnormal=8), k_shot=2, seed=3)
    model = WinClipAny(small_backbone, "random", k_shot=2, visualizer=False)
    assert model.learning_type == LearningType.FEW_SHOT
    engine = Engine(default_root_dir=tmp_path, enable_progress_bar=False, accelerator="cpu", logger=False)
    result = engine.test(model, datamodule=data, verbose=False)[0]
    assert {"image_AUROC", "pixel_AUROC"} <= result.keys()
    assert model.model.class_name == "object"
    assert model.model.k_shot == 2
    normal = model.pre_processor.transform(data.support.normal[0])
    torch.testing.assert_close(model.model.reference_images, normal)
    assert normal.shape == (2, 3, 56, 56)
    assert normal.min() < 0  # normalised


def test_prompts_and_references_are_saved_and_the_windows_are_not(small_backbone):
    model = WinClipAny(small_backbone, "random").model
    saved = {name for name in model.state_dict() if not name.startswith("clip.")}
    assert saved == {"_text_embeddings", "_patch_embeddings", "__visual_embeddings_0", "__visual_embeddings_1"}


def test_more_references_than_supports_are_refused(make_folder, small_backbone, tmp_path):
    data = FewShot(make_folder(normal=8, abnormal=8), k_shot=2)
    engine = Engine(default_root_dir=tmp_path, enable_progress_bar=False, accelerator="cpu", logger=False)
    with pytest.raises(ValueError, match="3 reference images were asked for, but the datamodule has 2"):
        engine.test(WinClipAny(small_backbone, "random", k_shot=3), datamodule=data)


def test_references_of_another_datamodule_are_its_first_training_images(make_folder, small_backbone, tmp_path):
    data = make_folder(normal=8, abnormal=8)
    model = WinClipAny(small_backbone, "random", k_shot=5, class_name="retina", visualizer=False)
    engine = Engine(default_root_dir=tmp_path, enable_progress_bar=False, accelerator="cpu", logger=False)
    engine.test(model, datamodule=data, verbose=False)
    assert model.model.class_name == "retina"
    training = {tuple(model.pre_processor.transform(item.image)[0, 28].tolist()) for item in data.train_data}
    references = [tuple(image[0, 28].tolist()) for image in model.model.reference_images]
    assert len(set(references)) == 5
    assert set(references) <= training


def test_zero_shot_asks_the_datamodule_for_nothing_but_the_name(make_folder, small_backbone, tmp_path):
    data = make_folder(normal=8, abnormal=8)
    data.category = "Retina_RESC"
    model = WinClipAny(small_backbone, "random", visualizer=False)
    assert model.learning_type == LearningType.ZERO_SHOT
    engine = Engine(default_root_dir=tmp_path, enable_progress_bar=False, accelerator="cpu", logger=False)
    engine.test(model, datamodule=data, verbose=False)
    assert model.model.class_name == "retinal OCT"
    assert model.model.k_shot == 0
    assert model.model.reference_images is None


def test_references_validation_and_test_images_are_resized_in_one_way(make_folder, small_backbone, tmp_path):
    """The reference that is also tested has distance zero from the memory."""
    folder = make_folder(normal=8, abnormal=8)
    data = FewShot(folder, k_shot=2, seed=3)
    model = WinClipAny(small_backbone, "random", k_shot=2, visualizer=False)
    engine = Engine(default_root_dir=tmp_path, enable_progress_bar=False, accelerator="cpu", logger=False)
    engine.test(model, datamodule=data, verbose=False)
    support = data.train_data.images
    support.augmentations = None
    for index in range(2):
        original = torch.as_tensor(support[data.train_data.num_abnormal + index].image)
        assert original.shape[-2:] == (64, 72)
        expected = model.pre_processor.transform(original)
        torch.testing.assert_close(model.model.reference_images[index], expected, rtol=0, atol=1e-6)
        resized = EightBitResize((56, 56))(original)
        torch.testing.assert_close(model.pre_processor.transform(resized), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["WinClipAny", "win_clip_any"])
def test_the_host_finds_the_model_by_its_name(name, small_backbone):
    from anomalib.models import get_model

    model = get_model(name, backbone=small_backbone, pretrained="random", k_shot=1)
    assert type(model) is WinClipAny
    assert model.k_shot == 1


def test_the_command_tests_the_model(make_folder, small_backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder(normal=8, abnormal=8)
    cli = AnomalibCLI(
        args=[
            *("test", "--model", "WinClipAny", "--model.backbone", small_backbone, "--model.pretrained", "random"),
            *("--model.k_shot", "2", "--data", "FewShot", "--data.source", "Folder", "--data.source.name", "disks"),
            *("--data.source.root", str(tmp_path / "data"), "--data.source.normal_dir", "normal"),
            *("--data.source.abnormal_dir", "abnormal", "--data.source.num_workers", "0", "--data.k_shot", "2"),
            *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
            *("--default_root_dir", str(tmp_path / "results")),
        ]
    )
    assert cli.engine.trainer.callback_metrics["image_AUROC"] >= 0
    assert cli.model.model.reference_images.shape == (2, 3, 56, 56)


@pytest.fixture
def seen(monkeypatch):
    """The backbones that are asked for; none is built."""
    found = []

    def stop(config):
        found.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(win_clip, "load_clip", stop)
    return found


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, ("ViT-B-16-plus-240", "laion400m_e31", (240, 240))),
        ({"pretrained": "laion400m_e32"}, ("ViT-B-16-plus-240", "laion400m_e32", (240, 240))),
        ({"backbone": "ViT-L-14-336"}, ("ViT-L-14-336", "openai", (240, 240))),
    ],
)
def test_the_default_is_winclips_own_backbone(arguments, expected, seen):
    with pytest.raises(KeyboardInterrupt):
        WinClipAny(**arguments)
    assert (seen[0].name, seen[0].weights, seen[0].image_size) == expected


@pytest.mark.parametrize(
    ("backbone", "tag", "expected"), [("ViT-L-14-336", "openai", True), ("ViT-B-16", "laion2b_s34b_b88k", False)]
)
def test_the_activation_is_that_of_the_weights(backbone, tag, expected, seen):
    for given, wanted in ((None, expected), (True, True), (False, False)):
        with pytest.raises(KeyboardInterrupt):
            WinClipAny(backbone, tag, quick_gelu=given)
        assert seen[-1].quick_gelu is wanted


def test_parts_of_the_model_can_be_replaced_or_left_out(small_backbone):
    model = WinClipAny(small_backbone, "random", pre_processor=False, post_processor=False, evaluator=False)
    assert (model.pre_processor, model.post_processor, model.evaluator) == (None, None, None)
    assert isinstance(model.visualizer, MVFAVisualizer)
    pre_processor, evaluator = PreProcessor(), Evaluator()
    model = WinClipAny(small_backbone, "random", pre_processor=pre_processor, evaluator=evaluator, visualizer=False)
    assert model.pre_processor is pre_processor
    assert model.evaluator is evaluator
    assert model.visualizer is None
    assert isinstance(WinClipAny(small_backbone, "random").evaluator, MVFAEvaluator)


def test_the_exported_pre_processing_resizes_and_normalises_as_the_other():
    pre_processor = WinClipAny.configure_pre_processor()
    images = torch.rand(1, 3, 300, 260, generator=torch.Generator().manual_seed(0))
    exported = pre_processor.export_transform(images)
    assert exported.shape == (1, 3, 240, 240)
    torch.testing.assert_close(exported, pre_processor.transform(images), rtol=0, atol=0.03)  # of 1 / 255 / 0.26
    plain = WinClipAny.configure_pre_processor((56, 28), normalization=None)
    assert plain.export_transform(images).shape == plain.transform(images).shape == (1, 3, 56, 28)
    assert 0 <= float(plain.export_transform(images).min()) <= float(plain.export_transform(images).max()) <= 1
