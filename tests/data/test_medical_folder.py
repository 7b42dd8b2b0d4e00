# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""MedicalFolder: what is predicted and written, how images are split, and what is refused before training."""

import csv
import logging
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data.utils import LabelName
from anomalib.engine import Engine
from PIL import Image
from torch.nn import functional

from anomalib_mvfa import MVFA
from anomalib_mvfa.data import FewShot, MedicalFolder
from anomalib_mvfa.data.readers import read_image, read_volume, volume_slice

pydicom = pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")

IDENTIFYING = {
    "PatientName": "Zuckerkandl^Emil",
    "PatientID": "PID-987654",
    "PatientBirthDate": "19010203",
    "AccessionNumber": "ACC-55555",
    "InstitutionName": "Nowhere General",
    "ReferringPhysicianName": "Semmelweis^Ignaz",
    "StudyDescription": "Secret study",
    "SeriesDescription": "Secret series",
    "StudyID": "STUDY-31337",
    "PatientAddress": "Berggasse 19",
    "PatientComments": "Comment XYZ",
    "StationName": "STATION-77",
}
OBLIQUE = np.array([[1.2, 0.1, 0, -60], [0.1, 1.2, 0, -50], [0, 0, 4, 10], [0, 0, 0, 1]])


def body(seed: int, lesion: bool = False, size: tuple[int, int] = (48, 40)) -> np.ndarray:
    """Grey levels ``(H, W)`` in [0, 1] of a disk on black, brighter on its left, with a bright square if abnormal."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    image = 0.5 - 0.2 * x / width + np.random.default_rng(seed).normal(0, 0.02, size)
    if lesion:
        image[height // 4 : height // 2, width // 2 : width // 2 + 8] = 0.95
    disk = ((x - width / 2) / width) ** 2 + ((y - height / 2) / height) ** 2 < 0.2
    return np.where(disk, image, 0).clip(0, 1)


def write_dicom(path: Path, image: np.ndarray | None, patient: str = "PID-987654", place: float = 0, **more) -> Path:
    """Write grey levels as Hounsfield units from -160 to 240, the window ``soft_tissue``."""
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    values = {
        **IDENTIFYING,
        "PatientID": patient,
        "SeriesInstanceUID": f"1.2.3.{zlib.crc32(str(path.parent).encode())}",
    }
    values |= {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "ImagePositionPatient": [0, 0, place]}
    values |= {"SOPClassUID": meta.MediaStorageSOPClassUID, "SOPInstanceUID": meta.MediaStorageSOPInstanceUID}
    values |= {"Rows": 2, "Columns": 2}
    if image is not None:
        values |= {"Rows": image.shape[0], "Columns": image.shape[1], "SamplesPerPixel": 1}
        values |= {"PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15}
        values |= {"PixelRepresentation": 0, "RescaleSlope": 1, "RescaleIntercept": -1024}
        values |= {"PixelData": (image * 400 - 160 + 1024).round().astype(np.uint16).tobytes()}
    for name, value in (values | more).items():
        setattr(dataset, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def write_volume_file(path: Path, slices: list[np.ndarray], codes: str = "PLS") -> Path:
    """Write displayed slices as a volume that is stored in an orientation of its own."""
    canonical = np.zeros((*slices[0].T.shape, len(slices)), np.float32)
    for index, image in enumerate(slices):
        volume_slice(canonical, index)[...] = image
    volume = nibabel.Nifti1Image(canonical, OBLIQUE)
    stored = nibabel.orientations.axcodes2ornt(codes)
    volume = volume.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(OBLIQUE), stored))
    volume.header["descrip"] = IDENTIFYING["PatientName"].encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(volume, path)
    return path


def write_picture(path: Path, image: np.ndarray, scale: float = 255, dtype: type = np.uint8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image * scale).round().astype(dtype)).save(path)
    return path


def write_scans(root: Path) -> Path:
    """Nested folders of every format."""
    write_picture(root / "grey.png", body(0))
    write_picture(root / "a/deep/sixteen.png", body(1), 40000, np.uint16)
    write_picture(root / "a/photo.JPG", body(2, size=(60, 80)))
    write_picture(root / "b/photo.tiff", body(3))
    write_picture(root / "b/photo.bmp", body(4))
    for index, name in enumerate(("z", "x", "y")):  # inferior to superior
        write_dicom(root / "series" / f"{name}.dcm", body(5, lesion=index == 1), place=5.0 * index)
    write_volume_file(root / "b/volume.nii.gz", [body(6, lesion=index == 2) for index in range(4)])
    return root


@pytest.fixture
def scans(tmp_path) -> Path:
    return write_scans(tmp_path / "scans")


def predictions(datamodule, root: Path, model=None, **arguments):
    """Predict, with untrained adapters by default; give predictions and folder of results."""
    engine = Engine(accelerator="cpu", default_root_dir=root, enable_progress_bar=False, logger=False)
    model = model or MVFA("tiny", class_name="Liver")
    batches = engine.predict(model, datamodule=datamodule, **arguments)
    return [item for batch in batches for item in batch], Path(engine.trainer.default_root_dir) / "images"


@pytest.fixture
def predict(tmp_path):
    def make(datamodule, model=None, **arguments):
        return predictions(datamodule, tmp_path / "results", model, **arguments)

    return make


@pytest.fixture(scope="module")
def predicted(tmp_path_factory):
    """Predictions of every format, the folder of results, and the folder of the images."""
    root = tmp_path_factory.mktemp("predicted")
    scans = write_scans(root / "scans")
    return *predictions(MedicalFolder(scans, eval_batch_size=3, num_workers=2), root / "results"), scans


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def write_patients(root: Path) -> Path:
    """Ten patients with three normal slices each, eight with an abnormal and a normal one; masks."""
    for number in range(10):
        for index in range(3):
            write_dicom(root / f"normal/n{number}/{index}.dcm", body(10 * number + index), f"N{number}", index)
    for number in range(8):
        write_dicom(root / f"normal/a{number}/0.dcm", body(200 + number), f"A{number}")
        write_dicom(root / f"abnormal/a{number}/1.dcm", body(number, lesion=True), f"A{number}")
        write_picture(root / f"masks/a{number}/1.png", body(number, lesion=True) > 0.9)
    return root


@pytest.fixture
def patients(tmp_path) -> Path:
    return write_patients(tmp_path / "patients")


FOLDERS = {"normal_dir": "normal", "abnormal_dir": "abnormal", "mask_dir": "masks", "num_workers": 0}


def parts(datamodule) -> dict[str, set[str]]:
    """Patients of each part, as their folders are named."""
    datamodule.setup()
    names = ("train", "val", "test")
    tables = {name: getattr(datamodule, f"{name}_data").samples for name in names}
    return {name: {Path(path).parent.name for path in table["image_path"]} for name, table in tables.items()}


# Prediction


def test_nested_folders_of_every_format_are_predicted_in_batches(predicted):
    items, folder, scans = predicted
    names = ["a/deep/sixteen.png", "a/photo.JPG", "b/photo.bmp", "b/photo.tiff"]
    names += [f"b/volume.nii.gz#{index}" for index in range(4)]
    names += ["grey.png", "series/z.dcm", "series/x.dcm", "series/y.dcm"]
    assert [item.image_path for item in items] == [str(scans / name) for name in names]
    table = rows(folder)
    assert list(table) == [str(scans / name) for name in names]
    assert not any(row["error"] for row in table.values())
    for item in items:
        assert item.image.shape == (3, 112, 112)
        assert float(table[item.image_path]["score"]) == pytest.approx(float(item.pred_score), rel=1e-5)


def test_heatmaps_are_named_by_the_input_and_show_it_at_its_size(predicted):
    _, folder, scans = predicted
    shown = {
        "a/deep/sixteen.png": read_image(scans / "a/deep/sixteen.png"),
        "a/photo.png": read_image(scans / "a/photo.JPG"),
        "series/x.png": read_image(scans / "series/x.dcm"),
        "b/volume_slice002.png": None,
    }
    limits = np.percentile(read_volume(scans / "b/volume.nii.gz")[0], (0.5, 99.5))
    volume_image = ((body(6, lesion=True) - limits[0]) / np.ptp(limits)).clip(0, 1)
    shown["b/volume_slice002.png"] = torch.from_numpy(volume_image).expand(3, -1, -1)
    for name, image in shown.items():
        with Image.open(folder / name) as picture:
            pixels = np.asarray(picture.convert("RGB"), np.float32) / 255
        height, width = image.shape[-2:]
        assert pixels.shape == (height, 3 * width, 3)  # image, map, mask
        below = height // 2  # the caption stands above
        np.testing.assert_allclose(pixels[below:, :width], image.permute(1, 2, 0)[below:], atol=0.01)
    # two pictures of one name
    assert (folder / "b/photo.png").is_file()
    assert (folder / "b/photo_2.png").is_file()


def test_one_file_is_predicted_without_workers(scans, predict):
    items, folder = predict(MedicalFolder(scans / "series/x.dcm"))
    assert [item.image_path for item in items] == [str(scans / "series/x.dcm")]
    assert (folder / "x.png").is_file()


def test_anomaly_volume_lies_in_the_grid_of_its_input_slice_by_slice(predicted):
    items, folder, scans = predicted
    source = nibabel.load(scans / "b/volume.nii.gz")
    written = nibabel.load(folder / "b/volume_anomaly.nii.gz")
    np.testing.assert_array_equal(written.affine, source.affine)
    assert written.shape == source.shape
    assert nibabel.aff2axcodes(written.affine) == ("P", "L", "S")
    assert not bytes(written.header["descrip"]).strip(b"\0")
    canonical = read_volume(folder / "b/volume_anomaly.nii.gz")[0]
    maps = [item.anomaly_map for item in items if "#" in item.image_path]
    for index, anomaly_map in enumerate(maps):
        resized = functional.interpolate(anomaly_map[None, None].float(), (48, 40), mode="bilinear")[0, 0]
        np.testing.assert_allclose(volume_slice(canonical, index), resized, atol=1e-6)
    assert np.ptp(canonical) > 0


def test_volumes_of_one_stem_do_not_overwrite_each_other(tmp_path, predict):
    slices = [body(index) for index in range(2)]
    write_volume_file(tmp_path / "scans/v.nii", slices)
    write_volume_file(tmp_path / "scans/v.nii.gz", slices)
    _, folder = predict(MedicalFolder(tmp_path / "scans", num_workers=0))
    assert {path.name for path in folder.glob("*.nii.gz")} == {"v_anomaly.nii.gz", "v_anomaly_2.nii.gz"}


@pytest.fixture
def damaged(scans) -> dict[str, str]:
    """Put damaged files among the scans, and tell what is wrong with each."""
    bad = scans / "bad"
    bad.mkdir()
    (bad / "zero.png").write_bytes(b"")
    (bad / "text.png").write_text("words")
    (bad / "cut.jpg").write_bytes((scans / "a/photo.JPG").read_bytes()[:700])
    whole = write_dicom(bad / "cut.dcm", body(0))
    whole.write_bytes(whole.read_bytes()[:-500])
    write_dicom(bad / "nopixels.dcm", None)
    nibabel.save(nibabel.Nifti1Image(np.full((8, 8, 3), np.nan, np.float32), np.eye(4)), bad / "nan.nii.gz")
    (bad / "cut.nii.gz").write_bytes((scans / "b/volume.nii.gz").read_bytes()[:2000])
    nibabel.save(nibabel.Nifti1Image(np.ones((8, 8, 3), np.float32), np.eye(4)), bad / "flat.nii.gz")
    return {
        "zero.png": "the file is empty",
        "text.png": "not an image",
        "cut.jpg": "truncated",
        "cut.dcm": "truncated or damaged pixel data",
        "nopixels.dcm": "holds no pixel data",
        "nan.nii.gz": "no finite value",
        "cut.nii.gz": "truncated",
        "flat.nii.gz": "all its slices are empty",
    }


def test_unreadable_files_are_reported_and_the_others_predicted(scans, damaged, predict, caplog):
    with caplog.at_level(logging.ERROR):
        items, folder = predict(MedicalFolder(scans, eval_batch_size=5, num_workers=2))
    assert "8 of 20 images could not be read" in caplog.text
    table = rows(folder)
    for item in items:
        name = Path(item.image_path).name
        row = table[item.image_path]
        assert damaged.get(name, "") in row["error"]
        assert bool(row["error"]) == (name in damaged) == (row["score"] == "")
        assert torch.isnan(item.pred_score) == (name in damaged)
        assert torch.isnan(item.anomaly_map).all() == (name in damaged)
        if name in damaged:
            assert item.pred_label is None
            assert item.pred_mask is None
    assert not (folder / "bad").exists()
    with_score = [row for row in table.values() if row["score"]]
    assert len(with_score) == 12


def test_unreadable_file_does_not_change_the_scores_of_its_batch(scans, damaged, predict):
    model = MVFA("tiny", class_name="Liver", visualizer=False)
    items, _ = predict(MedicalFolder(scans, num_workers=0), model)
    alone, _ = predict(MedicalFolder(scans / "series", num_workers=0), model)
    scores = {item.image_path: float(item.pred_score) for item in items}
    for item in alone:
        assert scores[item.image_path] == pytest.approx(float(item.pred_score), abs=1e-5)


def test_nothing_that_identifies_a_patient_is_written_or_logged(
    scans, damaged, patients, predict, tmp_path, caplog, capfd
):
    with caplog.at_level(logging.DEBUG):
        predict(MedicalFolder(scans, num_workers=0))
        fitted(FewShot(MedicalFolder(patients, group_by="patient", **FOLDERS), k_shot=1), tmp_path)
        with pytest.raises(ValueError, match="8 files cannot be used"):
            fitted(MedicalFolder(tmp_path, "scans", num_workers=0), tmp_path)
    said = caplog.text + "".join(capfd.readouterr())
    files = [path for path in (tmp_path / "results").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".csv", ".png", ".ckpt", ".gz"}
    for path in files:
        contents = path.read_bytes()
        if path.suffix == ".gz":
            contents = zlib.decompress(contents, 31)
        said += str(path) + contents.decode("latin-1")
    for value in (*IDENTIFYING.values(), "Zuckerkandl", "Semmelweis"):
        assert value not in said


def test_missing_readers_are_named_with_the_extra(scans, monkeypatch):
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(ImportError, match=r'needs nibabel: pip install "anomalib-mvfa\[medical\]"'):
        MedicalFolder(scans / "b").setup("predict")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImportError, match=r'needs pydicom: pip install "anomalib-mvfa\[medical\]"'):
        MedicalFolder(scans / "series").setup("predict")


# Intensity rules


def fitted(datamodule, tmp_path, **arguments) -> tuple[MVFA, Path]:
    """Train for a step and give model and checkpoint."""
    model = MVFA("tiny", class_name="Liver", **arguments)
    engine = Engine(
        accelerator="cpu",
        default_root_dir=tmp_path / "results",
        enable_progress_bar=False,
        logger=False,
        max_epochs=1,
        limit_train_batches=1,
    )
    engine.fit(model, datamodule=datamodule)
    return model, Path(engine.trainer.checkpoint_callback.best_model_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[MVFA, Path]:
    """A model trained by the rule ``soft_tissue``, and its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    source = MedicalFolder(write_patients(folder / "patients"), group_by="patient", intensity=[40, 400], **FOLDERS)
    return fitted(FewShot(source, k_shot=1), folder)


