# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""What a person does on the page, without the page: uploads, supports, masks, trainings, corrections, results."""

import errno
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from anomalib_mvfa import MVFA
from anomalib_mvfa.app import intake
from anomalib_mvfa.app.session import Session
from anomalib_mvfa.data.readers import UnreadableImageError, read_image
from anomalib_mvfa.deploy import live
from anomalib_mvfa.deploy.live import Options, Progress
from anomalib_mvfa.visualization import overlay

from .conftest import SIZE, fill, notes, save_mask, save_phantom


@pytest.fixture(scope="module")
def page():
    """The module of the page, which needs Gradio."""
    pytest.importorskip("gradio", reason="the extra app is not installed")
    from anomalib_mvfa.app import page

    return page


def texts(reading) -> str:
    return "\n".join(f"{note.name} {note.text}" for note in notes(reading))


# Uploads


def test_text_named_png_is_named_with_its_reason(session, tmp_path):
    (tmp_path / "letter.png").write_text("Dear colleague", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("Dear colleague", encoding="utf-8")
    save_phantom(tmp_path / "good.png", 0)
    found = texts(
        session.add_supports([tmp_path / name for name in ("letter.png", "notes.txt", "good.png")], abnormal=False)
    )
    assert "letter.png cannot be used: not an image of a supported format" in found
    assert "notes.txt is no image of a format that is read" in found
    assert [support.source.name for support in session.supports] == ["good.png"]


def test_copy_saved_in_another_format_is_left_out(session, tmp_path):
    save_phantom(tmp_path / "one.png", 0)
    with Image.open(tmp_path / "one.png") as image:
        image.save(tmp_path / "copy.bmp")
    notes(session.add_supports([tmp_path / "one.png"], abnormal=True))
    assert "copy.bmp is the same image as the abnormal one.png" in texts(
        session.add_supports([tmp_path / "copy.bmp"], abnormal=False)
    )
    assert len(session.supports) == 1


@pytest.mark.parametrize(
    ("image", "reason"),
    [(Image.new("RGB", (9, 40)), "9 x 40 pixels are too few"), (Image.new("L", (64, 64), 7), "a single colour")],
)
def test_image_that_shows_nothing_is_refused(session, tmp_path, image, reason):
    image.save(tmp_path / "bad.png")
    assert reason in texts(session.add_supports([tmp_path / "bad.png"], abnormal=False))
    assert session.supports == []


def test_zip_bomb_is_not_unpacked(session, tmp_path):
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.png", "w") as file:
        for _ in range(300):
            file.write(bytes(2**20))
    assert bomb.stat().st_size < 2**20
    assert "bomb.zip unpacks to more than 256 MB" in texts(session.add_supports([bomb], abnormal=False))
    assert not [path for path in session.folder.rglob("*") if path.is_file()]


def test_zip_with_thousands_of_files_or_damage_is_refused(session, tmp_path):
    many = tmp_path / "many.zip"
    with zipfile.ZipFile(many, "w") as archive:
        for number in range(2001):
            archive.writestr(f"{number}.png", b"")
    (tmp_path / "damaged.zip").write_bytes(many.read_bytes()[:1000])
    found = texts(session.look([many, tmp_path / "damaged.zip"]))
    assert "many.zip unpacks to more than 256 MB or 2000 files" in found
    assert "damaged.zip is no zip file, or a damaged one" in found


def test_zip_that_cannot_be_unpacked_says_why(session, tmp_path):
    save_phantom(tmp_path / "one.png", 0)
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as archive:
        archive.write(tmp_path / "one.png", "one.png")
    whole = (tmp_path / "whole.zip").read_bytes()
    where = whole.index(b"PK\x01\x02")  # the entry of the file in the directory at the end
    for name, offset, value in (("method", 10, 98), ("secret", 8, 1)):
        changed = bytearray(whole)
        changed[where + offset] = changed[offset - 2] = value
        (tmp_path / f"{name}.zip").write_bytes(changed)
    found = texts(session.add_supports([tmp_path / "method.zip", tmp_path / "secret.zip"], abnormal=False))
    assert "method.zip is no zip file, or a damaged one, or packed in a way that is not read" in found
    assert "secret.zip is protected by a password" in found


def test_zip_members_stay_in_the_folder_of_the_session(session, tmp_path):
    save_phantom(tmp_path / "one.png", 0)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(tmp_path / "one.png", "../../../escaped.png")
        archive.writestr("inner/two.png", (tmp_path / "one.png").read_bytes())
    found = texts(session.add_supports([tmp_path / "images.zip"], abnormal=False))
    assert "is the same image as" in found
    assert not list(tmp_path.glob("escaped.png"))
    assert not list(tmp_path.parent.glob("escaped.png"))
    assert all(path.is_relative_to(session.folder) for path in tmp_path.rglob("escaped.png"))
    assert len(session.supports) == 1


def test_file_of_500_mb_is_refused_before_it_is_read(session, tmp_path):
    with (tmp_path / "volume.nii").open("wb") as file:
        file.truncate(500 * 2**20)
    found = texts(session.look([tmp_path / "volume.nii"]))
    assert "volume.nii is 500 MB, more than the 256 MB taken. Crop or resample it" in found
    assert not (tmp_path / "volume.nii").exists()


def test_first_200_of_many_images_are_taken(session, tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{number:03d}.png" for number in range(203)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (32, 32), dtype=np.uint8)).save(path)
    assert "203 images are too many at once: the first 200 are taken" in texts(session.look(paths))
    assert len(session.studies) == 200


def test_files_of_one_name_from_two_folders_are_both_taken(session, tmp_path):
    for number in range(2):
        save_phantom(tmp_path / str(number) / "a.png", number)
    assert notes(session.add_supports([tmp_path / "0" / "a.png", tmp_path / "1" / "a.png"], abnormal=False)) == []
    assert [support.source.name for support in session.supports] == ["a.png", "a.png"]


def test_full_disk_is_reported_and_the_session_goes_on(session, tmp_path, monkeypatch, page):
    save_phantom(tmp_path / "a.png", 0)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "move", full)
        with pytest.raises(OSError, match="No space") as caught:
            notes(session.add_supports([tmp_path / "a.png"], abnormal=False))
    assert page.sentence(caught.value).startswith("The disk is full. Free some space")
    assert notes(session.add_supports([tmp_path / "a.png"], abnormal=False)) == []


def test_unexpected_error_shows_its_kind_but_none_of_its_text(caplog, page):
    assert page.sentence(KeyError("Doe^Jane")).startswith("This did not work (KeyError).")
    assert "Doe" not in caplog.text
    assert "less memory" not in page.sentence(ValueError("Add images."))
    assert page.sentence(MemoryError()).startswith("There is not enough memory.")


# Masks and volumes


def test_masks_go_to_the_abnormal_images_of_their_names(session, tmp_path):
    mask = save_phantom(tmp_path / "a.png", 0, abnormal=True)
    save_phantom(tmp_path / "b.png", 1)
    notes(session.add_supports([tmp_path / "a.png"], abnormal=True))
    notes(session.add_supports([tmp_path / "b.png"], abnormal=False))
    files = [save_mask(tmp_path / "masks" / f"{name}.png", mask) for name in ("a_mask", "b", "c")]
    found = texts(session.add_masks(files))
    assert "a_mask.png" not in found
    assert "b.png belongs to no abnormal image" in found
    assert "c.png belongs to no abnormal image" in found
    with Image.open(session.supports[0].mask) as kept:
        assert (np.array(kept) == mask * 255).all()


def test_mask_of_another_size_or_an_empty_one_is_refused(session, tmp_path):
    save_phantom(tmp_path / "a.png", 0, abnormal=True)
    notes(session.add_supports([tmp_path / "a.png"], abnormal=True))
    small = save_mask(tmp_path / "masks" / "a.png", np.ones((40, 50), bool))
    assert f"a.png is 50 x 40 pixels, its image {SIZE} x {SIZE}" in texts(session.add_masks([small]))
    empty = save_mask(tmp_path / "masks" / "a.png", np.zeros((SIZE, SIZE), bool))
    assert "a.png has an empty mask" in texts(session.add_masks([empty]))
    assert session.supports[0].mask is None


def volume(path: Path, lesion: range = range(0)) -> tuple[Path, Path]:
    """Save a volume of 16 slices and its mask, with bright squares in some slices."""
    nibabel = pytest.importorskip("nibabel")
    data = np.random.default_rng(3).uniform(20, 60, (48, 48, 16)).astype(np.float32)
    mask = np.zeros(data.shape, np.uint8)
    for index in lesion:
        mask[10:20, 10:20, index] = 1
    data[mask > 0] = 200
    masks = path.parent / "masks" / path.name
    masks.parent.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), path)
    nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), masks)
    return path, masks


