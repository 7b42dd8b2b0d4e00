# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The page in a real browser: the five steps with real clicks, two people at once, and requests to other hosts."""

import shutil
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from anomalib_mvfa.app import session as session_module
from anomalib_mvfa.app.__main__ import serve
from anomalib_mvfa.deploy import live

from .conftest import save_mask, save_phantom

pytest.importorskip("gradio", reason="the extra app is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BUSI = Path(__file__).parents[3] / "shared" / "data" / "busi"
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Any]:
    page, address = serve(tmp_path_factory.mktemp("server"))
    page.address = address
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_module, "SHOTS", 2)  # generated supports of each class, to train on quickly
        yield page
    page.blocks.close(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(server, browser) -> Iterator[Any]:
    """Open the page as somebody new; no request may go to another host, and no script may fail."""
    others: list[str] = []
    contexts = []

    def open_page(width: int = 1400, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("request", lambda request: others.append(request.url))
        page.on("pageerror", lambda error: others.append(f"error: {error}"))
        page.goto(server.address)
        page.get_by_role("button", name="Example: brain MRI").wait_for()
        page.wait_for_function("document.querySelector('#notes')?.getAttribute('role') === 'status'")
        return page

    yield open_page
    for context in contexts:
        context.close()
    own = (server.address, "data:", f"blob:{server.address}")
    assert [url for url in others if not url.startswith(own)] == []


def drop(page: Any, label: str, *paths: Path) -> None:
    page.locator(f"#{label.lower().replace(' ', '_')} input[type=file]").set_input_files(paths)


def train(page: Any, button: str) -> None:
    page.get_by_role("button", name=button, exact=True).click()
    page.locator("#progress [role=progressbar]").wait_for()
    page.locator("#progress", has_text="Trained.").wait_for()


def set_epochs(page: Any, count: int) -> None:
    page.get_by_label("number input for Epochs").fill(str(count))
    page.keyboard.press("Tab")


def paint(page: Any, canvas: Any) -> None:
    canvas.wait_for()
    page.wait_for_timeout(1200)  # the editor fits the image into its canvas
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 15, y)
    page.mouse.down()
    page.mouse.move(x + 15, y + 8, steps=4)
    page.mouse.up()


def test_five_steps_on_generated_images(visit, server, tmp_path):
    page = visit()
    page.get_by_role("button", name="Example: brain MRI").click()
    page.locator("#abnormals button.thumb").nth(1).wait_for()
    (session,) = server.sessions.values()
    assert page.get_by_label("What the images show").input_value() == "brain MRI"

    # A mask that is painted takes the place of the generated one.
    one = next(one for one in session.supports if one.abnormal)
    before = one.mask
    page.locator("#abnormals button.thumb").first.click()
    paint(page, page.locator("canvas").first)
    page.get_by_role("button", name="Keep this mask").click()
    page.locator("#notes", has_text="has its mask").wait_for()
    assert one.mask != before

    set_epochs(page, 1)
    train(page, "Train")
    page.locator("#verdict .verdict", has_text="score").wait_for()
    assert len(session.trained.normal_scores) == len(session.trained.abnormal_scores) == 2

    # The threshold moves verdicts and figures, false alarms on the supports included.
    figures = page.locator("#figures")
    alarms = figures.locator("tr", has_text="False alarms on the normal supports")
    alarms.filter(has_text="0 of 2").wait_for()
    page.get_by_label("number input for Threshold").fill("0.02")
    expected = sum(score > 0.02 for score in session.trained.normal_scores)
    assert expected
    alarms.filter(has_text=f"{expected} of 2").wait_for()
    called = sum(score > 0.02 for score in session.scores().values())
    page.wait_for_function(f"document.querySelectorAll('#studies b.abnormal').length === {called}")
    page.locator("#studies button.thumb").nth(1).click()
    page.get_by_role("button", name="Show WinCLIP").click()
    page.locator("#picture figure").nth(2).wait_for()

    # Corrections become supports, and the next training shows the figures before and now.
    page.get_by_role("button", name="This is abnormal: paint it").click()
    paint(page, page.locator("canvas").last)
    page.get_by_role("button", name="Learn from this mask").click()
    page.locator("#correct_notes", has_text="an abnormal support now").wait_for()
    page.locator("#studies button.thumb").first.click()
    page.get_by_role("button", name="This is normal").click()
    page.locator("#correct_notes", has_text="a normal support now").wait_for()
    train(page, "Train again")
    figures.get_by_text("Before").wait_for()
    assert len(session.trained.normal_scores) == 3

    page.get_by_role("button", name="Prepare the files").click()
    with page.expect_download() as download:
        page.locator("#files a").first.click()
    download.value.save_as(tmp_path / "results.zip")
    with zipfile.ZipFile(tmp_path / "results.zip") as archive:
        assert {"model.ckpt", "predictions.csv", "index.html"} <= set(archive.namelist())


@pytest.mark.skipif(not BUSI.is_dir(), reason=f"{BUSI} is not there")
def test_real_ultrasound_images_on_a_narrow_screen(visit, server, tmp_path):
    page = visit(width=420, color_scheme="dark")
    files = {kind: sorted((BUSI / kind).iterdir()) for kind in ("normal", "abnormal", "masks")}
    drop(page, "Normal images", *files["normal"][:3])
    page.locator("#normals button.thumb").nth(2).wait_for()
    drop(page, "Abnormal images", *files["abnormal"][:3])
    page.locator("#abnormals button.thumb").nth(2).wait_for()
    drop(page, "Masks", *files["masks"][:3])
    page.locator("#abnormals", has_text="with mask").wait_for()
    set_epochs(page, 1)
    train(page, "Train")
    save_phantom(tmp_path / f"{50 * 'long'}.png", 0)
    drop(page, "Images to look at", tmp_path / f"{50 * 'long'}.png", files["normal"][10], files["abnormal"][10])
    page.locator("#studies button.thumb", has_text="longlong").click()
    page.locator("#verdict", has_text="longlong").wait_for()
    page.locator("#verdict .verdict", has_text="score").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    assert not page.evaluate("document.body.classList.contains('dark')")
    assert page.locator("#limits").is_visible()


def test_slices_of_a_volume_have_a_slider(visit, tmp_path):
    data = np.random.default_rng(0).uniform(20, 60, (48, 48, 6)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), tmp_path / "scan.nii.gz")
    page = visit()
    drop(page, "Images to look at", tmp_path / "scan.nii.gz")
    page.locator("#verdict", has_text="slice 1").wait_for()
    page.get_by_label("number input for Slice").fill("3")
    page.locator("#verdict", has_text="slice 3").wait_for()