def test_prediction_takes_rule_and_image_size_of_the_checkpoint(trained, patients, predict):
    _, checkpoint = trained
    folder = patients / "abnormal/a0"
    # As the command line does: a model of the default backbone and size, to which the checkpoint says what it is.
    items, _ = predict(MedicalFolder(folder, num_workers=0), MVFA(), ckpt_path=checkpoint)
    expected, _ = predict(MedicalFolder(folder, intensity=[40, 400]), MVFA.load_from_checkpoint(checkpoint))
    assert items[0].image.shape == (3, 112, 112)
    torch.testing.assert_close(items[0].image, expected[0].image, rtol=0, atol=0)
    torch.testing.assert_close(items[0].pred_score, expected[0].pred_score)
    resized = MVFA("tiny").pre_processor.transform(read_image(folder / "1.dcm", [40, 400]))
    torch.testing.assert_close(items[0].image, resized, rtol=0, atol=0)


def test_prediction_by_another_rule_is_refused_with_both_named(trained, patients, predict):
    _, checkpoint = trained
    datamodule = MedicalFolder(patients / "abnormal", intensity="brain", num_workers=0)
    message = r"rule 'soft_tissue'.* with 'brain'.* Set the datamodule's intensity to 'soft_tissue'"
    with pytest.raises(ValueError, match=message):
        predict(datamodule, MVFA.load_from_checkpoint(checkpoint))