def test_mask_of_a_volume_keeps_the_slices_that_it_marks(session, tmp_path):
    path, mask = volume(tmp_path / "scan.nii.gz", range(4, 9))
    assert "scan.nii.gz has 16 slices, of which 8 are taken" in texts(session.add_supports([path], abnormal=True))
    assert len(session.supports) == 8
    assert notes(session.add_masks([mask])) == []
    assert [support.source.ref.frame for support in session.supports] == [5, 7]
    assert all(support.mask for support in session.supports)


def test_slices_of_a_volume_are_one_study_in_their_order(session, tmp_path):
    path, _ = volume(tmp_path / "scan.nii.gz")
    save_phantom(tmp_path / "image.png", 0)
    assert notes(session.look([path, tmp_path / "image.png"])) == []
    single, slices = sorted(session.studies.values(), key=len)
    assert [view.source.name for view in single] == ["image.png"]
    assert [view.source.ref.frame for view in slices] == list(range(16))
    assert slices[4].source.name == "scan.nii.gz, slice 5"


# Training


def test_training_on_one_normal_image_says_what_to_add(session, tmp_path):
    save_phantom(tmp_path / "a.png", 0)
    notes(session.add_supports([tmp_path / "a.png"], abnormal=False))
    with pytest.raises(ValueError, match="at least two normal images, and there are 1: add some in step 1"):
        next(session.train(Options()))


