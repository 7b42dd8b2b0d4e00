# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Damaged and odd files of every kind, through prediction and training, and through the loaders of weights."""

import csv
import io
import os
import pickle
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.engine import Engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from anomalib_mvfa import MVFA
from anomalib_mvfa.data import MedicalFolder
from anomalib_mvfa.data.few_shot import read_support_list
from anomalib_mvfa.data.readers import (
    ImageRef,
    IntensityRule,
    UnreadableImageError,
    list_images,
    read_image,
    read_mask,
    read_volume,
)
from anomalib_mvfa.model.fusion import Fusion
from anomalib_mvfa.model.prompts import class_prompts, prompt_name
from anomalib_mvfa.weights.adapter_files import load_adapters

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")
SIDE = 24
EXAMPLES = 60


def raster(suffix: str, mode: str = "L", **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix), **options)
    return file.getvalue()


def nifti(data: np.ndarray, suffix: str = ".nii") -> bytes:
    content = nibabel.Nifti1Image(data, np.eye(4)).to_bytes()
    return zlib.compress(content, wbits=31) if suffix == ".nii.gz" else content


def dicom(**changes: object) -> bytes:
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = pydicom.uid.MRImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.3"
    dataset.Rows = dataset.Columns = SIDE
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PixelData = np.arange(SIDE * SIDE, dtype=np.uint16).tobytes()
    for name, value in changes.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    file = io.BytesIO()
    pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing of it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def sound() -> dict[str, bytes]:
    """One sound file of each format."""
    voxels = np.random.default_rng(1).uniform(1, 200, (SIDE, SIDE, 2)).astype(np.float32)
    rasters = {f"sound.{suffix}": raster(suffix) for suffix in ("png", "jpg", "bmp", "tif", "webp")}
    volumes = {f"sound{suffix}": nifti(voxels, suffix) for suffix in (".nii", ".nii.gz")}
    return {**rasters, **volumes, "sound.dcm": dicom()}


