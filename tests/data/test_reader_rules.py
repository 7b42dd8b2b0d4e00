# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""DICOM images under every intensity rule: inversion, ranges of padding, and the byte order of lookup tables."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anomalib_mvfa.data.readers import ImageRef, read_image
from anomalib_mvfa.data.readers.dicom import dicom_header

pydicom = pytest.importorskip("pydicom")

STORED = np.array([[0, 50, 100], [150, 200, 250]], dtype=np.uint16)  # 8 bits would count as windowed already
WINDOW = {"WindowCenter": 125, "WindowWidth": 250, "VOILUTFunction": "LINEAR_EXACT"}
RULES = ("auto", "dicom", {"window": [125, 250]}, {"percentile": [0, 100]})


def write(path: Path, stored: np.ndarray, syntax: str = "1.2.840.10008.1.2.1", **attributes: Any) -> Path:
    """Write a grey DICOM file with the given transfer syntax."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", generate_uid()
    meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    bits = 8 * stored.itemsize
    dataset.Rows, dataset.Columns = stored.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit, dataset.PixelRepresentation = bits - 1, int(stored.dtype.kind == "i")
    for name, value in attributes.items():
        setattr(dataset, name, value)
    dataset.PixelData = stored.tobytes()
    dataset["PixelData"].VR = "OW" if bits > 8 else "OB"
    dataset.set_original_encoding(is_implicit_vr=False, is_little_endian=meta.TransferSyntaxUID.is_little_endian)
    dataset.save_as(path, enforce_file_format=True)
    return path


def levels(path: Path, rule: Any) -> np.ndarray:
    return read_image(ImageRef(path), rule)[0].numpy()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_monochrome1_is_inverted_under_every_rule(tmp_path: Path, rule: Any) -> None:
    plain = levels(write(tmp_path / "plain.dcm", STORED, **WINDOW), rule)
    inverted = write(tmp_path / "inverted.dcm", STORED, PhotometricInterpretation="MONOCHROME1", **WINDOW)
    np.testing.assert_allclose(plain, STORED / 250, atol=1e-6)
    np.testing.assert_allclose(levels(inverted, rule), 1 - STORED / 250, atol=1e-6)


def test_monochrome1_without_a_window_is_inverted_after_percentiles(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", STORED, PhotometricInterpretation="MONOCHROME1")
    low, high = np.percentile(STORED, [0.5, 99.5])
    np.testing.assert_allclose(levels(path, "auto"), 1 - np.clip((STORED - low) / (high - low), 0, 1), atol=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("limits", [(-2000, -1500), (-1500, -2000)], ids=["rising", "falling"])
def test_a_range_of_padding_is_black_and_does_not_count(tmp_path: Path, rule: Any, limits: tuple[int, int]) -> None:
    stored = np.array([[-2000, -1800, -1500], [0, 125, 250]], dtype=np.int16)
    padding = {"PixelPaddingValue": limits[0], "PixelPaddingRangeLimit": limits[1]}
    found = levels(write(tmp_path / "a.dcm", stored, **padding, **WINDOW), rule)
    np.testing.assert_allclose(found, [[0, 0, 0], [0, 0.5, 1]], atol=1e-6)
    inverted = write(tmp_path / "b.dcm", stored, PhotometricInterpretation="MONOCHROME1", **padding, **WINDOW)
    np.testing.assert_allclose(levels(inverted, rule), [[0, 0, 0], [1, 0.5, 0]], atol=1e-6)


def test_a_padding_value_without_a_range_is_that_value_alone(tmp_path: Path) -> None:
    stored = np.array([[-2000, -1999, 0, 250]], dtype=np.int16)
    inverted = {"PhotometricInterpretation": "MONOCHROME1", "PixelPaddingValue": -2000}
    found = levels(write(tmp_path / "a.dcm", stored, **inverted, **WINDOW), "dicom")
    np.testing.assert_allclose(found, [[0, 1, 1, 0]], atol=1e-6)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"], ids=["little", "big"])
@pytest.mark.parametrize("rule", ["auto", "dicom"])
def test_lookup_tables_of_bytes_have_the_byte_order_of_the_file(tmp_path: Path, syntax: str, rule: str) -> None:
    table = np.array([0, 256, 4095, 1], dtype=np.uint16)
    order = "<u2" if syntax.endswith("2.1") else ">u2"
    lut = pydicom.Dataset()
    lut.LUTDescriptor, lut.LUTData = [4, 0, 12], table.astype(order).tobytes()
    lut["LUTDescriptor"].VR, lut["LUTData"].VR = "US", "OW"
    stored = np.array([[0, 1], [2, 3]], dtype=np.uint8)
    path = write(tmp_path / "a.dcm", stored, syntax, VOILUTSequence=pydicom.Sequence([lut]))
    np.testing.assert_allclose(levels(path, rule), table.reshape(2, 2) / 4095, atol=1e-6)


@pytest.mark.parametrize("rule", ["auto", "dicom"])
def test_lookup_tables_of_eight_bits_and_of_all_65536_values(tmp_path: Path, rule: str) -> None:
    lut = pydicom.Dataset()
    lut.LUTDescriptor, lut.LUTData = [4, 0, 8], bytes([0, 255, 51, 102])
    lut["LUTDescriptor"].VR, lut["LUTData"].VR = "US", "OW"
    stored = np.array([[0, 1], [2, 3]], dtype=np.uint8)
    path = write(tmp_path / "a.dcm", stored, VOILUTSequence=pydicom.Sequence([lut]))
    np.testing.assert_allclose(levels(path, rule), [[0, 1], [0.2, 0.4]], atol=1e-6)
    table = np.arange(2**16, dtype="<u2")[::-1]
    lut.LUTDescriptor, lut.LUTData = [0, 0, 16], table.tobytes()  # 0 entries stand for 2**16
    stored = np.array([[0, 1000], [40000, 65535]], dtype=np.uint16)
    path = write(tmp_path / "b.dcm", stored, VOILUTSequence=pydicom.Sequence([lut]))
    np.testing.assert_allclose(levels(path, rule), 1 - stored / 65535, atol=1e-6)


def test_a_lookup_table_of_signed_pixels_begins_at_a_signed_value(tmp_path: Path) -> None:
    lut = pydicom.Dataset()
    lut.LUTDescriptor, lut.LUTData = [3, 2**16 - 1, 8], [0, 51, 255]  # -1, written without a sign
    lut["LUTDescriptor"].VR, lut["LUTData"].VR = "US", "US"
    stored = np.array([[-5, -1, 0, 1, 9]], dtype=np.int16)
    path = write(tmp_path / "a.dcm", stored, VOILUTSequence=pydicom.Sequence([lut]))
    np.testing.assert_allclose(levels(path, "dicom"), [[0, 0, 0.2, 1, 1]], atol=1e-6)


def test_a_file_that_was_written_again_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", STORED)
    assert not dicom_header(ImageRef(path)).burned_in
    write(path, STORED, BurnedInAnnotation="YES")
    assert dicom_header(ImageRef(path)).burned_in