def test_test_by_another_rule_is_refused(trained, patients, tmp_path):
    _, checkpoint = trained
    engine = Engine(accelerator="cpu", default_root_dir=tmp_path / "results", logger=False, enable_progress_bar=False)
    datamodule = FewShot(MedicalFolder(patients, group_by="patient", **FOLDERS), k_shot=1)
    with pytest.raises(ValueError, match="with 'auto'"):
        engine.test(MVFA.load_from_checkpoint(checkpoint), datamodule=datamodule)


def test_saved_adapters_know_the_rule_and_predict_a_folder(trained, patients, predict, tmp_path):
    model, _ = trained
    model.save_adapters(tmp_path / "adapters.safetensors")
    again = MVFA("tiny", adapters=tmp_path / "adapters.safetensors")
    items, _ = predict(MedicalFolder(patients / "abnormal/a0", num_workers=0), again)
    assert again.intensity == model.intensity == "soft_tissue"
    resized = model.pre_processor.transform(read_image(patients / "abnormal/a0/1.dcm", "soft_tissue"))
    torch.testing.assert_close(items[0].image, resized, rtol=0, atol=0)


# Training


@pytest.mark.parametrize("group_by", ["patient", "folder"])
@pytest.mark.parametrize("seed", range(4))
def test_no_patient_is_in_two_parts(patients, group_by, seed):
    split = parts(MedicalFolder(patients, group_by=group_by, seed=seed, **FOLDERS))
    assert not split["train"] & split["val"]
    assert not split["train"] & split["test"]
    assert not split["val"] & split["test"]
    assert {name[0] for name in split["train"]} == {"n"}  # of patients with a lesion no image is trained on
    assert {len(split[name]) for name in ("val", "test")} == {2 + 4}
    assert len(split["train"]) == 6