def corpus() -> dict[str, bytes]:
    """At least 200 files by name: each is damaged, or odd in a way that is allowed."""
    files: dict[str, bytes] = {}
    draw = random.Random(0)
    for name, content in sound().items():
        stem, _, suffix = name.partition(".")
        cuts = {0, 1, 4, 8, 16, 64, 128, 131, 132, 200, 348, len(content) // 4, len(content) // 2, len(content) - 1}
        for cut in sorted(cut for cut in cuts if cut < len(content)):
            files[f"cut_{cut:05}_{suffix.replace('.', '_')}.{suffix}"] = content[:cut]
        for number in range(6):
            damaged = bytearray(content)
            for _ in range(1 + 4 * number):
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
            files[f"flip_{number}_{suffix.replace('.', '_')}.{suffix}"] = bytes(damaged)
        others = (".png", ".dcm", ".nii", ".nii.gz", ".jpg")
        files |= {f"is_{stem}_{suffix.replace('.', '_')}{other}": content for other in others if other != f".{suffix}"}
        files[f"tail_{suffix.replace('.', '_')}.{suffix}"] = content + b"\0" * 1000
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"):
        files[f"mode_{mode.replace(';', '_')}.png"] = raster("png", mode)
    for mode in ("F", "I", "CMYK", "LAB", "YCbCr"):
        files[f"mode_{mode}.tif"] = raster("tif", mode)
    for width, height in ((1, 2**31 - 1), (2**31 - 1, 1), (100_000, 100_000), (20_000, 20_000), (0, 5), (5, 0)):
        files[f"huge_{width}x{height}.png"] = png_of(width, height)
    for kind in (np.nan, np.inf, -np.inf):
        files[f"all_{kind}.nii"] = nifti(np.full((4, 4, 4), kind, np.float32))
        partly = np.random.default_rng(2).uniform(1, 9, (4, 4, 4)).astype(np.float32)
        partly[1, 1] = kind
        files[f"some_{kind}.nii"] = nifti(partly)
    files["constant.nii"] = nifti(np.ones((4, 4, 4), np.float32))
    files["complex.nii"] = nifti(np.ones((4, 4, 4), np.complex64))
    files["four.nii"] = nifti(np.random.default_rng(3).uniform(1, 9, (4, 4, 2, 2)).astype(np.float32))
    shape = bytearray(nifti(np.ones((4, 4, 4), np.float32)))
    struct.pack_into("<8h", shape, 40, 3, 32767, 32767, 32767, 1, 1, 1, 1)
    files["huge.nii"], files["bomb.nii.gz"] = bytes(shape), zlib.compress(bytes(shape) + b"\0" * 20_000_000, wbits=31)
    for name, change in {
        "no_pixels": {"PixelData": None},
        "no_rows": {"Rows": None},
        "huge": {"Rows": 65535, "Columns": 65535},
        "zero": {"Rows": 0},
        "frames": {"NumberOfFrames": "7"},
        "negative": {"NumberOfFrames": "-1"},
        "window": {"WindowCenter": "10", "WindowWidth": "0"},
        "bits": {"BitsAllocated": 12},
        "colour": {"PhotometricInterpretation": "RGB"},
        "samples": {"SamplesPerPixel": 3},
        "none": {"PhotometricInterpretation": None},
        "padding": {"PixelPaddingValue": 0},
    }.items():
        files[f"dicom_{name}.dcm"] = dicom(**change)
    files |= {"\N{SNOWMAN} \u00e4\u03b1\u4e2d.png": raster("png"), "x" * 200 + ".png": raster("png")}
    files |= {
        "text.png": b"not an image",
        "zeros.dcm": b"\0" * 500,
        "newline\n.png": raster("png"),
        "#7.png": raster("png"),
    }
    return files


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The corpus and sound files, with links that lead in circles or nowhere, and what cannot be opened."""
    folder = tmp_path_factory.mktemp("malformed")
    files = corpus()
    assert len(files) >= 200
    for name, content in {**files, **sound()}.items():
        (folder / name).write_bytes(content)
    (folder / "circle").symlink_to(folder, target_is_directory=True)
    (folder / "itself.png").symlink_to(folder / "itself.png")
    (folder / "nowhere.png").symlink_to(folder / "nothing.png")
    (folder / "sub").mkdir()
    (folder / "sub" / "up").symlink_to(folder / "sub" / "up", target_is_directory=True)
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")  # would hang whoever opens it
    (folder / "locked.png").write_bytes(raster("png"))
    (folder / "locked.png").chmod(0)
    return folder


@pytest.fixture
def engine(tmp_path):
    return Engine(accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False)


def test_prediction_reports_every_damaged_file_and_predicts_the_others(folder, engine, small_backbone, tmp_path):
    torch.manual_seed(0)
    model = MVFA(small_backbone, "random", class_name="Brain", visualizer=False)
    engine.predict(model, datamodule=MedicalFolder(folder, num_workers=0), return_predictions=False)
    (table,) = tmp_path.rglob("predictions.csv")
    with table.open(newline="", encoding="utf-8") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    paths = {path.rpartition("#")[0] if "#" in path and not Path(path).exists() else path for path in rows}
    for row in rows.values():
        assert bool(row["score"]) is not bool(row["error"])
        assert not row["score"] or 0 <= float(row["score"]) <= 1
    for name in corpus():
        header_alone = name in {"dicom_no_rows.dcm"} or str(folder / name) not in paths
        assert not header_alone or name.endswith(".dcm"), name  # DICOM objects that are no images are left out
    for name in sound():
        assert any(row["score"] for path, row in rows.items() if path.startswith(str(folder / name))), name
    cut = [row for path, row in rows.items() if Path(path).name.startswith("cut_0000") and not path.endswith(".dcm")]
    assert cut
    assert all(row["error"] for row in cut)
    for name in ("huge_100000x100000.png", "huge.nii", "text.png", "all_nan.nii", "complex.nii", "dicom_no_pixels.dcm"):
        assert rows[str(folder / name)]["error"], name
    for name in ("mode_RGBA.png", "mode_I_16.png", "mode_CMYK.tif", "#7.png", "newline\n.png"):
        assert rows[str(folder / name)]["score"], name


def test_training_lists_what_cannot_be_used_in_one_error(folder, engine, small_backbone):
    data = MedicalFolder(folder.parent, normal_dir=folder.name, num_workers=0, seed=0)
    with pytest.raises(ValueError, match=r"files cannot be used\. Repair or remove what is listed") as caught:
        engine.fit(MVFA(small_backbone, "random", visualizer=False), datamodule=data)
    assert type(caught.value) is ValueError
    message = str(caught.value)
    for name in ("huge.nii", "text.png", "all_nan.nii", "dicom_no_pixels.dcm", "cut_00000_png.png"):
        assert f"{name}: " in message
    assert "mode_RGB.png" not in message


# Generated files, against values computed here from the definitions


@st.composite
def dicom_cases(draw):
    """Draw attributes and pixels of a grey DICOM image of one or more frames."""
    allocated = draw(st.sampled_from([8, 16, 32]))
    stored = draw(st.integers(2, allocated))
    signed = draw(st.booleans())
    low, high = (-(2 ** (stored - 1)), 2 ** (stored - 1) - 1) if signed else (0, 2**stored - 1)
    shape = (draw(st.integers(1, 3)), draw(st.integers(2, 7)), draw(st.integers(2, 7)))
    dtype = np.dtype(f"{'i' if signed else 'u'}{allocated // 8}")
    pixels = draw(arrays.arrays(dtype, shape, elements=st.integers(low, high)))
    syntaxes = ["ImplicitVRLittleEndian", "ExplicitVRLittleEndian", "DeflatedExplicitVRLittleEndian"]
    if allocated - 8 < stored <= 16:  # pydicom encodes too few segments otherwise
        syntaxes.append("RLELossless")
    return {
        "pixels": pixels,
        "stored": stored,
        "rescale": draw(st.sampled_from([None, (1, -1024), (2, 0), (0.5, 10)])),
        "window": draw(st.sampled_from([None, (40, 80), (30.5, 1), (-600, 1500), (2**15, 2**16)])),
        "function": draw(st.sampled_from([None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])),
        "inverted": draw(st.booleans()),
        "padding": draw(st.sampled_from([None, int(pixels.flat[0])])) if allocated == 16 else None,
        "syntax": draw(st.sampled_from(syntaxes)),
    }


def write_case(path: Path, case: dict) -> None:
    pixels = case["pixels"]
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    compress = case["syntax"] == "RLELossless"
    syntax = "ExplicitVRLittleEndian" if compress else case["syntax"]
    dataset.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    dataset.SOPClassUID, dataset.SOPInstanceUID = pydicom.uid.CTImageStorage, "1.2.3"
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated, dataset.BitsStored = 8 * pixels.itemsize, case["stored"]
    dataset.HighBit = case["stored"] - 1
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, int(pixels.dtype.kind == "i")
    dataset.PhotometricInterpretation = "MONOCHROME1" if case["inverted"] else "MONOCHROME2"
    if case["rescale"]:
        dataset.RescaleSlope, dataset.RescaleIntercept = case["rescale"]
    if case["window"]:
        dataset.WindowCenter, dataset.WindowWidth = case["window"]
    if case["function"]:
        dataset.VOILUTFunction = case["function"]
    if case["padding"] is not None:  # as US whatever the sign of the pixels, as some scanners do
        dataset.add_new("PixelPaddingValue", "US", case["padding"] % 2**16)
    data = pixels.tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OB" if pixels.itemsize == 1 else "OW"
    if compress:
        dataset.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)


def expected_image(case: dict, frame: int) -> np.ndarray:
    slope, intercept = case["rescale"] or (1, 0)
    values = case["pixels"].astype(np.float64) * slope + intercept
    shown = np.ones(values.shape, bool) if case["padding"] is None else case["pixels"] != case["padding"]
    if case["window"]:
        centre, width = case["window"]
        if case["function"] == "SIGMOID":
            grey = 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -100, 100)))
        else:
            if case["function"] != "LINEAR_EXACT" and width > 1:
                centre, width = centre - 0.5, width - 1
            grey = ((values - centre) / width + 0.5).clip(0, 1)
    elif case["pixels"].dtype == np.uint8 and case["rescale"] is None:
        grey = values / (2 ** case["stored"] - 1)
    else:
        kept = values[shown] if shown.any() else values
        low, high = np.percentile(kept, (0.5, 99.5))
        low, high = (low, high) if low < high else (kept.min(), kept.max())
        grey = ((values - low) / (high - low)).clip(0, 1) if low < high else np.zeros(values.shape)
    return np.where(shown, 1 - grey if case["inverted"] else grey, 0)[frame]


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=dicom_cases())
def test_generated_dicom_images_have_the_pixels_of_the_standard(tmp_path, case):
    path = tmp_path / "a.dcm"
    path.unlink(missing_ok=True)
    write_case(path, case)
    refs = list_images(path)
    assert len(refs) == len(case["pixels"])
    for frame, ref in enumerate(refs):
        image = read_image(ref)
        np.testing.assert_allclose(image[0], expected_image(case, frame), atol=2e-5)
        assert torch.equal(image[0], image[2])


@st.composite
def volume_cases(draw):
    dtype = draw(st.sampled_from(["u1", "i1", "u2", "i2", "i4", "u4", "f4", "f8", "<i2", ">i2", ">f4"]))
    shape = tuple(draw(st.integers(1, 5)) for _ in range(draw(st.sampled_from([2, 3, 3, 4]))))
    data = draw(arrays.arrays(np.dtype(dtype), shape, elements=st.integers(-100 if dtype[-2] in "if" else 0, 100)))
    flips = draw(st.permutations(range(3)))
    signs = draw(st.tuples(*[st.sampled_from([-1, 1])] * 3))
    return (
        data,
        flips,
        signs,
        draw(st.sampled_from([(1, 0), (2.5, -7)])),
        draw(st.sampled_from(["nii", "nii.gz", "hdr"])),
    )


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=volume_cases())
def test_generated_volumes_have_the_voxels_that_nibabel_reads(tmp_path, case):
    data, axes, signs, (slope, intercept), suffix = case
    affine = np.eye(4)
    affine[:3, :3] = (np.diag(signs) * [1.5, 2, 3])[:, list(axes)]
    image = nibabel.Nifti1Pair(data, affine) if suffix == "hdr" else nibabel.Nifti1Image(data, affine)
    if slope != 1:
        image.header.set_slope_inter(slope, intercept)
    path = tmp_path / f"a.{suffix}"
    nibabel.save(image, path)
    count = int(np.prod(data.shape[3:]))
    if count > 1:
        with pytest.raises(UnreadableImageError, match=f"holds {count} volumes"):
            read_volume(path)
    read = nibabel.load(path).get_fdata().reshape(*data.shape[:3], *(1,) * (3 - data.ndim), -1)
    for number in range(count):
        whole = nibabel.as_closest_canonical(nibabel.Nifti1Image(read[..., number], affine))
        voxels, to_mm = read_volume(path, volume=number)
        np.testing.assert_allclose(voxels, whole.get_fdata(), rtol=1e-6)
        np.testing.assert_allclose(to_mm, whole.affine, atol=1e-5)
        centre = ImageRef(path, voxels.shape[1] // 2, axis=1, volume=number)
        shown = read_image(centre, [0, 200])[0]
        np.testing.assert_allclose(
            shown, ((voxels[:, centre.frame, :].T[::-1, ::-1] + 100) / 200).clip(0, 1), atol=1e-5
        )


def shipped_files() -> list[Path]:
    """The files that pydicom and nibabel test themselves with."""
    folders = [Path(pydicom.__file__).parent / "data" / "test_files", Path(nibabel.__file__).parent / "tests" / "data"]
    return [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".py"]


def test_the_libraries_own_test_files_are_images_or_named_errors():
    read = refused = 0
    for path in shipped_files():
        try:
            refs = list_images(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
            continue
        for ref in refs[:3]:
            try:
                image = read_image(ref)
            except UnreadableImageError as error:
                assert error.path == path  # noqa: PT017
                refused += 1
            else:
                assert 0 <= float(image.min()) <= float(image.max()) <= 1
                read += 1
    assert read > 90
    assert refused > 10


# Properties


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=600), name=st.sampled_from(["a.png", "a.dcm", "a.nii", "a.nii.gz", "a.tif", "a"]))
def test_any_bytes_are_an_image_or_an_error_of_ours(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content)
    for read in (read_image, read_mask):
        try:
            image = read(ImageRef(path))
        except UnreadableImageError as error:
            assert error.path == path  # noqa: PT017 - reading it is no error either
        else:
            assert bool(image.isfinite().all())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pixels=arrays.arrays(np.uint16, arrays.array_shapes(min_dims=2, max_dims=2, max_side=9)),
    rule=st.sampled_from(["auto", "percentile", "brain", [100.0, 7.0]]),
)
def test_sixteen_bit_images_stay_in_range_and_in_order(tmp_path, pixels, rule):
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    image = read_image(path, rule)
    assert image.shape == (3, *pixels.shape)
    assert 0 <= float(image.min()) <= float(image.max()) <= 1
    order = np.argsort(pixels.ravel(), kind="stable")
    assert bool((image[0].flatten()[order.copy()].diff() >= 0).all())


@given(centre=st.floats(-1e4, 1e4), width=st.floats(1e-3, 1e4))
def test_rules_survive_being_written_down(centre, width):
    rule = IntensityRule("window", (centre, width))
    assert IntensityRule.parse(str(rule)) == rule


@given(name=st.text(max_size=40))
def test_prompts_hold_the_class_name_as_it_is(name):
    normal, abnormal = class_prompts(name)
    assert (len(normal), len(abnormal)) == (245, 175)
    assert all(name in sentence for sentence in (*normal, *abnormal))
    assert isinstance(prompt_name(name), str)


NAMES = st.lists(st.text(st.characters(exclude_categories=("Z", "C")), min_size=1, max_size=9), unique=True, max_size=6)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(normal=NAMES, abnormal=NAMES, draw=st.integers(0, 99))
def test_support_lists_are_read_as_they_were_written(tmp_path, normal, abnormal, draw):
    path = tmp_path / "list.txt"
    path.unlink(missing_ok=True)
    normal, abnormal = (
        [f"{Path(name).name or 'x'}{i}.png" for i, name in enumerate(part)] for part in (normal, abnormal)
    )
    lines = [f"n-{draw}: {' '.join(normal)}", f"a-{draw}: {' '.join(abnormal)}"]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert read_support_list(path, draw) == (normal, abnormal)


@given(
    language=arrays.arrays(np.float32, 6, elements=st.floats(-100, 100, width=32)),
    memory=arrays.arrays(np.float32, 6, elements=st.floats(-100, 100, width=32)),
    weight=st.floats(0, 1),
)
def test_fusion_is_finite_between_its_branches_and_never_turns_an_order_round(language, memory, weight):
    language, memory = torch.from_numpy(np.sort(language)), torch.from_numpy(np.sort(memory))
    fusion = Fusion(weight)
    fusion.fit(language_map=language, memory_map=memory)
    fused = fusion(language, memory, kind="map")
    assert bool(fused.isfinite().all())
    assert float(fused.min()) >= -1e-5
    assert float(fused.max()) <= 1 + 1e-5
    assert bool((fused.diff() >= -1e-5).all())


# Loaders of weights


class Execute:
    """Runs code when it is unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def weights(tmp_path_factory, small_backbone) -> dict[str, bytes]:
    """Adapters in both formats and a checkpoint, as they are written."""
    out = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    model = MVFA(small_backbone, "random", class_name="Brain", visualizer=False)
    engine = Engine(accelerator="cpu", default_root_dir=out, logger=False, enable_progress_bar=False)
    model.configure_model()
    for suffix in (".safetensors", ".pth"):
        model.save_adapters(out / f"a{suffix}")
    del engine
    contents: dict[str, object] = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    contents |= {"pytorch-lightning_version": "2.6.0", "epoch": 0, "global_step": 1}
    model.on_save_checkpoint(contents)
    torch.save(contents, out / "a.ckpt")
    return {path.name: path.read_bytes() for path in sorted(out.glob("a.*"))}


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.ckpt"])
def test_damaged_weights_are_refused_or_fit(weights, small_backbone, tmp_path, name):
    target = MVFA(small_backbone, "random", class_name="Brain")
    target.configure_model()
    draw, content, refused = random.Random(name), weights[name], 0
    cuts = [0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1]
    for number in range(len(cuts) + 32):
        damaged = bytearray(content[: cuts[number]] if number < len(cuts) else content)
        for _ in range(0 if number < len(cuts) else 1 + number % 5):
            end = 3000 if number % 2 else len(damaged)
            damaged[draw.randrange(min(end, len(damaged)))] = draw.randrange(256)
        path = tmp_path / name
        path.write_bytes(bytes(damaged))
        try:
            if name == "a.ckpt":
                MVFA.load_from_checkpoint(path)
            else:
                load_adapters(path, target.model.seg_adapters, target.model.det_adapters)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) or "checkpoint" in str(error), error  # noqa: PT017
    assert refused >= len(cuts)