def test_abnormal_images_without_mask_are_left_out_where_others_have_one(session, tmp_path):
    fill(session, tmp_path)
    session.supports[-1].mask = None
    names = [support.source.name for support in session.used_supports(Options())]
    assert names == ["normal_0.png", "normal_1.png", "abnormal_0.png"]
    session.supports[-2].mask = None
    assert len(session.used_supports(Options())) == 4
    assert len(session.used_supports(Options(abnormal=False))) == 2


def test_stopped_training_leaves_no_model_and_lets_the_next_one_run(session, tmp_path):
    fill(session, tmp_path)
    progress = session.train(Options(epochs=50))
    next(step for step in progress if step.text == "Training")
    session.stopping.set()
    list(progress)
    assert session.trained is None
    assert live._ONE_AT_A_TIME.acquire(blocking=False)
    live._ONE_AT_A_TIME.release()


def test_training_ends_when_its_reader_goes_away(session, tmp_path):
    fill(session, tmp_path)
    progress = session.train(Options(epochs=50))
    next(progress)
    before = threading.active_count()
    progress.close()
    assert not live._ONE_AT_A_TIME.locked()
    assert threading.active_count() <= before - 1
    assert not list(session.folder.rglob("model.ckpt"))


def test_second_training_waits_and_can_be_stopped(session, tmp_path):
    fill(session, tmp_path)
    with live._ONE_AT_A_TIME:
        progress = session.train(Options())
        assert next(progress).text.startswith("Waiting for another training")
        session.stopping.set()
        assert list(progress) == []
    assert session.trained is None


def test_failed_training_raises_its_reason(session, tmp_path):
    fill(session, tmp_path)
    with pytest.raises(ValueError, match="no-such-weights"):
        list(session.train(Options(backbone="no-such-weights.json")))
    assert not live._ONE_AT_A_TIME.locked()


def test_progress_counts_up_to_the_memory_bank(trained):
    assert trained.texts[0] == "Reading the backbone"
    assert "Training" in trained.texts


def test_normal_supports_are_scored_against_the_others(trained):
    # threshold="fpr" with two supports is the larger of their scores, which normalisation puts at one half.
    assert max(trained.trained.normal_scores) == pytest.approx(0.5, abs=1e-5)
    assert len(trained.trained.normal_scores) == 2
    assert min(trained.trained.abnormal_scores) > 0.5
    own = trained.trained.predict(read_image(trained.supports[0].file))[0]
    assert own < trained.trained.normal_scores[0]  # the bank holds the image itself