def test_split_depends_on_the_seed_alone(patients):
    def make(seed: int) -> dict[str, set[str]]:
        return parts(MedicalFolder(patients, group_by="patient", seed=seed, **FOLDERS))

    assert make(1) == make(1)
    assert make(1) != make(2)


def test_abnormal_patients_are_trained_on_when_asked(patients):
    datamodule = MedicalFolder(patients, group_by="patient", train_abnormal=True, **FOLDERS)
    split = parts(datamodule)
    assert {name[0] for name in split["train"]} == {"n", "a"}
    assert datamodule.train_data.has_anomalous
    item = next(item for item in datamodule.train_data if item.gt_label == 1)
    assert item.gt_mask.shape == item.image.shape[-2:]
    assert int(item.gt_mask.sum()) == 12 * 8


def test_other_images_of_a_supports_patient_are_not_evaluated(patients):
    source = MedicalFolder(patients, group_by="patient", **FOLDERS)
    datamodule = FewShot(source, k_shot=2)
    datamodule.setup()
    supports = {Path(path).parent.name for path in datamodule.train_data.samples["image_path"]}
    for part in (datamodule.val_data, datamodule.test_data):
        assert not supports & {Path(path).parent.name for path in part.samples["image_path"]}
    assert len(source.val_data) - len(datamodule.val_data) == 2 * 2  # the normal slice of either patient, too
    image = datamodule.train_data.support(0).image
    first = datamodule.train_data.samples["image_path"][0]
    torch.testing.assert_close(image, read_image(first), rtol=0, atol=0)


def test_patients_are_kept_as_numbers(patients):
    datamodule = MedicalFolder(patients, group_by="patient", **FOLDERS)
    datamodule.setup()
    samples = datamodule.train_data.samples
    assert samples["group"].dtype.kind == "i"
    assert "A0" not in samples.drop(columns="image_path").to_csv()


def test_patient_grouping_needs_an_identifier(patients):
    write_dicom(patients / "normal/n0/9.dcm", body(0), "")
    with pytest.raises(ValueError, match=rf"there is none in {patients}/normal/n0/9\.dcm\. Group by 'folder'"):
        MedicalFolder(patients, group_by="patient", **FOLDERS).setup()


def test_folder_grouping_needs_folders(patients):
    write_picture(patients / "normal/loose.png", body(0))
    with pytest.raises(ValueError, match=r"1 images lie in it directly: .*loose\.png"):
        MedicalFolder(patients, group_by="folder", **FOLDERS).setup()


def test_ungrouped_dicom_files_bring_a_warning(patients, caplog):
    MedicalFolder(patients, **FOLDERS).setup()
    assert "group_by='patient' keeps them together" in caplog.text