@pytest.mark.parametrize("key", [b"calibration", b"coreset", b"image_threshold"])
def test_checkpoint_with_a_changed_name_is_refused_whatever_the_name(weights, tmp_path, key):
    content = weights["a.ckpt"]
    assert key in content
    (tmp_path / "a.ckpt").write_bytes(content.replace(key, key[:-1] + b"x"))
    with pytest.raises(ValueError, match=r"a\.ckpt could not be read as a checkpoint \(BadZipFile\)"):
        MVFA.load_from_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.ckpt"])
def test_no_loader_executes_what_a_file_holds(tmp_path, small_backbone, name):
    path, trace = tmp_path / name, tmp_path / "executed"
    target = MVFA(small_backbone, "random", class_name="Brain")
    target.configure_model()
    evil = {"seg_adapters": Execute(trace), "det_adapters": {}, "state_dict": Execute(trace), "hyper_parameters": {}}
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(raster("png"))

    def load():
        if name == "a.ckpt":
            return MVFA.load_from_checkpoint(path)
        return load_adapters(path, target.model.seg_adapters, target.model.det_adapters)

    for write in (lambda: torch.save(evil, path), lambda: path.write_bytes(pickle.dumps(evil))):
        write()
        with pytest.raises(ValueError, match=r"could not be read as (adapters|a checkpoint)"):
            load()
        with pytest.raises(ValueError, match="could not be read as a checkpoint"):
            Engine(accelerator="cpu", default_root_dir=tmp_path, logger=False).predict(
                MVFA(small_backbone, "random"), data_path=tmp_path / "images", ckpt_path=path
            )
    assert not trace.exists()