def test_scores_are_those_of_the_checkpoint(trained, tmp_path):
    save_phantom(tmp_path / "a.png", 50, abnormal=True)
    assert notes(trained.look([tmp_path / "a.png"])) == []
    view = next(reversed(trained.studies.values()))[0]
    model = MVFA.load_from_checkpoint(trained.trained.checkpoint).eval()
    with torch.inference_mode():
        expected = model(read_image(view.file)[None])
    assert view.score == pytest.approx(float(expected.pred_score), abs=1e-3)  # the bank of a checkpoint is rounded
    assert np.abs(view.map - expected.anomaly_map[0].numpy()).max() < 1e-2


def test_support_among_the_images_to_look_at_is_noted(trained):
    copy = trained.folder.parent / "copy.png"
    shutil.copyfile(trained.supports[0].file, copy)
    assert "copy.png is a support, too" in texts(trained.look([copy]))


def test_winclip_map_spans_zero_to_one(trained):
    found = trained.trained.winclip_map(read_image(trained.supports[-1].file))
    assert (found.min(), found.max()) == (0.0, 1.0)
    mask = np.array(Image.open(trained.supports[-1].mask).resize(found.shape[::-1])) > 127
    assert found[mask].mean() > found[~mask].mean()


# Corrections


def test_correction_makes_a_support_and_changes_its_label(session, tmp_path):
    mask = torch.from_numpy(save_phantom(tmp_path / "a.png", 0, abnormal=True))
    notes(session.look([tmp_path / "a.png"]))
    (view,) = next(iter(session.studies.values()))
    assert "nothing painted" in session.correct(view, abnormal=True, mask=torch.zeros(1, 1))[0].text
    assert session.supports == []
    assert "an abnormal support now" in session.correct(view, abnormal=True, mask=mask)[0].text
    assert session.supports[0].abnormal
    assert session.supports[0].mask.is_file()
    session.correct(view, abnormal=False)
    assert [(one.abnormal, one.mask) for one in session.supports] == [(False, None)]


def test_training_again_keeps_the_scores_before_and_looks_again(tmp_path):
    session = Session(tmp_path / "root")
    fill(session, tmp_path)
    save_phantom(tmp_path / "new.png", 60)
    notes(session.look([tmp_path / "new.png"]))
    (view,) = next(iter(session.studies.values()))
    assert view.by is None
    list(session.train(Options(epochs=1)))
    first = view.score
    assert view.by is session.trained
    assert session.before is None
    session.correct(view, abnormal=False)
    list(session.train(Options(epochs=1)))
    assert session.before[1] == {"new.png": first}
    assert view.score < first  # it is in the bank now
    assert len(session.trained.normal_scores) == 3
    session.close()


# Results


def test_figures_count_what_is_above_the_threshold(trained, page):
    def rows(*given):
        table = page.PIECES.figures(trained.trained, *given)
        cells = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', str(table))
        return {name: re.findall("<td>(.*?)</td>", values) for name, values in cells}

    found = rows({"a.png": 0.7, "b.png": 0.2}, 0.6)
    assert found["Images looked at called abnormal"] == ["1 of 2"]
    assert found["False alarms on the normal supports"] == ["0 of 2"]
    assert (found["a.png"], found["b.png"]) == (["abnormal, 0.70"], ["normal, 0.20"])
    assert rows({}, 0.02)["False alarms on the normal supports"] == ["2 of 2"]
    assert rows({}, 0.5)["Images looked at called abnormal"] == ["none there"]
    before = SimpleNamespace(normal_scores=[0.1, 0.7, 0.8], abnormal_scores=[])
    compared = rows({"a.png": 0.7}, 0.6, before, {"b.png": 0.5})
    assert compared["False alarms on the normal supports"] == ["2 of 3", "0 of 2"]
    assert compared["Images looked at called abnormal"] == ["0 of 1", "1 of 1"]
    assert compared["a.png"] == ["not there", "abnormal, 0.70"]


def test_outline_follows_the_threshold():
    image = Image.new("RGB", (40, 40), (90, 90, 90))
    levels = np.tile(np.linspace(0.05, 0.95, 40, dtype=np.float32), (40, 1))
    for threshold in (0.3, 0.8):
        red = np.array(overlay(image, torch.from_numpy(levels), threshold, 0.0)) == (255, 60, 0)
        column = np.flatnonzero(red.all(axis=-1).any(axis=0)).min()
        assert levels[0, column] == pytest.approx(threshold, abs=0.06)


