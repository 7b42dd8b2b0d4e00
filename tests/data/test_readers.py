# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Readers: every format, made here with known numbers, against values worked out by hand."""

import io
import logging
import os
import pickle
import struct
import sys
import tracemalloc
import warnings
import zlib
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pytest
import tifffile
import torch
from anomalib.data.utils import read_image as anomalib_read_image
from PIL import Image

from anomalib_mvfa.data.readers import (
    ImageRef,
    IntensityRule,
    UnreadableImageError,
    list_images,
    read_image,
    read_mask,
    read_volume,
    volume_slice,
    write_volume,
)
from anomalib_mvfa.data.readers.dicom import dicom_header, patient_key
from anomalib_mvfa.data.readers.files import IMAGE_SUFFIXES
from anomalib_mvfa.data.readers.intensity import CT_WINDOWS
from anomalib_mvfa.data.readers.volumes import same_grid

pydicom = pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")

PATIENT = "Doe^Jane"
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
RGB = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=-1)


def key(ref: ImageRef) -> str:
    """Return the path below the root, and the index."""
    path = ref.path.relative_to(ref.root or ref.path.parent).as_posix()
    return path if ref.frame is None else f"{path}#{ref.frame}"


def grey(image: torch.Tensor) -> np.ndarray:
    """Return the grey levels ``(H, W)`` of an image that must have three equal channels."""
    assert image.dtype == torch.float32
    assert image.shape[0] == 3
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])
    return image[0].numpy()