def test_mask_volume_tells_which_slices_of_a_volume_are_abnormal(tmp_path):
    for index in range(5):
        write_volume_file(tmp_path / f"normal/v{index}.nii.gz", [body(index)] * 3)
    lesions = [True, False, True]
    images = [body(7, lesion) for lesion in lesions]
    write_volume_file(tmp_path / "abnormal/sick.nii.gz", images)
    write_volume_file(tmp_path / "masks/sick.nii.gz", [(image > 0.9).astype(np.float32) for image in images], "LPS")
    datamodule = MedicalFolder(tmp_path, train_abnormal=True, val_split_ratio=0, test_split_ratio=0, **FOLDERS)
    datamodule.setup("fit")
    sick = [item for item in datamodule.train_data if "sick" in item.image_path]
    assert [int(item.gt_label) for item in sick] == [1, 0, 1]
    for item, image in zip(sick, images, strict=True):
        np.testing.assert_array_equal(item.gt_mask, image > 0.9)
    assert not datamodule.val_dataloader()


def test_mask_volume_of_another_grid_is_refused(tmp_path):
    for index in range(2):
        write_volume_file(tmp_path / f"normal/{index}.nii.gz", [body(index)] * 3)
    write_volume_file(tmp_path / "abnormal/sick.nii.gz", [body(7)] * 3)
    write_volume_file(tmp_path / "masks/sick.nii.gz", [body(1)] * 4)
    with pytest.raises(ValueError, match=r"sick\.nii\.gz: its mask .* is no volume of the same voxel grid"):
        MedicalFolder(tmp_path, val_split_ratio=0, **FOLDERS).setup("fit")


def test_slices_of_one_volume_stay_together_without_groups(tmp_path):
    for index in range(6):
        write_volume_file(tmp_path / f"normal/v{index}.nii.gz", [body(index)] * 3)
    datamodule = MedicalFolder(tmp_path, "normal")
    datamodule.setup()
    volumes = [set(part.samples["image_path"]) for part in (datamodule.train_data, datamodule.val_data)]
    assert not volumes[0] & volumes[1]
    assert len(datamodule.train_data) == 3 * len(volumes[0])


def series_with_masks(root: Path, suffix: str) -> dict[str, list[bool]]:
    """Write normal series and two abnormal ones, whose masks are empty beside the lesion; return where lesions are."""
    lesions = {"s0": [False, True, False], "s1": [True, False, False]}
    for number in range(4):
        for index in range(3):
            write_slice(root / f"normal/n{number}/{index}{suffix}", body(10 * number + index))
    for name, slices in lesions.items():
        for index, lesion in enumerate(slices):
            image = body(100 * (1 + int(name[1])) + index, lesion)
            write_slice(root / f"abnormal/{name}/{index}{suffix}", image)
            write_picture(root / f"masks/{name}/{index}.png", image > 0.9)
    return lesions


def write_slice(path: Path, image: np.ndarray) -> None:
    if path.suffix == ".dcm":
        write_dicom(path, image, path.parent.name)
    else:
        write_picture(path, image)


@pytest.mark.parametrize("suffix", [".png", ".dcm"])
@pytest.mark.parametrize("listed", [False, True])
def test_slices_with_an_empty_mask_are_normal_tissue_of_an_abnormal_patient(tmp_path, suffix, listed, caplog):
    lesions = series_with_masks(tmp_path, suffix)
    options = {"num_workers": 0, "group_by": "folder"}
    if listed:
        lines = ["path,label,mask", *(f"normal/n{number},normal," for number in range(4))]
        lines += [f"abnormal/{name},abnormal,masks/{name}" for name in lesions]
        options |= {"image_list": write_list(tmp_path / "images.csv", lines)}
    else:
        options = FOLDERS | options
    with caplog.at_level(logging.INFO):
        datamodule = MedicalFolder(tmp_path, **options)
        datamodule.setup("fit")
    assert "4 images of abnormal files have an empty mask and are labelled normal" in caplog.text
    found = [
        item for part in (datamodule.val_data, datamodule.test_data) for item in part if "abnormal" in item.image_path
    ]
    labels = {"/".join(Path(item.image_path).with_suffix("").parts[-2:]): int(item.gt_label) for item in found}
    assert labels == {f"{name}/{i}": int(lesion) for name, slices in lesions.items() for i, lesion in enumerate(slices)}
    assert not any("abnormal" in path for path in datamodule.train_data.samples["image_path"])


def test_listed_folders_are_groups_of_their_own(tmp_path):
    lines = ["path,label"]
    for number in range(16):
        for index in range(4):
            write_picture(tmp_path / f"p{number}/{index}.png", body(10 * number + index, lesion=number % 2 == 1))
        lines.append(f"p{number},{number % 2}")
    listed = write_list(tmp_path / "images.csv", lines)
    for group_by in (None, "folder"):
        split = parts(MedicalFolder(tmp_path, image_list=listed, group_by=group_by))
        assert {name: len(folders) for name, folders in split.items()} == {"train": 4, "val": 6, "test": 6}
        assert not split["train"] & split["val"] | split["train"] & split["test"] | split["val"] & split["test"]