def test_results_hold_what_repeats_them_and_no_path_of_the_session(trained, tmp_path, page):
    save_phantom(tmp_path / "look_at_me.png", 70, abnormal=True)
    shutil.copyfile(trained.supports[-1].file, tmp_path / "abnormal_support.png")
    notes(trained.look([tmp_path / "look_at_me.png", tmp_path / "abnormal_support.png"]))
    threshold = max(trained.scores().values())  # nothing is above it, but some images are above one half
    assert 0.5 < threshold < 1
    gone = trained.folder / "supports" / "gone.png"  # a support that was removed before the training
    shutil.copyfile(trained.supports[0].file, gone)
    *steps, path = page.take_away(trained, threshold, strength=0.5)
    gone.unlink()
    assert all(isinstance(step, Progress) for step in steps)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        assert {"model.ckpt", "adapters.safetensors", "predictions.csv", "index.html", "commands.sh"} <= set(names)
        assert {"supports/supports.csv", "supports/supports.txt"} <= set(names)
        assert any(name.endswith("model.xml") for name in names)
        table = pd.read_csv(io.BytesIO(archive.read("predictions.csv")))
        supports = pd.read_csv(io.BytesIO(archive.read("supports/supports.csv")), keep_default_na=False)
        pages = [archive.read(name).decode() for name in ("index.html", "commands.sh", "predictions.csv")]
    views = [view for study in trained.studies.values() for view in study]
    assert table.path.tolist() == [view.source.name for view in views]
    assert table.threshold.tolist() == pytest.approx([threshold] * len(views))
    assert table.label.tolist() == [0] * len(views)
    assert len([name for name in names if name.startswith("heatmaps/") and name.endswith(".png")]) == len(views)
    used = {f"supports/{name}" for column in ("path", "mask") for name in supports[column] if name}
    assert used == {name for name in names if name.startswith("supports/") and name.endswith(".png")}
    assert not any(str(trained.folder) in page or trained.folder.name in page for page in pages)
    assert "Not for clinical use" in pages[0]
    # The first command gives the adapters of the page.
    shutil.unpack_archive(path, tmp_path / "away")
    command = [*shlex.split(pages[1].splitlines()[0]), "--trainer.accelerator", "cpu", "--default_root_dir", "run"]
    program = Path(sys.executable).with_name(command[0])
    subprocess.run([program, *command[1:]], cwd=tmp_path / "away", check=True, capture_output=True)
    first, second = (
        torch.load(file, weights_only=False)["state_dict"]
        for file in (tmp_path / "away/model.ckpt", next((tmp_path / "away/run").rglob("model.ckpt")))
    )
    adapters = [name for name in first if "adapters" in name]
    assert adapters
    assert all(torch.equal(first[name], second[name]) for name in adapters)


def test_grey_levels_of_all_images_follow_the_window(session, tmp_path):
    volumes = [volume(tmp_path / f"{name}.nii.gz")[0] for name in ("support", "look")]
    notes(session.add_supports([volumes[0]], abnormal=False))
    notes(session.look([volumes[1]]))
    before = [read_image(one.file) for one in (session.supports[0], session.views[0])]
    session.set_rule("brain")  # 0 to 80
    for one, old in zip((session.supports[0], session.views[0]), before, strict=True):
        found, expected = read_image(one.file), read_image(one.source.ref, "brain")
        assert float((found - expected).abs().max()) < 1 / 255
        assert float((found - old).abs().max()) > 0.1
    late = tmp_path / "late"
    late.mkdir()
    notes(session.look([shutil.copy(volume(tmp_path / "more.nii.gz", range(16))[0], late / "more.nii.gz")]))
    assert {view.source.rule for view in session.views} == {"brain"}


def test_a_window_that_shows_nothing_leaves_all_images_as_they_were(session, tmp_path):
    notes(session.add_supports([volume(tmp_path / "scan.nii.gz")[0]], abnormal=False))
    before = [one.file.read_bytes() for one in session.supports]
    with pytest.raises(UnreadableImageError, match="single colour"):
        session.set_rule("[-500, 100]")  # everything in it is white
    assert [one.file.read_bytes() for one in session.supports] == before
    assert session.rule == session.supports[0].source.rule == "auto"