def write_dicom(path: Path, pixels: np.ndarray | bytes | None, **attributes: Any) -> Path:
    """Write a DICOM file of grey pixels ``(H, W)``; attributes overrule what is derived from them."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = attributes.pop("sop_class", "1.2.840.10008.5.1.4.1.1.2")
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = attributes.pop("syntax", ExplicitVRLittleEndian)
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.PatientName, dataset.PatientID = PATIENT, "ID-4711"
    if isinstance(pixels, np.ndarray):
        bits = 8 * pixels.itemsize
        dataset.Rows, dataset.Columns = pixels.shape[:2]
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
        dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
        data = pixels.tobytes()
        dataset.PixelData = data + b"\0" * (len(data) % 2)
        dataset["PixelData"].VR = "OW" if bits > 8 else "OB"
    for name, value in attributes.items():
        setattr(dataset, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def item(**attributes: Any) -> Any:
    """Make a sequence of one item."""
    dataset = pydicom.Dataset()
    for name, value in attributes.items():
        setattr(dataset, name, value)
    return pydicom.Sequence([dataset])


def write_nifti(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """Write a NIfTI volume."""
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


class TestIntensityRule:
    """Configuration of grey levels."""

    @pytest.mark.parametrize(
        ("rule", "kind", "values"),
        [
            ("auto", "auto", ()),
            ("dicom", "dicom", ()),
            ("percentile", "percentile", (0.5, 99.5)),
            ("lung", "window", (-600.0, 1500.0)),
            ([40, 80], "window", (40.0, 80.0)),
            ({"window": [40, 80]}, "window", (40.0, 80.0)),
            ({"percentile": [2, 98]}, "percentile", (2.0, 98.0)),
            ('{"window": [40, 80]}', "window", (40.0, 80.0)),
        ],
    )
    def test_plain_data_parse_and_round_trip(self, rule: Any, kind: str, values: tuple[float, ...]) -> None:
        parsed = IntensityRule.parse(rule)
        assert (parsed.kind, parsed.values) == (kind, values)
        assert IntensityRule.parse(str(parsed)) == parsed

    def test_named_windows_are_the_usual_ones(self) -> None:
        assert CT_WINDOWS == {
            "brain": (40, 80),
            "subdural": (80, 200),
            "stroke": (40, 40),
            "bone": (400, 1800),
            "lung": (-600, 1500),
            "mediastinum": (50, 350),
            "abdomen": (50, 400),
            "liver": (30, 150),
            "soft_tissue": (40, 400),
        }

    @pytest.mark.parametrize(
        "rule",
        [
            "nonsense",
            {"window": [40, 0]},
            {"window": [40]},
            {"window": [40, float("nan")]},
            {"percentile": [99, 1]},
            {"percentile": [0, 101]},
            {"auto": [1, 2]},
            {"window": [40, 80], "percentile": [1, 99]},
            "{broken",
        ],
    )
    def test_malformed_rules_are_refused(self, rule: Any) -> None:
        with pytest.raises(ValueError, match=r"\S"):
            IntensityRule.parse(rule)

    def test_only_windows_are_written_by_their_names(self) -> None:
        assert str(IntensityRule.parse([40, 80])) == "brain"
        assert str(IntensityRule.parse({"percentile": [40, 80]})) == '{"percentile": [40.0, 80.0]}'

    def test_an_unknown_name_lists_the_choices(self) -> None:
        with pytest.raises(ValueError, match=r"nonsense.*percentile.*soft_tissue"):
            IntensityRule.parse("nonsense")


class TestRaster:
    """Images read through Pillow."""

    @pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp"])
    @pytest.mark.parametrize("pixels", [RAMP, RGB], ids=["grey", "rgb"])
    def test_eight_bit_files_equal_anomalib(self, tmp_path: Path, suffix: str, pixels: np.ndarray) -> None:
        path = tmp_path / f"image.{suffix}"
        Image.fromarray(pixels).save(path)
        assert torch.equal(read_image(path), anomalib_read_image(path, as_tensor=True))

    def test_grey_png_is_value_over_255(self, tmp_path: Path) -> None:
        Image.fromarray(RAMP).save(tmp_path / "a.png")
        np.testing.assert_allclose(grey(read_image(tmp_path / "a.png")), RAMP / 255.0, atol=1e-7)

    def test_exif_orientation_is_ignored_as_in_anomalib(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        path = tmp_path / "rotated.jpg"
        Image.fromarray(RGB[:8]).save(path, exif=exif)
        image = read_image(path)
        assert image.shape == (3, 8, 16)
        assert torch.equal(image, anomalib_read_image(path, as_tensor=True))

    def test_one_bit_and_cmyk(self, tmp_path: Path) -> None:
        Image.fromarray(RAMP > 99).save(tmp_path / "bit.png")
        np.testing.assert_array_equal(grey(read_image(tmp_path / "bit.png")), RAMP > 99)
        Image.new("CMYK", (2, 2), (255, 0, 0, 0)).save(tmp_path / "ink.tif")
        assert read_image(tmp_path / "ink.tif")[:, 0, 0].tolist() == [0.0, 1.0, 1.0]

    def test_palette_gives_its_colours(self, tmp_path: Path) -> None:
        image = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8)).convert("P")
        image.putpalette([10, 20, 30, 51, 102, 204, 0, 255, 0])
        image.save(tmp_path / "p.png")
        expected = np.array([[[10, 20, 30], [51, 102, 204]], [[0, 255, 0], [51, 102, 204]]]) / 255
        np.testing.assert_allclose(read_image(tmp_path / "p.png").permute(1, 2, 0), expected, atol=1e-7)

    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    def test_transparent_pixels_are_laid_on_black(self, tmp_path: Path, mode: str) -> None:
        colour = [200] * (len(mode) - 1)
        pixels = np.array([[[*colour, 255], [*colour, 0]], [[*colour, 128], [*colour, 51]]], dtype=np.uint8)
        Image.fromarray(pixels, mode).save(tmp_path / "a.png")
        expected = np.array([[200, 0], [200 * 128 / 255, 200 * 51 / 255]]) / 255
        np.testing.assert_allclose(grey(read_image(tmp_path / "a.png")), expected, atol=0.51 / 255)

    def test_sixteen_bits_with_transparency_are_refused(self, tmp_path: Path) -> None:
        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        header, row = struct.pack(">IIBBBBB", 2, 1, 16, 4, 0, 0, 0), b"\0" + struct.pack(">4H", 1, 65535, 40000, 65535)
        parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
        with pytest.raises(UnreadableImageError, match=r"a\.png: holds colours or transparency of 16 bits"):
            read_image(tmp_path / "a.png")

    def test_palette_transparency_is_laid_on_black(self, tmp_path: Path) -> None:
        image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
        image.putpalette([255, 255, 255, 255, 255, 255])
        image.save(tmp_path / "p.png", transparency=0)
        assert grey(read_image(tmp_path / "p.png")).tolist() == [[0.0, 1.0]]

    def test_sixteen_bit_png_spans_its_percentiles(self, tmp_path: Path) -> None:
        # 0, 10, 20 ... 10000: percentile p is 100 p, so 50 becomes 0 and 9950 becomes 1
        pixels = (np.arange(1001) * 10).astype(np.uint16).reshape(7, 143)
        Image.fromarray(pixels).save(tmp_path / "a.png")
        expected = np.clip((pixels - 50.0) / 9900.0, 0, 1)
        np.testing.assert_allclose(grey(read_image(tmp_path / "a.png")), expected, atol=1e-6)

    @pytest.mark.parametrize("dtype", [np.int32, np.float32])
    def test_wide_tiff_takes_window_and_percentiles(self, tmp_path: Path, dtype: type) -> None:
        pixels = np.linspace(-1000, 1000, 2001).astype(dtype).reshape(3, 667)
        Image.fromarray(pixels).save(tmp_path / "a.tif")
        windowed = grey(read_image(tmp_path / "a.tif", "brain"))
        np.testing.assert_allclose(windowed, np.clip(pixels / 80, 0, 1), atol=1e-6)
        stretched = grey(read_image(tmp_path / "a.tif", {"percentile": [0, 100]}))
        np.testing.assert_allclose(stretched, (pixels + 1000.0) / 2000, atol=1e-6)

    def test_eight_bit_image_is_taken_for_windowed_already(self, tmp_path: Path) -> None:
        Image.fromarray(RAMP).save(tmp_path / "a.png")
        assert torch.equal(read_image(tmp_path / "a.png", "lung"), read_image(tmp_path / "a.png"))

    @pytest.mark.parametrize(
        ("dtype", "largest", "photometric", "order"),
        [("u2", 4095, "miniswhite", "<"), ("u4", 2**31 + 5, "minisblack", "<"), ("u2", 4095, "minisblack", ">")],
    )
    def test_tiff_values_are_those_of_the_file(
        self, tmp_path: Path, dtype: str, largest: int, photometric: str, order: str
    ) -> None:
        stored = np.linspace(0, largest, 48).astype(dtype).reshape(6, 8)
        tifffile.imwrite(tmp_path / "a.tif", stored, photometric=photometric, byteorder=order)
        grey_levels = grey(read_image(tmp_path / "a.tif", {"percentile": [0, 100]}))
        expected = stored / largest
        np.testing.assert_allclose(grey_levels, 1 - expected if photometric == "miniswhite" else expected, atol=1e-6)

    def test_values_that_pillow_would_change_are_refused(self, tmp_path: Path) -> None:
        tifffile.imwrite(
            tmp_path / "signed.tif", np.arange(-8, 8, dtype=np.int8).reshape(4, 4), photometric="minisblack"
        )
        with pytest.raises(UnreadableImageError, match=r"signed\.tif: holds signed numbers of 8 bits"):
            read_image(tmp_path / "signed.tif")
        tifffile.imwrite(tmp_path / "stack.tif", np.stack([RAMP, RAMP + 1]), photometric="minisblack")
        with pytest.raises(UnreadableImageError, match=r"stack\.tif: holds 2 pages of one size"):
            read_image(tmp_path / "stack.tif")
        with tifffile.TiffWriter(tmp_path / "preview.tif") as file:
            file.write(RAMP, photometric="minisblack")
            file.write(RAMP[::2, ::2], photometric="minisblack")
        np.testing.assert_allclose(grey(read_image(tmp_path / "preview.tif")), RAMP / 255, atol=1e-6)
        mask = np.zeros((4, 4, 3), np.uint16)
        mask[1, 2] = 1
        cv2.imwrite(str(tmp_path / "mask.png"), mask)
        with pytest.raises(UnreadableImageError, match=r"mask\.png: holds colours or transparency of 16 bits"):
            read_mask(tmp_path / "mask.png")
        cv2.imwrite(str(tmp_path / "colour.png"), RGB.astype(np.uint16) * 257)
        np.testing.assert_allclose(
            read_image(tmp_path / "colour.png").permute(1, 2, 0), RGB[..., ::-1] / 255, atol=1e-6
        )

    def test_nan_pixels_become_the_minimum(self, tmp_path: Path) -> None:
        Image.fromarray(np.array([[np.nan, 2], [3, 4]], dtype=np.float32)).save(tmp_path / "a.tif")
        image = grey(read_image(tmp_path / "a.tif", {"percentile": [0, 100]}))
        np.testing.assert_allclose(image, [[0, 0], [0.5, 1]])

    def test_sparse_image_survives_coinciding_percentiles(self, tmp_path: Path) -> None:
        pixels = np.zeros((32, 32), dtype=np.uint16)
        pixels[3, 4] = 1000
        Image.fromarray(pixels).save(tmp_path / "a.png")
        image = grey(read_image(tmp_path / "a.png"))
        assert image[3, 4] == 1
        assert image.sum() == 1

    def test_constant_wide_image_is_black(self, tmp_path: Path) -> None:
        Image.fromarray(np.full((4, 4), 700, dtype=np.uint16)).save(tmp_path / "a.png")
        assert grey(read_image(tmp_path / "a.png")).max() == 0

    def test_dicom_rule_is_refused_with_the_file_named(self, tmp_path: Path) -> None:
        Image.fromarray(RAMP).save(tmp_path / "a.png")
        with pytest.raises(UnreadableImageError, match=r"a\.png.*no VOI LUT or window"):
            read_image(tmp_path / "a.png", "dicom")


class TestDicom:
    """DICOM files."""

    stored = np.array([[1024, 1064], [1084, 1104]], dtype=np.uint16)
    ct: ClassVar[dict[str, Any]] = {"RescaleSlope": 1, "RescaleIntercept": -1024}  # 0, 40, 60, 80 HU

    def test_named_window_counts_in_hounsfield_units(self, tmp_path: Path) -> None:
        path = write_dicom(tmp_path / "ct.dcm", self.stored, **self.ct)
        np.testing.assert_allclose(grey(read_image(path, "brain")), [[0, 0.5], [0.75, 1]], atol=1e-7)

    def test_slope_multiplies_before_the_window(self, tmp_path: Path) -> None:
        path = write_dicom(tmp_path / "ct.dcm", self.stored, RescaleSlope=0.5, RescaleIntercept=-512)
        np.testing.assert_allclose(grey(read_image(path, [40, 80])), [[0, 0.25], [0.375, 0.5]], atol=1e-7)

    @pytest.mark.parametrize("rule", ["auto", "dicom"])
    def test_own_window_follows_the_standards_linear_function(self, tmp_path: Path, rule: str) -> None:
        path = write_dicom(tmp_path / "ct.dcm", self.stored, WindowCenter=[40, 300], WindowWidth=[81, 1500], **self.ct)
        # ((x - (c - 0.5)) / (w - 1) + 0.5) with c = 40, w = 81
        expected = np.clip((np.array([[0, 40], [60, 80]]) - 39.5) / 80 + 0.5, 0, 1)
        np.testing.assert_allclose(grey(read_image(path, rule)), expected, atol=1e-6)

    def test_own_window_functions_linear_exact_and_sigmoid(self, tmp_path: Path) -> None:
        window = {"WindowCenter": 40, "WindowWidth": 80, **self.ct}
        exact = write_dicom(tmp_path / "exact.dcm", self.stored, VOILUTFunction="LINEAR_EXACT", **window)
        np.testing.assert_allclose(grey(read_image(exact)), [[0, 0.5], [0.75, 1]], atol=1e-7)
        sigmoid = write_dicom(tmp_path / "sigmoid.dcm", self.stored, VOILUTFunction="SIGMOID", **window)
        expected = 1 / (1 + np.exp(-4 * (np.array([[0, 40], [60, 80]]) - 40) / 80))
        np.testing.assert_allclose(grey(read_image(sigmoid)), expected, atol=1e-6)

    @pytest.mark.parametrize("bits", [8, 12])
    def test_voi_lut_wins_over_the_window(self, tmp_path: Path, bits: int) -> None:
        full = 2**bits - 1
        table = np.linspace(full, 0, 301).astype(int)
        lut = item(LUTDescriptor=[301, 1000, bits], LUTData=table.tolist())
        lut[0]["LUTDescriptor"].VR = lut[0]["LUTData"].VR = "US"
        stored = np.array([[0, 1000], [1290, 4000]], dtype=np.uint16)
        path = write_dicom(tmp_path / "a.dcm", stored, VOILUTSequence=lut, WindowCenter=40, WindowWidth=80)
        np.testing.assert_allclose(grey(read_image(path)), [[1, 1], [table[290] / full, 0]], atol=1e-6)

    def test_modality_lut_comes_before_the_window(self, tmp_path: Path) -> None:
        lut = item(LUTDescriptor=[4, 0, 16], LUTData=[0, 100, 50, 25], ModalityLUTType="US")
        lut[0]["LUTDescriptor"].VR = lut[0]["LUTData"].VR = "US"
        stored = np.array([[0, 1], [2, 3]], dtype=np.uint16)
        path = write_dicom(tmp_path / "a.dcm", stored, ModalityLUTSequence=lut)
        np.testing.assert_allclose(grey(read_image(path, [50, 100])), [[0, 1], [0.5, 0.25]], atol=1e-7)

    def test_monochrome1_is_inverted(self, tmp_path: Path) -> None:
        path = write_dicom(tmp_path / "a.dcm", self.stored, PhotometricInterpretation="MONOCHROME1", **self.ct)
        np.testing.assert_allclose(grey(read_image(path, "brain")), [[1, 0.5], [0.25, 0]], atol=1e-7)

    def test_signed_values_stay_negative(self, tmp_path: Path) -> None:
        stored = np.array([[-1350, -600], [150, -975]], dtype=np.int16)
        path = write_dicom(tmp_path / "a.dcm", stored)
        np.testing.assert_allclose(grey(read_image(path, "lung")), [[0, 0.5], [1, 0.25]], atol=1e-6)

    def test_without_a_window_auto_takes_percentiles(self, tmp_path: Path) -> None:
        stored = (np.arange(1001) * 10).astype(np.uint16).reshape(7, 143)
        path = write_dicom(tmp_path / "a.dcm", stored, RescaleSlope=2, RescaleIntercept=-5)
        np.testing.assert_allclose(grey(read_image(path)), np.clip((stored - 50.0) / 9900, 0, 1), atol=1e-6)

    @pytest.mark.parametrize("window", [{}, {"WindowCenter": 40, "WindowWidth": 0}, {"WindowCenter": None}])
    def test_dicom_rule_needs_a_window(self, tmp_path: Path, window: dict[str, Any]) -> None:
        path = write_dicom(tmp_path / "a.dcm", self.stored, **window)
        with pytest.raises(UnreadableImageError, match=r"a\.dcm.*no VOI LUT or window"):
            read_image(path, "dicom")

    def test_padding_is_black_and_outside_percentiles(self, tmp_path: Path) -> None:
        stored = np.array([[-2000, 0], [500, 1000]], dtype=np.int16)
        path = write_dicom(
            tmp_path / "a.dcm",
            stored,
            PixelPaddingValue=-2000,
            PhotometricInterpretation="MONOCHROME1",
        )
        np.testing.assert_allclose(grey(read_image(path, {"percentile": [0, 100]})), [[0, 1], [0.5, 0]], atol=1e-7)

    def test_multi_frame_gives_each_frame(self, tmp_path: Path) -> None:
        stored = np.array([[[0, 100]], [[50, 25]], [[75, 10]]], dtype=np.uint16)
        path = write_dicom(tmp_path / "a.dcm", stored, Rows=1, Columns=2, NumberOfFrames=3)
        refs = list_images(path)
        assert refs == [ImageRef(path, 0), ImageRef(path, 1), ImageRef(path, 2)]
        assert [ref.name for ref in refs] == ["a_slice000", "a_slice001", "a_slice002"]
        images = [grey(read_image(ref, [50, 100])).tolist() for ref in refs]
        np.testing.assert_allclose(images, stored / 100, atol=1e-7)
        assert list_images(path, slices=(1, 3)) == refs[1:]
        with pytest.raises(ValueError, match="holds 3 images"):
            read_image(path)
        with pytest.raises(ValueError, match="no number 3"):
            read_image(ImageRef(path, 3))

    def test_enhanced_frames_use_their_own_groups(self, tmp_path: Path) -> None:
        stored = np.array([[[10, 20]], [[10, 20]]], dtype=np.uint16)
        groups = pydicom.Sequence(
            item(FrameVOILUTSequence=item(WindowCenter=c, WindowWidth=w, VOILUTFunction="LINEAR_EXACT"))[0]
            for c, w in [(40, 40), (30, 40)]
        )
        shared = item(PixelValueTransformationSequence=item(RescaleSlope=2, RescaleIntercept=0))
        path = write_dicom(
            tmp_path / "a.dcm",
            stored,
            Rows=1,
            Columns=2,
            NumberOfFrames=2,
            PerFrameFunctionalGroupsSequence=groups,
            SharedFunctionalGroupsSequence=shared,
        )
        # 20 and 40 under [20, 60] and [10, 50]
        np.testing.assert_allclose(grey(read_image(ImageRef(path, 0))), [[0, 0.5]], atol=1e-7)
        np.testing.assert_allclose(grey(read_image(ImageRef(path, 1))), [[0.25, 0.75]], atol=1e-7)

    def test_enhanced_frames_come_in_the_order_of_their_geometry(self, tmp_path: Path) -> None:
        heights = [10.0, -5.0, 2.5]
        frames = pydicom.Sequence(item(PlanePositionSequence=item(ImagePositionPatient=[0, 0, z]))[0] for z in heights)
        path = write_dicom(
            tmp_path / "a.dcm",
            np.arange(6, dtype=np.uint16).reshape(3, 1, 2),
            Rows=1,
            Columns=2,
            NumberOfFrames=3,
            PerFrameFunctionalGroupsSequence=frames,
            SharedFunctionalGroupsSequence=item(
                PlaneOrientationSequence=item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
            ),
        )
        assert [ref.frame for ref in list_images(path)] == [1, 2, 0]
        assert [ref.frame for ref in list_images(path, slices=(0, 2))] == [1, 2]

    def test_slices_of_a_series_without_window_share_their_percentiles(self, tmp_path: Path) -> None:
        ramp = np.linspace(0, 1000, 100).astype(np.uint16).reshape(10, 10)
        for index, pixels in enumerate((ramp, ramp // 100, ramp * 3)):
            uid = "1.2.3" if index < 2 else "1.2.4"
            write_dicom(tmp_path / f"{index}.dcm", pixels, SeriesInstanceUID=uid, **self.ct)
        values = np.concatenate([ramp, ramp // 100])
        low, high = np.percentile(values, (0.5, 99.5))
        for index, pixels in enumerate((ramp, ramp // 100)):
            for rule in ("auto", "percentile"):
                image = grey(read_image(tmp_path / f"{index}.dcm", rule))
                np.testing.assert_allclose(image, np.clip((pixels - low) / (high - low), 0, 1), atol=1e-5)
        assert grey(read_image(tmp_path / "1.dcm")).max() < 0.02  # nearly air alone: black
        assert grey(read_image(tmp_path / "2.dcm")).max() == 1  # another series

    def test_frames_of_one_file_share_their_percentiles(self, tmp_path: Path) -> None:
        ramp = np.linspace(0, 1000, 100).astype(np.uint16).reshape(10, 10)
        stored = np.stack([ramp, ramp // 100])
        path = write_dicom(tmp_path / "a.dcm", stored, Rows=10, Columns=10, NumberOfFrames=2)
        assert grey(read_image(ImageRef(path, 1))).max() < 0.02

    def test_voi_lut_of_implicit_files_begins_at_a_negative_value(self, tmp_path: Path) -> None:
        table = np.linspace(0, 65535, 2001).astype(np.uint16)
        lut = item(LUTDescriptor=[2001, -1000, 16], LUTData=table.tobytes())
        lut[0]["LUTDescriptor"].VR, lut[0]["LUTData"].VR = "SS", "OW"
        stored = np.array([[24, 524], [1024, 2024]], dtype=np.uint16)  # -1000, -500, 0, 1000 HU
        syntax = pydicom.uid.ImplicitVRLittleEndian
        path = write_dicom(tmp_path / "a.dcm", stored, VOILUTSequence=lut, syntax=syntax, **self.ct)
        np.testing.assert_allclose(grey(read_image(path)), [[0, 0.25], [0.5, 1]], atol=1e-4)

    def test_padding_stored_without_sign_is_padding_of_signed_pixels(self, tmp_path: Path) -> None:
        stored = np.array([[-2000, 0], [500, 1000]], dtype=np.int16)
        path = write_dicom(tmp_path / "a.dcm", stored)
        dataset = pydicom.dcmread(path)
        dataset.add_new("PixelPaddingValue", "US", 2**16 - 2000)
        dataset.save_as(path)
        np.testing.assert_allclose(grey(read_image(path, {"percentile": [0, 100]})), [[0, 0], [0.5, 1]], atol=1e-7)

    @pytest.mark.parametrize("rule", ["brain", [40, 80], "auto"])
    def test_eight_bit_captures_have_no_hounsfield_units(self, tmp_path: Path, rule: Any) -> None:
        path = write_dicom(tmp_path / "a.dcm", RAMP, sop_class="1.2.840.10008.5.1.4.1.1.7")
        np.testing.assert_allclose(grey(read_image(path, rule)), RAMP / 255, atol=1e-6)

    def test_eight_bits_with_a_rescale_are_hounsfield_units(self, tmp_path: Path) -> None:
        path = write_dicom(tmp_path / "a.dcm", RAMP, RescaleSlope=1, RescaleIntercept=-100)
        np.testing.assert_allclose(grey(read_image(path, [40, 80])), np.clip((RAMP - 100.0) / 80, 0, 1), atol=1e-6)

    def test_more_pixels_than_allowed_are_refused_before_decoding(self, tmp_path: Path) -> None:
        path = write_dicom(tmp_path / "a.dcm", np.zeros((1, 2), np.uint8), Rows=20000, Columns=20000, NumberOfFrames=9)
        with pytest.raises(UnreadableImageError, match=r"a\.dcm: holds 3600000000 pixels, more than max_pixels="):
            read_image(ImageRef(path, 0))
        path = write_dicom(tmp_path / "b.dcm", RAMP, **self.ct)
        with pytest.raises(UnreadableImageError, match="holds 256 pixels, more than max_pixels=255; raise max_pixels"):
            read_image(ImageRef(path, max_pixels=255))
        assert read_image(ImageRef(path, max_pixels=256)).shape == (3, 16, 16)

    def test_deflated_bomb_is_refused_without_inflating_it(self, tmp_path: Path) -> None:
        path = write_dicom(tmp_path / "a.dcm", RAMP, syntax=pydicom.uid.DeflatedExplicitVRLittleEndian)
        np.testing.assert_allclose(grey(read_image(path)), RAMP / 255, atol=1e-6)
        content = path.read_bytes()
        start = 144 + int.from_bytes(content[140:144], "little")
        inflated = zlib.decompress(content[start:], -15)
        deflater = zlib.compressobj(9, wbits=-15)
        bomb = deflater.compress(inflated[:-256])
        for _ in range(300):
            bomb += deflater.compress(bytes(2**20))
        path.write_bytes(content[:start] + bomb + deflater.flush())
        assert path.stat().st_size < 400_000
        tracemalloc.start()
        (ref,) = list_images(path)
        with pytest.raises(UnreadableImageError, match=r"a\.dcm: holds \d+ pixels, more than max_pixels="):
            read_image(ref)
        assert tracemalloc.get_traced_memory()[1] < 50e6
        tracemalloc.stop()

    def test_burned_in_text_is_suspected_by_flag_modality_and_class(self, tmp_path: Path) -> None:
        cases = {
            "flag.dcm": ({"BurnedInAnnotation": "YES"}, True),
            "ultrasound.dcm": ({"Modality": "US"}, True),
            "capture.dcm": ({"sop_class": "1.2.840.10008.5.1.4.1.1.7"}, True),
            "clean.dcm": ({"Modality": "US", "BurnedInAnnotation": "NO"}, False),
            "ct.dcm": ({"Modality": "CT"}, False),
        }
        for name, (attributes, expected) in cases.items():
            assert dicom_header(ImageRef(write_dicom(tmp_path / name, RAMP, **attributes))).burned_in == expected, name

    def test_rgb_is_taken_as_it_is(self, tmp_path: Path) -> None:
        path = write_dicom(
            tmp_path / "a.dcm",
            RGB,
            SamplesPerPixel=3,
            PhotometricInterpretation="RGB",
            PlanarConfiguration=0,
        )
        np.testing.assert_allclose(read_image(path).permute(1, 2, 0), RGB / 255, atol=1e-7)

    def test_ybr_becomes_rgb(self, tmp_path: Path) -> None:
        ybr = np.array([[[76, 85, 255], [150, 44, 21]], [[29, 255, 107], [128, 128, 128]]], dtype=np.uint8)
        path = write_dicom(
            tmp_path / "a.dcm",
            ybr,
            SamplesPerPixel=3,
            PhotometricInterpretation="YBR_FULL",
            PlanarConfiguration=0,
        )
        expected = [[[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [0.502, 0.502, 0.502]]]
        np.testing.assert_allclose(read_image(path).permute(1, 2, 0), expected, atol=0.01)

    def test_palette_colour_uses_the_files_table(self, tmp_path: Path) -> None:
        tables = {
            f"{name}PaletteColorLookupTable{part}": value
            for name, data in (("Red", b"\x00\xff"), ("Green", b"\x33\x00"), ("Blue", b"\x00\x66"))
            for part, value in (("Descriptor", [2, 0, 8]), ("Data", data))
        }
        stored = np.array([[0, 1]], dtype=np.uint8)
        path = write_dicom(tmp_path / "a.dcm", stored, PhotometricInterpretation="PALETTE COLOR", **tables)
        np.testing.assert_allclose(read_image(path)[:, 0].T, [[0, 0.2, 0], [1, 0, 0.4]], atol=1e-7)

    def test_jpeg_compressed_colour_equals_the_jpeg(self, tmp_path: Path) -> None:
        from pydicom.encaps import encapsulate
        from pydicom.uid import JPEGBaseline8Bit

        smooth = np.stack(np.broadcast_arrays(*np.ogrid[0:32, 0:32], 100), axis=-1).astype(np.uint8) * [4, 4, 1]
        buffer = io.BytesIO()
        Image.fromarray(smooth.astype(np.uint8)).save(buffer, "JPEG", quality=95, subsampling=0)
        path = write_dicom(
            tmp_path / "a.dcm",
            smooth.astype(np.uint8),
            SamplesPerPixel=3,
            PhotometricInterpretation="YBR_FULL",
            PlanarConfiguration=0,
            PixelData=encapsulate([buffer.getvalue()]),
            syntax=JPEGBaseline8Bit,
        )
        expected = np.array(Image.open(buffer)) / 255
        np.testing.assert_allclose(read_image(path).permute(1, 2, 0), expected, atol=2 / 255)

    def test_run_length_encoding_is_read(self, tmp_path: Path) -> None:
        from pydicom.uid import RLELossless

        path = write_dicom(tmp_path / "a.dcm", self.stored, **self.ct)
        dataset = pydicom.dcmread(path)
        dataset.compress(RLELossless)
        dataset.save_as(tmp_path / "rle.dcm")
        np.testing.assert_allclose(grey(read_image(tmp_path / "rle.dcm", "brain")), [[0, 0.5], [0.75, 1]], atol=1e-7)

    def test_missing_decoder_names_the_extra(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from pydicom.encaps import encapsulate
        from pydicom.pixels.decoders import JPEGLosslessSV1Decoder
        from pydicom.uid import JPEGLosslessSV1

        monkeypatch.setattr(JPEGLosslessSV1Decoder, "_available", {})
        path = write_dicom(
            tmp_path / "a.dcm",
            self.stored,
            PixelData=encapsulate([b"\xff\xd8\xff\xd9"]),
            syntax=JPEGLosslessSV1,
        )
        with pytest.raises(UnreadableImageError, match=r'no decoder.*pip install "anomalib-mvfa\[medical\]"'):
            read_image(path)

    def test_file_without_suffix_is_known_by_its_preamble(self, tmp_path: Path) -> None:
        path = write_dicom(tmp_path / "1.2.840.77", self.stored, **self.ct)
        (tmp_path / "notes.txt").write_text("no image" * 40)
        refs = list_images(tmp_path)
        assert refs == [ImageRef(path)]
        assert refs[0].name == "1.2.840.77"
        np.testing.assert_allclose(grey(read_image(refs[0], "brain")), [[0, 0.5], [0.75, 1]], atol=1e-7)


class TestSeriesOrder:
    """Order of the files of a DICOM series."""

    def series(self, folder: Path, places: dict[str, dict[str, Any]]) -> list[str]:
        """Write one single-pixel file a name and return the names in listed order."""
        for name, attributes in places.items():
            write_dicom(folder / name, np.zeros((1, 2), np.uint16), **{"SeriesInstanceUID": "1.2.3", **attributes})
        return [ref.path.name for ref in list_images(folder)]

    def test_geometry_wins_over_instance_number_and_name(self, tmp_path: Path) -> None:
        axial = {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
        heights = {"a.dcm": (10.0, 1), "b.dcm": (-20.0, 2), "c.dcm": (100.0, 3), "d.dcm": (2.5, 4)}
        files = {
            name: {"ImagePositionPatient": [5, 7, z], "InstanceNumber": number, **axial}
            for name, (z, number) in heights.items()
        }
        assert self.series(tmp_path, files) == ["b.dcm", "d.dcm", "a.dcm", "c.dcm"]

    def test_positions_are_projected_on_the_normal(self, tmp_path: Path) -> None:
        # plane tilted about x: normal (0, -s, c); raw z alone would order b before a
        s, c = np.sin(0.5), np.cos(0.5)
        tilted = {"ImageOrientationPatient": [1, 0, 0, 0, round(c, 6), round(s, 6)]}
        files = {
            "a.dcm": {"ImagePositionPatient": [0, 10.0, 1.0], **tilted},  # -10 s + c < 0
            "b.dcm": {"ImagePositionPatient": [0, 0.0, 0.0], **tilted},
        }
        assert self.series(tmp_path, files) == ["a.dcm", "b.dcm"]

    def test_instance_number_stands_in_for_geometry(self, tmp_path: Path) -> None:
        files = {"a.dcm": {"InstanceNumber": 10}, "b.dcm": {"InstanceNumber": 9}, "c.dcm": {"InstanceNumber": 1}}
        files["a.dcm"] |= {"ImagePositionPatient": [0, 0, 0], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
        assert self.series(tmp_path, files) == ["c.dcm", "b.dcm", "a.dcm"]

    def test_name_stands_in_for_both(self, tmp_path: Path) -> None:
        assert self.series(tmp_path, {"b.dcm": {"InstanceNumber": 1}, "a.dcm": {}}) == ["a.dcm", "b.dcm"]

    def test_series_in_one_folder_stay_together(self, tmp_path: Path) -> None:
        files = {
            "a.dcm": {"SeriesInstanceUID": "1.1", "InstanceNumber": 2},
            "b.dcm": {"SeriesInstanceUID": "1.2", "InstanceNumber": 1},
            "c.dcm": {"SeriesInstanceUID": "1.1", "InstanceNumber": 1},
        }
        assert self.series(tmp_path, files) == ["c.dcm", "a.dcm", "b.dcm"]


class TestVolume:
    """NIfTI volumes."""

    shape = (4, 5, 6)
    ras = np.diag([2.0, 3.0, 4.0, 1.0])

    @pytest.fixture
    def data(self) -> np.ndarray:
        """Return voxels that tell their own index: 100 x + 10 y + z."""
        x, y, z = np.ogrid[0:4, 0:5, 0:6]
        return (100 * x + 10 * y + z).astype(np.int16)

    def lps(self, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Store the same anatomy with x and y reversed."""
        affine = np.array([[-2, 0, 0, 6], [0, -3, 0, 12], [0, 0, 4, 0], [0, 0, 0, 1]], dtype=float)
        return data[::-1, ::-1], affine

    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_ras_and_lps_files_give_the_same_slices(
        self,
        tmp_path: Path,
        data: np.ndarray,
        suffix: str,
        axis: int,
    ) -> None:
        ras = write_nifti(tmp_path / f"ras{suffix}", data, self.ras)
        lps = write_nifti(tmp_path / f"lps{suffix}", *self.lps(data))
        np.testing.assert_allclose(read_volume(lps)[1], self.ras)
        for first, second in zip(list_images(ras, axis=axis), list_images(lps, axis=axis), strict=True):
            assert torch.equal(read_image(first), read_image(second))

    def test_axial_slice_has_anterior_up_and_the_patients_right_on_the_left(
        self,
        tmp_path: Path,
        data: np.ndarray,
    ) -> None:
        path = write_nifti(tmp_path / "a.nii", data, self.ras)
        image = grey(read_image(ImageRef(path, 2), [500, 1000]))
        # row i is y = 4 - i, column j is x = 3 - j
        expected = [[(100 * (3 - j) + 10 * (4 - i) + 2) / 1000 for j in range(4)] for i in range(5)]
        np.testing.assert_allclose(image, expected, atol=1e-6)

    def test_coronal_and_sagittal_slices_have_superior_up(self, tmp_path: Path, data: np.ndarray) -> None:
        path = write_nifti(tmp_path / "a.nii", data, self.ras)
        coronal = grey(read_image(ImageRef(path, 1, axis=1), [500, 1000]))
        expected = [[(100 * (3 - j) + 10 + (5 - i)) / 1000 for j in range(4)] for i in range(6)]
        np.testing.assert_allclose(coronal, expected, atol=1e-6)
        sagittal = grey(read_image(ImageRef(path, 1, axis=0), [500, 1000]))
        expected = [[(100 + 10 * (4 - j) + (5 - i)) / 1000 for j in range(5)] for i in range(6)]
        np.testing.assert_allclose(sagittal, expected, atol=1e-6)

    def test_percentiles_are_those_of_the_volume(self, tmp_path: Path) -> None:
        data = np.arange(1001, dtype=np.float32).reshape(7, 11, 13) * 10
        path = write_nifti(tmp_path / "a.nii", data)
        expected = np.clip((data[::-1, ::-1, 0].T - 50) / 9900, 0, 1)
        np.testing.assert_allclose(grey(read_image(ImageRef(path, 0))), expected, atol=1e-6)

    def test_an_empty_slice_can_be_read_and_an_empty_volume_is_refused(self, tmp_path: Path) -> None:
        empty = write_nifti(tmp_path / "a.nii", np.zeros((4, 5, 6), np.int16))
        assert not read_image(ImageRef(empty, 3)).any()
        with pytest.raises(UnreadableImageError, match="all its slices are empty"):
            read_image(empty)
        flat = write_nifti(tmp_path / "b.nii", np.zeros((4, 5, 1), np.int16))
        assert not read_image(flat).any()

    def test_slope_and_intercept_are_applied(self, tmp_path: Path, data: np.ndarray) -> None:
        image = nibabel.Nifti1Image(data, self.ras)
        image.header.set_slope_inter(0.5, -7)
        nibabel.save(image, tmp_path / "a.nii")
        stored = np.asarray(nibabel.load(tmp_path / "a.nii").dataobj.get_unscaled())
        voxels, _ = read_volume(tmp_path / "a.nii")
        np.testing.assert_allclose(voxels, stored * 0.5 - 7)
        assert voxels.dtype == np.float32

    def test_a_volume_of_four_dimensions_is_refused_until_one_is_chosen(self, tmp_path: Path, data: np.ndarray) -> None:
        path = write_nifti(tmp_path / "a.nii.gz", np.stack([data, data + 500, data + 1000], axis=-1))
        (ref,) = list_images(path)
        with pytest.raises(UnreadableImageError, match=r"a\.nii\.gz: holds 3 volumes; choose one with .* volume"):
            read_image(ref)
        with pytest.raises(UnreadableImageError, match="numbered from 0; there is no number 3"):
            read_volume(path, volume=3)
        np.testing.assert_array_equal(read_volume(path, volume=1)[0], data + 500)
        refs = list_images(path, volume=2)
        assert [key(ref) for ref in refs] == [f"a.nii.gz#{index}" for index in range(6)]
        np.testing.assert_allclose(grey(read_image(refs[4], [1000, 2000])).max(), (data[..., 4].max() + 1000) / 2000)

    def test_a_chosen_volume_leaves_files_of_three_dimensions_alone(self, tmp_path: Path, data: np.ndarray) -> None:
        np.testing.assert_array_equal(read_volume(write_nifti(tmp_path / "a.nii", data), volume=2)[0], data)

    @pytest.mark.parametrize("suffix", [".mha", ".nrrd", ".mhd", ".nhdr"])
    def test_metaimage_and_nrrd_equal_the_nifti_file_of_the_same_anatomy(
        self, tmp_path: Path, data: np.ndarray, suffix: str
    ) -> None:
        itk = pytest.importorskip("SimpleITK")
        affine = np.array([[0, -3, 0, 12], [2, 0, 0, 6], [0, 0.0, 4, -7], [0, 0, 0, 1]])  # axes swapped and reversed
        nifti = write_nifti(tmp_path / "a.nii.gz", data, affine)
        itk.WriteImage(itk.ReadImage(str(nifti)), str(tmp_path / f"a{suffix}"))
        written, expected = read_volume(tmp_path / f"a{suffix}"), read_volume(nifti)
        np.testing.assert_array_equal(written[0], expected[0])
        np.testing.assert_allclose(written[1], expected[1], atol=1e-5)
        assert same_grid(tmp_path / f"a{suffix}", nifti)
        refs = [list_images(tmp_path / name, axis=1) for name in (f"a{suffix}", "a.nii.gz")]
        for first, second in zip(*refs, strict=True):
            assert torch.equal(read_image(first), read_image(second))
        write_volume(tmp_path / "map.nii.gz", written[0], like=tmp_path / f"a{suffix}")
        np.testing.assert_allclose(read_volume(tmp_path / "map.nii.gz")[1], expected[1], atol=1e-5)
        np.testing.assert_array_equal(nibabel.load(tmp_path / "map.nii.gz").get_fdata(), data)

    def test_metaimage_of_vectors_and_several_volumes(self, tmp_path: Path, data: np.ndarray) -> None:
        itk = pytest.importorskip("SimpleITK")
        vectors = itk.GetImageFromArray(np.ones((3, 4, 5, 3), np.float32), isVector=True)
        itk.WriteImage(vectors, str(tmp_path / "v.mha"))
        with pytest.raises(UnreadableImageError, match=r"v\.mha: its voxels are not single real numbers"):
            read_volume(tmp_path / "v.mha")
        series = itk.JoinSeries([itk.GetImageFromArray((data + 500 * n).T) for n in range(3)])
        itk.WriteImage(series, str(tmp_path / "s.nrrd"))
        with pytest.raises(UnreadableImageError, match="holds 3 volumes"):
            read_volume(tmp_path / "s.nrrd")
        np.testing.assert_array_equal(read_volume(tmp_path / "s.nrrd", volume=2)[0], data[::-1, ::-1] + 1000)

    def test_analyze_is_read_by_its_header_file(self, tmp_path: Path, data: np.ndarray) -> None:
        nibabel.save(nibabel.AnalyzeImage(data, np.diag([-2.0, 3, 4, 1])), tmp_path / "a.img")
        assert [ref.path.name for ref in list_images(tmp_path)] == ["a.hdr"] * 6
        np.testing.assert_array_equal(read_volume(tmp_path / "a.hdr")[0], data[::-1])

    def test_empty_slices_are_skipped(self, tmp_path: Path) -> None:
        data = np.zeros((8, 8, 6), dtype=np.float32)
        data[2:6, 2:6, 2:5] = 1000
        data[0, 0, 1] = 5  # noise, 0.5 % of the foreground
        data[:, :, 5] = 300  # constant
        path = write_nifti(tmp_path / "a.nii.gz", data)
        refs = list_images(path)
        assert [ref.frame for ref in refs] == [2, 3, 4]
        assert [ref.name for ref in refs] == ["a_slice002", "a_slice003", "a_slice004"]
        assert [ref.frame for ref in list_images(path, slices=(3, 6))] == [3, 4]
        assert [ref.frame for ref in list_images(path, axis=0)] == list(range(8))

    def test_single_lesion_voxel_keeps_its_slice(self, tmp_path: Path) -> None:
        data = np.zeros((8, 8, 3), dtype=np.float32)
        data[4, 4, 1] = 1
        assert [ref.frame for ref in list_images(write_nifti(tmp_path / "a.nii", data))] == [1]

    def test_a_compressed_volume_of_too_many_voxels_is_refused_before_it_is_inflated(self, tmp_path: Path) -> None:
        path = write_nifti(tmp_path / "bomb.nii.gz", np.zeros((600, 600, 600), np.uint8))
        assert path.stat().st_size < 1_000_000
        tracemalloc.start()
        with pytest.raises(UnreadableImageError, match=r"bomb\.nii\.gz: holds 216000000 pixels, more than max_pixels="):
            read_volume(path)
        assert tracemalloc.get_traced_memory()[1] < 50e6
        tracemalloc.stop()
        small = write_nifti(tmp_path / "small.nii.gz", np.zeros((6, 6, 6), np.uint8))
        with pytest.raises(UnreadableImageError, match="holds 216 pixels, more than max_pixels=215; raise max_pixels"):
            read_volume(small, max_pixels=215)
        assert read_volume(small, max_pixels=216)[0].shape == (6, 6, 6)

    def test_nan_voxels_become_the_minimum_and_infinite_ones_the_maximum(self, tmp_path: Path) -> None:
        data = np.array([-5, np.nan, np.inf, 10], dtype=np.float32).reshape(2, 2, 1)
        voxels, _ = read_volume(write_nifti(tmp_path / "a.nii", data))
        np.testing.assert_array_equal(voxels.ravel(), [-5, -5, 10, 10])

    def test_two_dimensional_file_is_one_image(self, tmp_path: Path) -> None:
        path = write_nifti(tmp_path / "a.nii", np.array([[0, 1], [2, 4]], dtype=np.float32))
        np.testing.assert_allclose(grey(read_image(path, [2, 4])), [[1, 0.25], [0.5, 0]])

    def test_volume_is_loaded_once_and_again_when_rewritten(
        self,
        tmp_path: Path,
        data: np.ndarray,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        loads = []
        load = nibabel.load
        monkeypatch.setattr(nibabel, "load", lambda path: loads.append(path) or load(path))
        path = write_nifti(tmp_path / "a.nii", data, self.ras)
        for ref in list_images(path):
            read_image(ref)
        assert len(loads) == 1
        write_nifti(path, data + np.int16(1), self.ras)
        os.utime(path, ns=(1, 1))
        np.testing.assert_array_equal(read_volume(path)[0], data + 1)
        assert len(loads) == 2

    def test_written_volume_overlays_its_input(self, tmp_path: Path, data: np.ndarray) -> None:
        stored, affine = self.lps(data)
        permuted = stored.transpose(2, 0, 1), affine[:, [2, 0, 1, 3]]
        like = write_nifti(tmp_path / "like.nii.gz", *permuted)
        header = nibabel.load(like)
        header.header["descrip"] = PATIENT
        header.header.set_xyzt_units("mm")
        nibabel.save(header, like)
        voxels, _ = read_volume(like)
        np.testing.assert_array_equal(voxels, data)
        write_volume(tmp_path / "out" / "map.nii.gz", voxels.astype(np.float64) * 2, like)
        written = nibabel.load(tmp_path / "out" / "map.nii.gz")
        np.testing.assert_allclose(written.affine, nibabel.load(like).affine)
        np.testing.assert_array_equal(written.get_fdata(), permuted[0] * 2.0)
        assert written.get_data_dtype() == np.float32
        assert written.header.get_xyzt_units()[0] == "mm"
        assert PATIENT.encode() not in written.header.binaryblock

    def test_map_lands_where_its_slice_came_from(self, tmp_path: Path, data: np.ndarray) -> None:
        like = write_nifti(tmp_path / "like.nii", *self.lps(data))
        volume = np.zeros(self.shape, dtype=np.float32)
        for ref in list_images(like):
            volume_slice(volume, ref.frame)[...] = grey(read_image(ref, [500, 1000])) * 1000
        write_volume(tmp_path / "map.nii", volume, like)
        np.testing.assert_allclose(nibabel.load(tmp_path / "map.nii").get_fdata(), self.lps(data)[0], atol=1e-3)

    @pytest.mark.parametrize("shape", [(5, 4, 6), (4, 5), (4, 5, 6, 1)])
    def test_volume_of_another_shape_is_not_written(
        self,
        tmp_path: Path,
        data: np.ndarray,
        shape: tuple[int, ...],
    ) -> None:
        like = write_nifti(tmp_path / "like.nii", data)
        with pytest.raises(ValueError, match=r"like\.nii"):
            write_volume(tmp_path / "map.nii", np.zeros(shape), like)
        with pytest.raises(ValueError, match=r"\.nii or \.nii\.gz"):
            write_volume(tmp_path / "map.png", data, like)


class TestListing:
    """Folders."""

    def test_nested_folders_of_mixed_formats_come_sorted(self, tmp_path: Path) -> None:
        for name in ("b/2.png", "b/1.JPG", "a.tif", ".hidden.png", ".cache/x.png", "c/readme.md"):
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            if path.suffix == ".md":
                path.write_text("text")
            else:
                Image.fromarray(RAMP).save(path)
        write_dicom(tmp_path / "b" / "scan.dcm", TestDicom.stored)
        write_nifti(tmp_path / "v.nii.gz", np.arange(8, dtype=np.float32).reshape(2, 2, 2))
        refs = list_images(tmp_path)
        keys = ["a.tif", "b/1.JPG", "b/2.png", "b/scan.dcm", "v.nii.gz#0", "v.nii.gz#1"]
        assert [key(ref) for ref in refs] == keys
        assert [ref.name for ref in refs] == ["a", "b/1", "b/2", "b/scan", "v_slice000", "v_slice001"]
        assert all(read_image(ref).shape[0] == 3 for ref in refs)

    def test_linked_folders_are_followed_once(self, tmp_path: Path) -> None:
        Image.fromarray(RAMP).save(tmp_path / "a.png")
        data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
        (data / "sub").mkdir(parents=True)
        elsewhere.mkdir()
        Image.fromarray(RAMP).save(data / "sub" / "a.png")
        Image.fromarray(RAMP).save(elsewhere / "b.png")
        (data / "sub" / "loop").symlink_to(data, target_is_directory=True)
        (data / "again").symlink_to(data / "sub", target_is_directory=True)
        (data / "linked").symlink_to(elsewhere, target_is_directory=True)
        (data / "self.png").symlink_to(data / "self.png")
        (data / "gone.png").symlink_to(data / "nowhere.png")
        assert [key(ref) for ref in list_images(data)] == ["linked/b.png", "sub/a.png"]

    def test_listing_dicom_decodes_no_pixels(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_dicom(tmp_path / "a.dcm", np.zeros((512, 512), np.uint16))
        calls = []
        read = pydicom.dcmread
        monkeypatch.setattr(pydicom, "dcmread", lambda path, **options: calls.append(options) or read(path, **options))
        assert list_images(tmp_path) == [ImageRef(path)]
        assert [options["stop_before_pixels"] for options in calls] == [True]

    def test_dicom_objects_that_are_no_images_are_left_out(self, tmp_path: Path) -> None:
        write_dicom(tmp_path / "DICOMDIR", None, sop_class="1.2.840.10008.1.3.10")
        write_dicom(tmp_path / "report.dcm", None, sop_class="1.2.840.10008.5.1.4.1.1.88.11")
        for name in ("RTDoseStorage", "SegmentationStorage", "ParametricMapStorage"):
            write_dicom(tmp_path / f"{name}.dcm", TestDicom.stored, sop_class=getattr(pydicom.uid, name))
        names = (
            "CTImageStorage",
            "SecondaryCaptureImageStorage",
            "EnhancedUSVolumeStorage",
            "DigitalXRayImageStorageForPresentation",
        )
        images = [
            write_dicom(tmp_path / f"{name}.dcm", TestDicom.stored, sop_class=getattr(pydicom.uid, name))
            for name in names
        ]
        images.append(write_dicom(tmp_path / "private.dcm", TestDicom.stored, sop_class="1.2.3.4.5"))
        assert {ref.path for ref in list_images(tmp_path)} == set(images)

    def test_unreadable_files_are_listed_and_refused_on_reading(self, tmp_path: Path) -> None:
        for name in ("a.dcm", "b.nii.gz", "c.png"):
            (tmp_path / name).write_bytes(b"rubbish" * 50)
        refs = list_images(tmp_path)
        assert [key(ref) for ref in refs] == ["a.dcm", "b.nii.gz", "c.png"]
        for ref in refs:
            with pytest.raises(UnreadableImageError):
                read_image(ref)

    def test_volume_of_empty_slices_is_listed_and_says_so(self, tmp_path: Path) -> None:
        (ref,) = list_images(write_nifti(tmp_path / "flat.nii", np.ones((4, 4, 3), np.float32)))
        assert key(ref) == "flat.nii"
        with pytest.raises(UnreadableImageError, match=r"flat\.nii: all its slices are empty"):
            read_image(ref)

    def test_missing_and_empty_folders_name_the_suffixes(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="nowhere") as missing:
            list_images(tmp_path / "nowhere")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match="empty") as empty:
            list_images(tmp_path / "empty")
        for suffix in IMAGE_SUFFIXES:
            assert suffix in str(missing.value)
            assert suffix in str(empty.value)

    def test_names_of_files_outside_the_root_stay_inside_the_output_folder(self, tmp_path: Path) -> None:
        root = tmp_path / "data"
        assert ImageRef(root / "../outside/a.png", root=root).name == "a"
        assert ImageRef(tmp_path / "elsewhere/b.dcm", root=root).name == "b"
        assert ImageRef(root / "case/../other/c.png", root=root).name == "other/c"

    def test_axis_is_checked(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="axis"):
            list_images(tmp_path, axis=3)


class TestMask:
    """Masks."""

    def test_every_value_above_zero_is_foreground(self, tmp_path: Path) -> None:
        expected = np.array([[False, True], [True, False]])
        for name, pixels in {
            "bytes.png": np.array([[0, 1], [255, 0]], np.uint8),
            "words.png": np.array([[0, 1], [65535, 0]], np.uint16),
            "colour.png": np.array([[[0, 0, 0], [1, 0, 0]], [[0, 0, 9], [0, 0, 0]]], np.uint8),
            "bits.png": expected,
        }.items():
            Image.fromarray(pixels).save(tmp_path / name)
            mask = read_mask(tmp_path / name)
            assert mask.dtype == torch.bool
            np.testing.assert_array_equal(mask, expected)

    def test_jpeg_ringing_is_no_foreground(self, tmp_path: Path) -> None:
        expected = np.zeros((32, 32), dtype=bool)
        expected[9:20, 11:23] = True
        Image.fromarray(expected.astype(np.uint8) * 255).save(tmp_path / "a.jpg", quality=60)
        assert (np.array(Image.open(tmp_path / "a.jpg")) > 0).sum() > expected.sum()
        np.testing.assert_array_equal(read_mask(tmp_path / "a.jpg"), expected)

    def test_dicom_mask_ignores_a_rescale(self, tmp_path: Path) -> None:
        stored = np.array([[0, 1], [2, 0]], np.uint8)
        path = write_dicom(tmp_path / "a.dcm", stored, RescaleSlope=1, RescaleIntercept=-1024)
        np.testing.assert_array_equal(read_mask(path), stored > 0)

    def test_volume_mask_lies_on_its_image(self, tmp_path: Path) -> None:
        mask = np.zeros((4, 5, 6), dtype=np.uint8)
        mask[3, 4, 2] = 1  # right, anterior: top left
        path = write_nifti(tmp_path / "a.nii.gz", mask)
        expected = np.zeros((5, 4), dtype=bool)
        expected[0, 0] = True
        np.testing.assert_array_equal(read_mask(ImageRef(path, 2)), expected)


class TestUnreadable:
    """Files that give no image."""

    @staticmethod
    def cases(folder: Path) -> dict[str, Path]:
        """Write one file of every kind of damage."""
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        cases = {}
        for suffix in ("png", "jpg", "bmp", "tif", "webp"):
            whole = io.BytesIO()
            Image.fromarray(noise).save(whole, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix))
            cases[f"truncated {suffix}"] = folder / f"cut.{suffix}"
            cases[f"truncated {suffix}"].write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
        for suffix in ("png", "dcm", "nii", "nii.gz"):
            cases[f"zero-byte {suffix}"] = folder / f"zero.{suffix}"
            cases[f"zero-byte {suffix}"].touch()
            cases[f"text {suffix}"] = folder / f"text.{suffix}"
            cases[f"text {suffix}"].write_text(PATIENT * 100)
        whole_dicom = write_dicom(folder / "whole.dcm", noise[..., 0]).read_bytes()
        for kept in (140, 300, len(whole_dicom) - 1000):
            cases[f"truncated dcm {kept}"] = folder / f"cut{kept}.dcm"
            cases[f"truncated dcm {kept}"].write_bytes(whole_dicom[:kept])
        for suffix in ("nii", "nii.gz"):
            whole_volume = write_nifti(folder / f"whole.{suffix}", noise).read_bytes()
            for kept in (100, len(whole_volume) - 1000):
                cases[f"truncated {suffix} {kept}"] = folder / f"cut{kept}.{suffix}"
                cases[f"truncated {suffix} {kept}"].write_bytes(whole_volume[:kept])
        cases["no pixels"] = write_dicom(folder / "empty.dcm", None, Rows=2, Columns=2)
        cases["contradictory size"] = write_dicom(folder / "size.dcm", TestDicom.stored, Rows=500)
        cases["bad number"] = write_dicom(folder / "number.dcm", TestDicom.stored, NumberOfFrames=1)
        number_of_frames = b"\x28\x00\x08\x00IS\x02\x00"
        sound = cases["bad number"].read_bytes()
        assert number_of_frames + b"1 " in sound
        cases["bad number"].write_bytes(sound.replace(number_of_frames + b"1 ", number_of_frames + b"x "))
        cases["nan volume"] = write_nifti(folder / "nan.nii", np.full((2, 2, 2), np.nan, dtype=np.float32))
        cases["infinite volume"] = write_nifti(folder / "inf.nii", np.full((2, 2, 2), np.inf, dtype=np.float32))
        cases["complex volume"] = write_nifti(folder / "complex.nii", np.ones((2, 2, 2), dtype=np.complex64))
        cases["nan image"] = folder / "nan.tif"
        Image.fromarray(np.full((2, 2), np.nan, dtype=np.float32)).save(cases["nan image"])
        return cases

    def test_every_damage_is_told_with_path_and_reason(
        self,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        for case, path in self.cases(tmp_path).items():
            with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.DEBUG):
                warnings.simplefilter("always")
                with pytest.raises(UnreadableImageError) as error:
                    read_image(ImageRef(path, 0))
            assert not caught, case
            assert error.value.path == path, case
            assert str(error.value) == f"{path}: {error.value.reason}", case
            assert error.value.__suppress_context__ or error.value.__context__ is None, case
            for secret in ("Doe", "Jane", "4711"):
                assert secret not in str(error.value), case
                assert secret not in caplog.text, case

    def test_reasons_tell_the_cause(self, tmp_path: Path) -> None:
        cases = self.cases(tmp_path)
        for case, reason in {
            "truncated png": "truncated",
            "zero-byte png": "empty",
            "zero-byte dcm": "empty",
            "text png": "not an image",
            "text dcm": "not a DICOM file",
            "text nii": "not a NIfTI or Analyze file",
            "no pixels": "no pixel data",
            "truncated dcm 300": "truncated|no pixel data",
            "nan volume": "no finite value",
            "complex volume": "real numbers",
        }.items():
            with pytest.raises(UnreadableImageError, match=reason):
                read_image(ImageRef(cases[case], 0))

    def test_warnings_of_odd_headers_stay_inside(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path = write_dicom(tmp_path / "a.dcm", TestDicom.stored, SeriesInstanceUID="1.2")
        odd = path.read_bytes().replace(b"UI\x04\x001.2\x00", b"UI\x04\x00DOE\x00")
        path.write_bytes(odd)
        with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.DEBUG):
            warnings.simplefilter("always")
            (ref,) = list_images(path)
            read_image(ref)
        assert b"DOE" in odd
        assert not caught
        assert "DOE" not in caplog.text

    @pytest.mark.parametrize("factor", [1.5, 3.0])
    def test_decompression_bomb_is_refused(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        factor: float,
    ) -> None:
        Image.fromarray(RAMP).save(tmp_path / "a.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(256 / factor))
        with pytest.raises(UnreadableImageError, match="MAX_IMAGE_PIXELS"):
            read_image(tmp_path / "a.png")

    def test_permission_denied_is_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "a.png"
        Image.fromarray(RAMP).save(path)

        def refuse(*_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(UnreadableImageError, match="permission denied"):
            read_image(path)

    def test_folder_is_no_image(self, tmp_path: Path) -> None:
        with pytest.raises(UnreadableImageError, match="directory"):
            read_image(tmp_path)

    def test_missing_file_is_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"gone\.png"):
            read_image(tmp_path / "gone.png")

    def test_error_survives_pickling(self) -> None:
        error = pickle.loads(pickle.dumps(UnreadableImageError("a.png", "the file is empty")))
        assert (error.path, error.reason) == (Path("a.png"), "the file is empty")

    @pytest.mark.parametrize(("module", "name"), [("pydicom", "a.dcm"), ("nibabel", "a.nii")])
    def test_missing_reader_names_the_extra(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        module: str,
        name: str,
    ) -> None:
        write_dicom(tmp_path / "a.dcm", TestDicom.stored)
        write_nifti(tmp_path / "a.nii", np.ones((2, 2, 2), dtype=np.float32))
        for loaded in [entry for entry in sys.modules if entry.partition(".")[0] == module]:
            monkeypatch.setitem(sys.modules, loaded, None)
        for function in (read_image, list_images):
            with pytest.raises(ImportError, match=r'pip install "anomalib-mvfa\[medical\]"'):
                function(tmp_path / name)


class TestGridsAndPatients:
    """What is told from headers alone."""

    def test_grids_are_compared_in_the_canonical_orientation(self, tmp_path: Path) -> None:
        affine = np.diag([-2.0, 3, 4, 1])
        affine[:3, 3] = [9, 1, 2]
        first = write_nifti(tmp_path / "a.nii", np.zeros((5, 6, 7), np.float32), affine)
        turned = nibabel.as_closest_canonical(nibabel.load(first))
        nibabel.save(turned, tmp_path / "b.nii.gz")
        moved = affine.copy()
        moved[0, 3] += 1
        shifted = write_nifti(tmp_path / "c.nii", np.zeros((5, 6, 7), np.float32), moved)
        shorter = write_nifti(tmp_path / "d.nii", np.zeros((5, 6, 6), np.float32), affine)
        assert same_grid(first, tmp_path / "b.nii.gz")
        assert not same_grid(first, shifted)
        assert not same_grid(first, shorter)

    def test_grids_that_part_at_their_corners_differ(self, tmp_path: Path) -> None:
        def write(name: str, affine: np.ndarray) -> Path:
            return write_nifti(tmp_path / name, np.zeros((512, 512, 2), np.uint8), affine)

        first = write("a.nii.gz", np.diag([0.70, 0.70, 5, 1]))
        assert not same_grid(first, write("b.nii.gz", np.diag([0.79, 0.79, 5, 1])))  # 46 mm off at the far corner
        cos, sin = np.cos(np.deg2rad(5)), np.sin(np.deg2rad(5))
        turned = np.array([[0.7 * cos, -0.7 * sin, 0, 0], [0.7 * sin, 0.7 * cos, 0, 0], [0, 0, 5, 0], [0, 0, 0, 1]])
        assert not same_grid(first, write("c.nii.gz", turned))
        assert same_grid(first, write("d.nii.gz", np.diag([0.7001, 0.7001, 5.0, 1])))  # rounded by another program

    def test_a_quarter_of_the_smallest_edge_is_allowed_at_the_corners(self, tmp_path: Path) -> None:
        first = write_nifti(tmp_path / "a.nii", np.zeros((2, 4, 4), np.uint8), np.diag([1.0, 2, 3, 1]))
        for edge, expected in ((1.11, True), (1.14, False)):  # the far corners meet, the near ones are two edges off
            affine = np.diag([edge, 2, 3, 1])
            affine[0, 3] = 1.5 - 1.5 * edge
            assert same_grid(first, write_nifti(tmp_path / "b.nii", np.zeros((2, 4, 4), np.uint8), affine)) == expected

    def test_a_damaged_volume_has_no_grid(self, tmp_path: Path) -> None:
        pytest.importorskip("SimpleITK")
        (tmp_path / "b.mha").write_bytes(b"words")
        with pytest.raises(UnreadableImageError, match=r"b\.mha: truncated or damaged volume"):
            same_grid(tmp_path / "b.mha", tmp_path / "b.mha")

    def test_patients_are_told_apart_under_a_salt_and_not_named(self, tmp_path: Path) -> None:
        files = [
            write_dicom(tmp_path / f"{index}.dcm", RAMP, PatientID=patient)
            for index, patient in enumerate(("ID-1", "ID-1 ", "ID-2", ""))
        ]
        one, again, two, nobody = (patient_key(path, b"salt") for path in files)
        assert one == again != two
        assert nobody is None
        assert "ID-1" not in str(one)
        assert patient_key(files[0], b"other") != one

    def test_only_dicom_files_have_patients(self, tmp_path: Path) -> None:
        Image.fromarray(RAMP).save(tmp_path / "a.png")
        assert patient_key(tmp_path / "a.png", b"salt") is None
