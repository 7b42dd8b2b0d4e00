# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Nothing in a DICOM header about a patient is in anything that is written or logged."""

import gzip
import logging
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from PIL import Image

from anomalib_mvfa import MVFA
from anomalib_mvfa.data import FewShot, MedicalFolder

pydicom = pytest.importorskip("pydicom")

UIDS = {
    "StudyInstanceUID": "1.2.840.99.7711",
    "SeriesInstanceUID": "1.2.840.99.7722",
    "FrameOfReferenceUID": "1.2.840.99.7733",
}
HEADER = {
    "PatientName": "Zweifelsohne^Amalthea",
    "PatientID": "QX-4711-ZZ",
    "PatientBirthDate": "19370214",
    "PatientAddress": "Holunderwinkel 17",
    "PatientTelephoneNumbers": "0049-555-0199",
    "OtherPatientNames": "Blumenkohl^Amalthea",
    "PatientMotherBirthName": "Sauerampfer",
    "PatientComments": "allergic to zirconium",
    "InstitutionName": "Krankenhaus Siebenbergen",
    "InstitutionAddress": "Siebenbergenallee 3",
    "ReferringPhysicianName": "Dr^Quendel",
    "PerformingPhysicianName": "Dr^Liebstoeckel",
    "OperatorsName": "Schachtelhalm",
    "StationName": "MRT-KELLER-2",
    "AccessionNumber": "ACC-998877",
    "StudyID": "STUDY-665544",
    "StudyDescription": "Schaedel nach Sturz",
    "SeriesDescription": "T2 Vogelsang",
    "ProtocolName": "Hirnprotokoll Xanten",
    "DeviceSerialNumber": "SN-31337-Q",
    "StudyDate": "20031129",
    "AcquisitionTime": "042319.771",
    "MedicalRecordLocator": "Aktenraum-9",
    "StudyInstanceUID": "1.2.840.99.7711",
    "SeriesInstanceUID": "1.2.840.99.7722",
    "FrameOfReferenceUID": "1.2.840.99.7733",
}
PARTS = sorted(
    {part for value in HEADER.values() for part in (value, *value.split("^"), *value.split()) if len(part) > 4}
)


def write_dicom(path: Path, pixels: np.ndarray, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.MRImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = f"1.2.840.99.8800.{number}"
    dataset.SOPClassUID = pydicom.uid.MRImageStorage
    for name, value in HEADER.items():
        setattr(dataset, name, value)
    dataset.PatientID = f"{HEADER['PatientID']}{number}"
    dataset.Modality, dataset.InstanceNumber = "MR", number
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PixelData = pixels.astype(np.uint16).tobytes()
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)


def contents(path: Path) -> bytes:
    """A file's bytes, and what is compressed in it."""
    data = path.read_bytes()
    found = [data, str(path).encode()]
    if path.suffix == ".png":
        with Image.open(path) as image:
            found += [repr(image.info).encode(), repr(dict(image.getexif())).encode()]
    if path.suffix == ".gz":
        found.append(gzip.decompress(data))
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            found += [archive.read(name) for name in archive.namelist()]
    return b"\n".join(found)


def leaks(data: bytes) -> list[str]:
    lower = data.lower()
    encodings = ("utf-8", "utf-16-le", "utf-16-be")
    return [part for part in PARTS if any(part.lower().encode(encoding) in lower for encoding in encodings)]


def test_the_search_finds_what_it_looks_for(tmp_path):
    write_dicom(tmp_path / "a.dcm", np.zeros((8, 8)), 1)
    assert len(leaks(contents(tmp_path / "a.dcm"))) > 30
    assert leaks("x-zweifelsohne".encode("utf-16-le")) == ["Zweifelsohne"]
    with gzip.open(tmp_path / "a.nii.gz", "wb") as file:
        file.write(b"QX-4711-ZZ")
    assert leaks(contents(tmp_path / "a.nii.gz"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", "Sauerampfer" * 3)
    assert leaks(contents(tmp_path / "a.zip")) == ["Sauerampfer"]


def test_no_identifying_value_is_written_or_logged(tmp_path, small_backbone, caplog, capfd):
    rng = np.random.default_rng(0)
    number = 0
    for kind, count in (("normal", 8), ("abnormal", 4)):
        for index in range(count):
            pixels, mask = rng.integers(300, 500, (56, 56)), np.zeros((56, 56), np.uint8)
            if kind == "abnormal":
                mask[10:20, 10:20], pixels[10:20, 10:20] = 255, 900
                (tmp_path / "data" / "masks").mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(tmp_path / "data" / "masks" / f"{index}.png")
            number += 1
            write_dicom(tmp_path / "data" / kind / f"{index}.dcm", pixels, number)
    broken = (tmp_path / "data" / "normal" / "0.dcm").read_bytes()
    scans = tmp_path / "scans"
    for index in range(2):
        write_dicom(scans / f"{index}.dcm", rng.integers(300, 500, (56, 56)), 90 + index)
    (scans / "broken.dcm").write_bytes(broken[:-2000])

    out = tmp_path / "out"
    torch.manual_seed(0)
    model = MVFA(small_backbone, "random")
    options = {"accelerator": "cpu", "logger": True, "enable_progress_bar": False}
    engine = Engine(default_root_dir=out, max_epochs=1, **options)
    names = {"normal_dir": "normal", "abnormal_dir": "abnormal", "mask_dir": "masks", "group_by": "patient"}
    data = FewShot(MedicalFolder(tmp_path / "data", num_workers=0, seed=0, name="heads", **names), k_shot=1)
    with caplog.at_level(logging.DEBUG):
        engine.fit(model, datamodule=data)
        engine.test(model, datamodule=data)
        predictions = engine.predict(model, datamodule=MedicalFolder(scans, num_workers=0))
        model.save_adapters(out / "adapters.safetensors")
        model.save_adapters(out / "adapters.pth")
        engine.export(model, ExportType.TORCH, export_root=out / "exported")
    assert sum(len(batch) for batch in predictions) == 3
    files = [path for path in out.rglob("*") if path.is_file()]
    suffixes = {path.suffix for path in files}
    assert {".csv", ".png", ".ckpt", ".json", ".safetensors", ".pth", ".pt"} <= suffixes
    for path in files:
        assert not leaks(contents(path)), path
    said = capfd.readouterr()
    assert "could not be read" in caplog.text
    assert not leaks(caplog.text.encode())
    assert not leaks((said.out + said.err).encode())