@pytest.mark.parametrize(
    ("normal", "abnormal", "options", "message"),
    [
        (
            2,
            1,
            {},
            r"2 normal group\(s\) .* cannot be split into val, test, train: .* 1 more normal .* are missing. Add",
        ),
        (3, 1, {}, r"1 abnormal group\(s\) .* cannot be split into val, test: .* 1 more abnormal"),
        (3, 2, {"train_abnormal": True}, r"2 abnormal group\(s\) .* cannot be split into val, test, train"),
        (2, 1, {"val_split_ratio": 0}, None),
        (3, 2, {}, None),
    ],
)
def test_what_cannot_be_split_is_refused(tmp_path, normal, abnormal, options, message):
    for number in range(normal + abnormal):
        kind = "normal" if number < normal else "abnormal"
        write_picture(tmp_path / f"{kind}/{number}.png", body(number, kind == "abnormal"))
    datamodule = MedicalFolder(tmp_path, "normal", "abnormal", num_workers=0, **options)
    if message:
        with pytest.raises(ValueError, match=message):
            datamodule.setup()
        return
    datamodule.setup()
    for part in [datamodule.test_data, *([datamodule.val_data] if "val_split_ratio" not in options else [])]:
        assert set(part.samples["label_index"]) == {0, 1}


def test_images_equal_to_training_images_are_not_evaluated(tmp_path, caplog):
    for number in range(20):
        write_picture(tmp_path / f"normal/{number}.png", body(number))
        if number < 8:
            Image.open(tmp_path / f"normal/{number}.png").save(tmp_path / f"normal/{number}_again.tif")
    for seed in range(3):
        datamodule = MedicalFolder(tmp_path, "normal", num_workers=0, seed=seed)
        datamodule.setup("fit")
        stems = [
            {Path(path).stem.removesuffix("_again") for path in part.samples["image_path"]}
            for part in (datamodule.train_data, datamodule.val_data, datamodule.test_data)
        ]
        assert not stems[0] & stems[1] | stems[0] & stems[2] | stems[1] & stems[2]
    assert "are copies of images of other parts and were left out" in caplog.text


def test_files_are_grouped_by_a_pattern_of_their_names(tmp_path):
    for patient in range(6):
        for index in range(4):
            write_picture(tmp_path / f"normal/{patient:03}_{index}.png", body(10 * patient + index))
    datamodule = MedicalFolder(tmp_path, "normal", group_by=r"(?P<patient>\d+)_\d+", num_workers=0)
    datamodule.setup()
    split = [
        {Path(path).name[:3] for path in part.samples["image_path"]}
        for part in (datamodule.train_data, datamodule.val_data, datamodule.test_data)
    ]
    assert [len(patients) for patients in split] == [4, 1, 1]
    assert len(set.union(*split)) == 6


def test_rows_outside_the_folder_write_nothing_outside_the_results(tmp_path, predict):
    for name in ("data/in.png", "outside/out.png"):
        write_picture(tmp_path / name, body(len(name)))
    for index in range(4):
        write_picture(tmp_path / f"data/{index}.png", body(50 + index))
    write_volume_file(tmp_path / "outside/v.nii.gz", [body(9)])
    lines = ["path,label,split", "in.png,0,test", "../outside/out.png,0,test", "../outside/v.nii.gz,0,test"]
    lines += [f"{index}.png,0,train" for index in range(4)]
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    listed = write_list(tmp_path / "images.csv", lines)
    _, folder = predict(MedicalFolder(tmp_path / "data", image_list=listed, num_workers=0))
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - before - {listed}
    assert all(path.is_relative_to(tmp_path / "results") for path in written)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"in.png", "out.png", "v_slice000.png", "v_anomaly.nii.gz", "predictions.csv"}


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_prediction_summarises_each_series_and_each_volume(predicted):
    _, folder, scans = predicted
    table = {path: row["group"] for path, row in rows(folder).items()}
    volume = {table[f"{scans}/b/volume.nii.gz#{index}"] for index in range(4)}
    series = {table[str(scans / f"series/{name}.dcm")] for name in "xyz"}
    assert len(volume) == len(series) == 1
    assert len(set(table.values())) == 5 + 2
    summary = {row["group"]: row for row in read_table(folder / "predictions_by_group.csv")}
    assert list(next(iter(summary.values()))) == [
        "group", "score", "mean_of_highest_3", "label", "abnormal_images", "images", "unreadable_images"
    ]  # fmt: skip
    for group, row in summary.items():
        scores = sorted(float(image["score"]) for image in rows(folder).values() if image["group"] == group)[::-1]
        assert int(row["images"]) == len(scores)
        assert float(row["score"]) == pytest.approx(scores[0], rel=1e-6)
        assert float(row["mean_of_highest_3"]) == pytest.approx(np.mean(scores[:3]), rel=1e-6)
        assert row["label"] == row["abnormal_images"] == ""  # an untrained model has no threshold


def test_groups_with_unreadable_images_say_so(tmp_path, predict, trained):
    _, checkpoint = trained
    for index in range(3):
        write_dicom(tmp_path / f"scans/a/{index}.dcm", body(index, lesion=index > 0))
    write_dicom(tmp_path / "scans/b/0.dcm", body(5))
    cut = tmp_path / "scans/a/1.dcm"
    cut.write_bytes(cut.read_bytes()[:-500])
    cut = write_dicom(tmp_path / "scans/c/0.dcm", body(6))
    cut.write_bytes(cut.read_bytes()[:-500])
    model = MVFA.load_from_checkpoint(checkpoint)
    _, folder = predict(MedicalFolder(tmp_path / "scans", num_workers=0, group_by="folder"), model)
    table = rows(folder)
    first, _, third = read_table(folder / "predictions_by_group.csv")
    assert (first["images"], first["unreadable_images"]) == ("3", "1")
    labels = [row["label"] for path, row in table.items() if "/a/" in path]
    assert labels.count("") == 1
    assert int(first["abnormal_images"]) == sum(label == "1" for label in labels)
    assert first["label"] == max(labels)
    assert [third[name] for name in ("score", "label", "abnormal_images", "unreadable_images")] == ["", "", "", "1"]