def test_two_people_see_their_own_images_and_leave_nothing(visit, server, tmp_path):
    (tmp_path / "letter.png").write_text("Dear colleague", encoding="utf-8")
    mask = save_phantom(tmp_path / "a.png", 0, abnormal=True)
    one, other = visit(), visit()
    drop(one, "Abnormal images", tmp_path / "a.png", tmp_path / "letter.png")
    one.locator("#notes", has_text="letter.png cannot be used").wait_for()
    one.locator("#abnormals button.thumb").wait_for()
    drop(other, "Masks", save_mask(tmp_path / "masks" / "a.png", mask))
    other.locator("#notes", has_text="belongs to no abnormal image").wait_for()
    assert other.locator("button.thumb").count() == 0
    assert sorted(len(session.supports) for session in server.sessions.values()) == [0, 1]
    # Closed in the middle of a training: it stops, and the files go.
    one.get_by_role("button", name="Example: breast ultrasound").click()
    one.locator("#normals button.thumb").nth(1).wait_for()
    one.get_by_role("button", name="Train", exact=True).click()
    one.locator("#progress", has_text="Training").wait_for()
    assert live._ONE_AT_A_TIME.locked()
    one.close()
    other.close()
    deadline = time.monotonic() + 20
    while (live._ONE_AT_A_TIME.locked() or list(server.root.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not live._ONE_AT_A_TIME.locked()
    assert list(server.root.iterdir()) == []
    assert server.sessions == {}


def test_keyboard_trains_chooses_and_marks(visit, server):
    page = visit()
    page.locator("#train").focus()
    page.keyboard.press("Enter")
    alert = page.get_by_text("Training needs at least two normal images, and there are 0")
    alert.wait_for()
    page.get_by_role("button", name="Example: brain MRI").focus()
    page.keyboard.press("Space")
    page.locator("#studies button.thumb").first.wait_for()
    page.locator("#studies button.thumb").nth(2).focus()
    page.keyboard.press("Enter")
    page.locator("#studies button.thumb[aria-pressed=true]").nth(0).wait_for()
    page.wait_for_function(
        "document.querySelectorAll('#studies button.thumb')[2].getAttribute('aria-pressed') === 'true'"
    )
    # A rectangle is a mask that needs no mouse.
    (session,) = server.sessions.values()
    one = next(one for one in session.supports if one.abnormal)
    one.mask = None
    page.locator("#abnormals button.thumb").first.focus()
    page.keyboard.press("Enter")
    for name, value in zip(("Left", "Top", "Width", "Height"), ("25", "50", "20", "10"), strict=True):
        page.get_by_label(f"{name} of a rectangle").first.focus()
        page.keyboard.press("Control+A")
        page.keyboard.type(value)
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Keep this mask").focus()
    page.keyboard.press("Enter")
    page.locator("#notes", has_text="has its mask").wait_for()
    with Image.open(one.mask) as mask:
        assert mask.getbbox() == (56, 112, 101, 134)
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input, textarea')].filter(e => e.checkVisibility() && "
        "!(e.innerText || e.ariaLabel || e.title || e.labels?.length || e.type === 'file')).map(e => e.outerHTML)"
    )
    assert unnamed == []


def test_other_addresses_ask_for_a_password(tmp_path):
    page, address = serve(tmp_path / "root", password="secret")
    try:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{address}config")
        for given, status in (("wrong", 400), ("secret", 200)):
            form = f"username=anybody&password={given}".encode()
            try:
                found = urllib.request.urlopen(f"{address}login", form).status
            except urllib.error.HTTPError as error:
                found = error.code
            assert found == status
    finally:
        page.blocks.close(verbose=False)
