# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Draw the pictures of docs/app.md: goes through the page in a Chromium that is installed, on generated images.

python -m docs.draw_app
"""

import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from anomalib_mvfa.app.__main__ import serve

TARGET = Path(__file__).parent / "images"
WIDTH = 1100


def save(page: Page, name: str, first: str, last: str) -> None:
    """Save what lies between two elements."""
    page.mouse.move(0, 400)
    page.evaluate("window.scrollTo(0, 0)")
    page.wait_for_timeout(800)
    boxes = [page.locator(place).first.bounding_box() for place in (first, last)]
    image = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    image = image.crop((0, max(0, int(boxes[0]["y"]) - 12), WIDTH, int(boxes[1]["y"] + boxes[1]["height"]) + 12))
    image.thumbnail((820, 2000))
    image.quantize(256, Image.Quantize.FASTOCTREE).save(TARGET / f"app_{name}.png", optimize=True)


def walk(page: Page) -> None:
    """Do the five steps."""
    page.get_by_role("button", name="Example: brain MRI").click()
    page.locator("#abnormals button.thumb").first.click()
    page.locator("canvas").first.wait_for()
    page.wait_for_timeout(1500)
    save(page, "supports", "#limits", "#abnormals")
    page.locator("#train").click()
    page.locator("#progress", has_text="s left").wait_for()
    save(page, "training", "h2:has-text('2 Train')", "#progress")
    page.locator("#progress", has_text="Trained.").wait_for(timeout=300_000)
    page.locator("#studies button.thumb").nth(1).click()
    page.get_by_role("button", name="Show WinCLIP").click()
    page.locator("#picture figure").nth(2).wait_for()
    save(page, "look", "#studies", "#picture")
    page.locator("#studies button.thumb").first.click()
    page.wait_for_timeout(800)
    page.get_by_role("button", name="This is normal").click()
    page.locator("#correct_notes", has_text="support now").wait_for()
    page.get_by_role("button", name="Train again").click()
    page.locator("#figures", has_text="Before").wait_for(timeout=300_000)
    save(page, "correct", "h2:has-text('4 Correct')", "#figures")
    page.get_by_role("button", name="Prepare the files").click()
    page.locator("#files a").first.wait_for(timeout=300_000)
    save(page, "take_away", "h2:has-text('5 Take away')", "#files")


def main() -> None:
    """Serve the page, and draw it."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        served, address = serve(Path(folder))
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 900})
        page.goto(address)
        walk(page)
        browser.close()
        served.blocks.close(verbose=False)


if __name__ == "__main__":
    main()