def test_images_without_groups_have_neither_column_nor_summary(tmp_path, predict):
    for index in range(3):
        write_picture(tmp_path / f"scans/{index}.png", body(index))
    _, folder = predict(MedicalFolder(tmp_path / "scans", num_workers=0))
    assert "group" not in next(iter(rows(folder).values()))
    assert not (folder / "predictions_by_group.csv").exists()


def test_test_measures_patients_besides_images(trained, patients, tmp_path):
    from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

    _, checkpoint = trained
    engine = Engine(accelerator="cpu", default_root_dir=tmp_path / "results", logger=False, enable_progress_bar=False)
    datamodule = MedicalFolder(patients, group_by="patient", intensity="soft_tissue", **FOLDERS)
    (metrics,) = engine.test(MVFA.load_from_checkpoint(checkpoint), datamodule=datamodule)
    folder = Path(engine.trainer.default_root_dir) / "images"
    summary = read_table(folder / "predictions_by_group.csv")
    assert len(summary) == len(set(datamodule.test_data.samples["group"])) == 6
    truths = [int(row["true_label"]) for row in summary]
    assert sum(truths) == 4
    scores, labels = [float(row["score"]) for row in summary], [int(row["label"]) for row in summary]
    assert metrics["group_AUROC"] == pytest.approx(roc_auc_score(truths, scores))
    assert metrics["group_AUPR"] == pytest.approx(average_precision_score(truths, scores))
    assert metrics["group_F1Score"] == pytest.approx(f1_score(truths, labels))
    for row in summary:
        images = [image for image in rows(folder).values() if image["group"] == row["group"]]
        assert row["true_label"] == max(image["true_label"] for image in images)
        assert int(row["abnormal_images"]) == sum(image["label"] == "1" for image in images)


def test_name_of_the_data_is_never_that_of_a_folder(tmp_path):
    assert MedicalFolder(tmp_path / "Zuckerkandl_Emil").name == "Prediction"
    assert MedicalFolder(tmp_path / "Zuckerkandl_Emil", "normal").name == "MedicalFolder"
    assert MedicalFolder(tmp_path / "Zuckerkandl_Emil", name="heads").name == "heads"


def test_folders_named_after_patients_reach_no_file_of_a_training(tmp_path, patients):
    root = patients.rename(tmp_path / "Zuckerkandl_Emil")
    names = {"normal_dir": "Semmelweis_Ignaz", "abnormal_dir": "Billroth_T", "mask_dir": "Rokitansky_K"}
    for name, folder in names.items():
        (root / FOLDERS[name]).rename(root / folder)
    source = MedicalFolder(root, group_by="patient", num_workers=0, **names)
    model, _ = fitted(FewShot(source, k_shot=1), tmp_path)
    model.save_adapters(tmp_path / "results" / "a.safetensors")
    files = [path for path in (tmp_path / "results").rglob("*") if path.is_file()]
    assert {"run.json", "model.ckpt", "a.safetensors"} <= {path.name for path in files}
    for path in files:
        said = str(path.relative_to(tmp_path)) + path.read_bytes().decode("latin-1")
        if path.suffix == ".ckpt":
            with zipfile.ZipFile(path) as archive:
                said += "".join(archive.read(name).decode("latin-1") for name in archive.namelist())
        for name in ("Zuckerkandl_Emil", *names.values()):
            assert name not in said, path


def test_burned_in_text_brings_one_warning_and_can_be_blacked_out(tmp_path, patients, predict, caplog):
    for index in range(3):
        write_dicom(tmp_path / f"us/{index}.dcm", body(index), Modality="US")
    write_dicom(tmp_path / "us/clean.dcm", body(9), Modality="CT")
    predict(MedicalFolder(tmp_path / "us", num_workers=0))
    assert caplog.text.count("3 DICOM files may have text such as a patient's name burned into their pixels") == 1
    caplog.clear()
    few_shot = FewShot(MedicalFolder(patients, group_by="patient", **FOLDERS), k_shot=1)
    for path in patients.rglob("abnormal/*/1.dcm"):
        dataset = pydicom.dcmread(path)
        dataset.BurnedInAnnotation = "YES"
        dataset.save_as(path)
    few_shot.setup("test")
    count = sum("abnormal" in path for path in few_shot.test_data.samples["image_path"])
    assert f"{count} DICOM files may have text" in caplog.text
    caplog.clear()
    box = [[4, 30, 20, 10]]
    _, folder = predict(MedicalFolder(tmp_path / "us", num_workers=0, blackout=box))
    assert "burned" not in caplog.text
    datamodule = MedicalFolder(tmp_path / "us", num_workers=0, blackout=box)
    datamodule.setup("predict")
    image = datamodule.test_data[0].image
    assert (image[:, 30:40, 4:24] == 0).all()
    assert torch.equal(image[:, :30], read_image(tmp_path / "us/0.dcm")[:, :30])
    with Image.open(folder / "0.png") as picture:
        assert np.asarray(picture)[31:39, 5:23].max() == 0