def test_a_mask_is_painted_or_given_as_a_rectangle(page, tmp_path):
    layer = Image.new("RGBA", (50, 40))
    layer.putpixel((3, 2), (255, 60, 0, 255))
    background = Image.linear_gradient("L").resize((50, 40)).convert("RGB")
    file = tmp_path / "image.png"
    background.save(file)
    values = {
        "editor": {"background": background, "layers": [layer]},
        **dict(zip("ltwh", (10, 50, 20, 25), strict=True)),
    }
    mask = page._painted(values, "editor", "ltwh", file)
    assert mask.shape == (40, 50)
    assert bool(mask[2, 3])
    assert mask[20:30, 5:15].all()
    assert int(mask.sum()) == 101
    values = {"editor": {"background": background, "layers": []}, **dict.fromkeys("ltwh", 0)}
    assert not page._painted(values, "editor", "ltwh", file).any()
    turned = {"background": background.rotate(180), "layers": [layer]}  # of the image that was chosen before
    for value in (None, turned):
        with pytest.raises(ValueError, match="still loading"):
            page._painted({"editor": value, **dict.fromkeys("ltwh")}, "editor", "ltwh", file)


def test_scores_follow_the_window_that_the_model_was_trained_with(tmp_path, page):
    session = Session(tmp_path / "root")
    fill(session, tmp_path)
    for name, lesion in (("first", range(3, 5)), ("second", range(8, 10))):
        volume(tmp_path / f"{name}.nii.gz", lesion)
    session.set_rule("brain")
    notes(session.look([tmp_path / "first.nii.gz"]))
    list(session.train(Options(epochs=1, intensity="brain")))
    session.set_rule("lung")
    notes(session.look([tmp_path / "second.nii.gz"]))
    model = MVFA.load_from_checkpoint(session.trained.checkpoint).eval()
    for view in session.views:
        assert view.by is session.trained
        with torch.inference_mode():
            expected = model(read_image(view.source.ref, "brain")[None])
        assert view.score == pytest.approx(float(expected.pred_score), abs=1e-3)
        shown, wanted = read_image(view.file), read_image(view.source.ref, "lung")
        assert float((shown - wanted).abs().max()) < 1 / 255
    session.close()


def test_the_window_of_the_page_is_that_of_the_checkpoint(tmp_path):
    session = Session(tmp_path / "root")
    fill(session, tmp_path)
    list(session.train(Options(epochs=1, intensity="brain")))
    assert MVFA.load_from_checkpoint(session.trained.checkpoint).intensity == "brain"
    session.close()


def test_results_need_a_model(session, page):
    with pytest.raises(ValueError, match="train one in step 2"):
        next(page.take_away(session, 0.5, 0.5))


def test_uploads_that_nobody_took_go_after_a_while(page, tmp_path):
    pages = page.Page(tmp_path, ["tiny"])
    for name in ("one", "other"):
        pages.open(SimpleNamespace(session_hash=name))
    (tmp_path / "old").mkdir()
    for name in ("old/upload.png", "new.png"):
        (tmp_path / name).write_bytes(b"")
    os.utime(tmp_path / "old", (1, 1))
    pages.close(SimpleNamespace(session_hash="one"))
    assert {path.name for path in tmp_path.iterdir()} == {pages.sessions["other"].folder.name, "new.png"}
    pages.close(SimpleNamespace(session_hash="other"))
    assert list(tmp_path.iterdir()) == []


def test_sessions_share_nothing_and_leave_nothing(tmp_path):
    one, other = Session(tmp_path), Session(tmp_path)
    save_phantom(tmp_path / "a.png", 0)
    notes(one.add_supports([tmp_path / "a.png"], abnormal=False))
    assert other.supports == []
    assert not list(other.folder.iterdir())
    one.close()
    assert [path.name for path in tmp_path.iterdir()] == [other.folder.name]
    other.close()


def test_notes_are_limited_and_escaped(page):
    many = [intake.Note("<script>.png", "is wrong.")] * 60
    text = str(page.PIECES.notes(many))
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "and 20 more" in text