def test_volume_and_limit_reach_the_readers(tmp_path, predict):
    stack = np.stack([body(1, size=(24, 20)), body(2, size=(24, 20))], -1)
    four = np.stack([stack, 1 - stack], -1).astype(np.float32)
    (tmp_path / "v").mkdir()
    nibabel.save(nibabel.Nifti1Image(four, np.eye(4)), tmp_path / "v/a.nii.gz")
    items, folder = predict(MedicalFolder(tmp_path / "v", num_workers=0))
    assert "holds 2 volumes; choose one with the option volume" in items[0].explanation
    items, folder = predict(MedicalFolder(tmp_path / "v", num_workers=0, volume=1))
    assert len(items) == 2
    assert nibabel.load(folder / "a_anomaly.nii.gz").shape == (24, 20, 2)
    items, _ = predict(MedicalFolder(tmp_path / "v", num_workers=0, volume=1, max_pixels=959))
    assert "holds 960 pixels, more than max_pixels=959" in items[0].explanation


def write_list(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_list_gives_labels_masks_groups_and_splits(patients, tmp_path):
    lines = ["path,label,mask,group,split"]
    lines += [f"normal/n{number},Normal,,g{number},{'train' if number < 6 else 'test'}" for number in range(10)]
    lines += [f"abnormal/a{number}/1.dcm,1,masks/a{number}/1.png,h{number},valid" for number in range(8)]
    listed = write_list(tmp_path / "images.csv", lines)
    datamodule = MedicalFolder(patients, image_list=listed, num_workers=0)
    datamodule.setup("fit")
    sizes = [len(part) for part in (datamodule.train_data, datamodule.val_data, datamodule.test_data)]
    assert sizes == [18, 8, 12]  # a folder is a series of three
    assert set(datamodule.val_data.samples["label_index"]) == {LabelName.ABNORMAL.value}
    assert int(datamodule.val_data[0].gt_mask.sum()) == 12 * 8


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["file,label", "a,0"], "needs the columns label, path; it has file, label"),
        (["path,label", "normal/n0,0", "normal/n1,sick"], r"not understood: line 3: label 'sick'"),
        (["path,label,group", "normal/n0,0,"], "lines without a group: 2"),
        (
            ["path,label,group,split", "normal/n0/0.dcm,0,Zuckerkandl,train", "normal/n0/1.dcm,0,Zuckerkandl,test"],
            r"1 groups are in more than one split .*n0/0\.dcm\. Put",
        ),
    ],
)
def test_faulty_lists_are_refused_without_naming_groups(patients, tmp_path, lines, message):
    listed = write_list(tmp_path / "images.csv", lines)
    with pytest.raises(ValueError, match=message) as refusal:
        MedicalFolder(patients, image_list=listed).setup()
    assert "Zuckerkandl" not in str(refusal.value)


def test_all_files_that_cannot_be_used_are_listed_before_training(scans, damaged, patients, tmp_path):
    (patients / "masks/a0/1.png").write_bytes(b"")
    write_picture(patients / "masks/a1/1.png", np.ones((5, 6)))
    (patients / "masks/a2/1.png").unlink()
    lines = ["path,label,mask", "patients/normal/n0/0.dcm,0,", "absent.png,0,"]
    lines += [f"scans/bad/{name},0," for name in damaged]
    lines += [f"patients/abnormal/a{number}/1.dcm,1,patients/masks/a{number}/1.png" for number in range(3)]
    lines += ["patients/abnormal/a3/1.dcm,1,"]
    listed = write_list(tmp_path / "images.csv", lines)
    with pytest.raises(ValueError, match="13 files cannot be used") as refusal:
        MedicalFolder(tmp_path, image_list=listed, num_workers=0).setup("fit")
    message = str(refusal.value)
    for name, reason in damaged.items():
        line = next(line for line in message.splitlines() if f"/{name}:" in line)
        assert reason in line
    assert f"{tmp_path}/absent.png: no such file" in message
    assert "masks/a0/1.png: the file is empty" in message
    assert "masks/a1/1.png: this mask is 6x5 (width x height), its image 40x48" in message
    assert "masks/a2/1.png: no such file" in message
    assert "abnormal/a3/1.dcm: abnormal, but without a mask" in message


def test_training_without_labels_is_refused(scans):
    with pytest.raises(ValueError, match="was given no labels"):
        MedicalFolder(scans).setup("fit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"normal_dir": "a", "image_list": "b"}, "not both"),
        ({"abnormal_dir": "a"}, "abnormal_dir needs normal_dir"),
        ({"normal_dir": "a", "mask_dir": "b"}, "mask_dir needs abnormal_dir"),
        ({"group_by": "name"}, "must be one of folder, patient, csv, or a pattern"),
        ({"group_by": "(name"}, "is no regular expression"),
        ({"blackout": [[0, 0, 5]]}, "rectangles .left, top, width, height."),
        ({"group_by": "csv"}, "give that file"),
        ({"val_split_ratio": 0.5, "test_split_ratio": 0.5}, "must leave some for training"),
        ({"intensity": "dark"}, "Unknown intensity rule 'dark'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MedicalFolder("scans", **arguments)
