# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""The page: its five steps from top to bottom, and what each button does."""

import base64
import errno
import io
import logging
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pandas as pd
import torch
from jinja2 import Environment, PackageLoader
from PIL import Image, ImageChops, ImageOps, ImageStat

from anomalib_mvfa.data.readers.intensity import CT_WINDOWS
from anomalib_mvfa.deploy.live import Options, Progress
from anomalib_mvfa.visualization import outlines, overlay

from .intake import Note
from .session import EXAMPLES, Picture, Session

__all__ = ["Page", "take_away"]

logger = logging.getLogger(__name__)

TEMPLATES = Environment(
    loader=PackageLoader("anomalib_mvfa.app", "."), autoescape=True, trim_blocks=True, keep_trailing_newline=True
)
PICTURED = 24
CHOOSE = "element.addEventListener('choose', event => trigger('click', {index: event.detail}), true)"
Values = dict[Any, Any]


def sentence(error: BaseException) -> str:
    """Return what went wrong and what to do, without contents of files."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "The disk is full. Free some space, or start the page with TMPDIR set to another disk, and try again."
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "There is not enough memory. Use fewer or smaller images, or the backbone tiny, and try again."
    if isinstance(error, ValueError | FileNotFoundError | ImportError):
        return str(error)
    logger.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
    return f"This did not work ({type(error).__name__}). The terminal that runs the page shows where; the page goes on."


def image_tag(image: Image.Image, text: str = "", side: int = 720) -> str:
    """Return an ``img`` element that holds its image, its longest side at ``side`` pixels, with a description."""
    file = io.BytesIO()
    ImageOps.contain(image, (side, side), Image.Resampling.BICUBIC).save(file, "WEBP", quality=85)
    return str(PIECES.image(base64.b64encode(file.getvalue()).decode(), text))


def heated(view: Picture, threshold: float, strength: float) -> Image.Image:
    """Return an image that is looked at with its :func:`overlay`."""
    return overlay(Image.open(view.file).convert("RGB"), torch.from_numpy(view.map), threshold, strength)


@lru_cache(maxsize=4096)
def thumbnail(file: Path, mask: Path | None, rule: str) -> str:  # noqa: ARG001 - the file follows it
    """Return a small ``img`` element of a file, with the outline of its mask."""
    region = None if mask is None else torch.from_numpy(np.array(Image.open(mask)) > 127)
    return image_tag(outlines(Image.open(file).convert("RGB"), region, None), side=128)


TEMPLATES.globals["thumbnail"] = thumbnail
PIECES: Any = TEMPLATES.get_template("pieces.html.jinja").module  # macros that return pieces of the page


def take_away(session: Session, threshold: float, strength: float) -> Iterator[Progress | Path]:
    """Write everything into a zip, and yield the progress, and at last the file; a ValueError without a model."""
    trained = session.trained
    if trained is None:
        msg = "There is no model yet: train one in step 2."
        raise ValueError(msg)
    folder = session.folder / "results" / "anomalib-mvfa"
    shutil.rmtree(folder.parent, ignore_errors=True)
    (folder / "heatmaps").mkdir(parents=True)
    yield Progress("Exporting the model", 0.0)
    trained.save(folder)
    yield Progress("Drawing the heatmaps", 0.6)
    rows = []
    for number, study in enumerate(session.studies.values()):
        for view in study:
            called = int(view.score > threshold), threshold, (view.map > threshold).mean()
            rows.append((view.source.name, number, view.score, *called))
            heated(view, threshold, strength).save(folder / "heatmaps" / f"{len(rows):03d}.png")  # no name of a patient
    table = pd.DataFrame(rows, columns=["path", "group", "score", "label", "threshold", "abnormal_area"])
    table.to_csv(folder / "predictions.csv", index=False, float_format="%.8g")
    best = [max(study, key=lambda view: view.score) for study in session.studies.values()][:PICTURED]
    values = {
        "options": trained.options,
        "threshold": threshold,
        "figures": PIECES.figures(trained, session.scores(), threshold),
        "pictures": [(view, image_tag(heated(view, threshold, 1.0), view.source.name, 240)) for view in best],
    }
    for name in ("index.html", "commands.sh"):
        (folder / name).write_text(TEMPLATES.get_template(f"{name}.jinja").render(values), encoding="utf-8")
    yield Progress("Packing", 0.9)
    yield Path(shutil.make_archive(str(folder), "zip", folder))


class Page:
    """All open pages of a server, whose files are below ``root``; the first backbone is the default."""

    def __init__(self, root: Path, backbones: Sequence[str]) -> None:
        self.root = root
        self.sessions: dict[str, Session] = {}
        with gr.Blocks(title="Anomaly detection with a few images", analytics_enabled=False) as self.blocks:
            self._lay_out(backbones)
            self._connect()

    def open(self, request: gr.Request) -> None:
        """Start a session."""
        self.sessions[request.session_hash] = Session(self.root)

    def close(self, request: gr.Request) -> None:
        """End a session when its page is closed or loaded again, and delete what no session has taken."""
        if session := self.sessions.pop(request.session_hash, None):
            session.close()
            thumbnail.cache_clear()
        kept = {session.folder for session in self.sessions.values()}
        for path in set(self.root.iterdir()) - kept:
            if not kept or time.time() - path.stat().st_mtime > 600:  # seconds: an upload that none has taken
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _lay_out(self, backbones: Sequence[str]) -> None:
        gr.HTML('<p role="note">Not for clinical use. No image leaves this computer.</p>', elem_id="limits")
        gr.Markdown("# Find what is abnormal, with a few images to learn from\n## 1 Images to learn from")
        with gr.Row():
            self.examples = {key: gr.Button(f"Example: {name}") for key, name in EXAMPLES.items()}
        with gr.Row():
            self.class_name = gr.Textbox("object", label="What the images show", info="such as: brain MRI")
            self.rule = gr.Dropdown(["auto", *CT_WINDOWS], label="Grey levels", info="window of CT images, else auto")
        with gr.Row():
            self.normal, self.abnormal = self._drop("Normal images"), self._drop("Abnormal images")
            self.masks = self._drop("Masks, named as their images; or paint them below")
        self.notes = gr.HTML(elem_id="notes")
        gallery = partial(gr.HTML, js_on_load=CHOOSE, elem_classes="gallery")
        self.normals, self.abnormals = gallery(elem_id="normals"), gallery(elem_id="abnormals")
        with gr.Group(visible=False) as self.chosen:
            self.mask_editor, self.mask_box = self._editor()
            with gr.Row():
                self.keep_mask, self.remove = gr.Button("Keep this mask"), gr.Button("Remove this image")
        gr.Markdown("## 2 Train")
        with gr.Row():
            self.backbone = gr.Dropdown(list(backbones), value=backbones[0], label="Backbone", info="--model.backbone")
            self.epochs = gr.Slider(1, 50, 5, step=1, label="Epochs", info="--trainer.max_epochs")
            self.use_abnormal = gr.Checkbox(True, label="Use the abnormal images", info="--data.support_list")
        with gr.Accordion("More choices, and the command line", open=False):
            with gr.Row():
                self.seed = gr.Number(0, precision=0, minimum=0, label="Seed", info="--seed_everything")
                self.rate = gr.Number(1e-3, minimum=1e-6, label="Learning rate", info="--model.learning_rate")
            self.command = gr.Textbox(label="The same on the command line", lines=6, buttons=["copy"])
        self.plan = gr.HTML()
        with gr.Row():
            self.train, self.stop = gr.Button("Train", variant="primary", elem_id="train"), gr.Button("Stop")
        self.progress = gr.HTML(elem_id="progress")
        gr.Markdown("## 3 Look")
        self.look = self._drop("Images to look at")
        self.look_notes, self.studies = gr.HTML(elem_id="look_notes"), gallery(elem_id="studies")
        with gr.Column(visible=False) as self.result:
            self.verdict = gr.HTML(elem_id="verdict")
            with gr.Row():
                self.threshold = gr.Slider(0.02, 0.98, 0.5, step=0.01, label="Threshold", elem_id="threshold")
                self.strength = gr.Slider(0, 1, 0.8, step=0.05, label="Strength of the heatmap")
                self.slice = gr.Slider(1, 2, 1, step=1, label="Slice", visible=False, elem_id="slice")
            self.picture = gr.HTML(elem_id="picture")
            self.compare = gr.Button("Show WinCLIP's map on this image")
        gr.Markdown("## 4 Correct\nChoose an image in step 3, say what it is, and train again.")
        with gr.Row():
            self.is_normal, self.paint = gr.Button("This is normal"), gr.Button("This is abnormal: paint it")
        with gr.Group(visible=False) as self.painting:
            self.editor, self.box = self._editor()
            self.is_abnormal = gr.Button("Learn from this mask")
        self.correct_notes = gr.HTML(elem_id="correct_notes")
        self.again = gr.Button("Train again", variant="primary")
        self.figures = gr.HTML(elem_id="figures")
        gr.Markdown("## 5 Take away\nModel, predictions, heatmaps, a report, and the commands that repeat it.")
        self.pack = gr.Button("Prepare the files", variant="primary")
        self.packing = gr.HTML(elem_id="packing")
        self.files = gr.File(label="Results", interactive=False, visible=False, elem_id="files")
        gr.Markdown("All files of this page are deleted when it is closed.")

    @staticmethod
    def _drop(label: str) -> tuple[gr.File, gr.UploadButton]:
        with gr.Column(min_width=240):
            what = label.partition(",")[0].lower()
            files = gr.File(file_count="multiple", label=label, height=130, elem_id=what.replace(" ", "_"))
            return files, gr.UploadButton(f"Choose a folder of {what}", file_count="directory")

    @staticmethod
    def _editor() -> tuple[gr.ImageEditor, list[gr.Number]]:
        brush = gr.Brush(default_size=12, colors=["#ff3c00"], color_mode="fixed")
        tools: dict[str, Any] = {"layers": False, "transforms": (), "sources": (), "buttons": [], "brush": brush}
        editor = gr.ImageEditor(type="pil", label="Paint what is abnormal", interactive=True, **tools)
        with gr.Row():  # without a mouse
            names = ("Left", "Top", "Width", "Height")
            return editor, [gr.Number(0, minimum=0, maximum=100, label=f"{name} of a rectangle, %") for name in names]

    def _connect(self) -> None:
        choices = [self.class_name, self.backbone, self.epochs, self.use_abnormal, self.seed, self.rate, self.rule]
        sliders = [self.threshold, self.strength, self.slice]
        parts = [part for part in vars(self).values() if isinstance(part, gr.blocks.Block) and part is not self.blocks]
        drops = [drop for pair in (self.normal, self.abnormal, self.masks, self.look) for drop in pair]

        def on(trigger: Callable[..., Any], work: Callable[..., Any], *inputs: Any, **options: Any) -> None:
            values = {*choices, *sliders, *inputs}
            trigger(self._event(work), values, [*parts, *drops], show_progress="hidden", **options)

        on(self.blocks.load(self.open).then, self._show_supports)
        self.blocks.unload(self.close)
        for key, button in self.examples.items():
            on(button.click, lambda session, values, key=key: self._example(session, values, key))
        for drop in drops:
            on(drop.upload, lambda session, values, drop=drop: self._dropped(session, values, drop), drop)
        for gallery in (self.normals, self.abnormals):
            on(gallery.click, self._choose_support)
        for choice in choices[:-1]:
            on(choice.change, self._show_supports)
        on(self.rule.input, self._set_rule)
        for slider in sliders:
            on(slider.input, self._show_result, trigger_mode="always_last")
        for button in (self.train, self.again):
            on(button.click, self._train)
        on(self.studies.click, self._choose_study)
        on(self.keep_mask.click, self._keep_mask, self.mask_editor, *self.mask_box)
        on(self.remove.click, self._remove)
        on(self.stop.click, lambda session, _: session.stopping.set() or {})
        on(self.compare.click, self._compare)
        on(self.is_normal.click, lambda *args: self._correct(*args, abnormal=False))
        on(self.paint.click, self._open_editor)
        on(self.is_abnormal.click, lambda *args: self._correct(*args, abnormal=True), self.editor, *self.box)
        on(self.pack.click, self._pack)

    def _event(self, work: Callable[..., Any]) -> Callable[..., Iterator[Values]]:
        """Make a handler of a function of a session, the values of the inputs and, if one was clicked, a number."""

        def run(values: Values, request: gr.Request, event: gr.EventData) -> Iterator[Values]:
            session = self.sessions.get(request.session_hash)
            if session is None:
                msg = "This page has lost its session, and its files are deleted. Reload it to start again."
                raise gr.Error(msg, duration=None)
            data = getattr(event, "_data", None)
            try:
                found = work(session, values, *([data["index"]] if isinstance(data, dict) and "index" in data else []))
                yield from [found] if isinstance(found, dict) else found
            except Exception as error:
                raise gr.Error(sentence(error), duration=None, print_exception=False) from None

        return run

    # What the handlers return: new values, by component.

    def _options(self, session: Session, values: Values) -> Options:
        name = "".join(letter for letter in values[self.class_name] if letter.isalnum() or letter in " -_").strip()
        parts = values[self.backbone], int(values[self.epochs]), values[self.use_abnormal], name or "object"
        return Options(*parts, int(values[self.seed] or 0), values[self.rate] or 1e-3, session.rule)

    def _show_supports(self, session: Session, values: Values, notes: Sequence[Note] = ()) -> Values:
        options = self._options(session, values)
        chosen = session.support if session.support in session.supports else None
        return {
            self.notes: PIECES.notes(notes),
            self.normals: PIECES.supports(session.supports, "normal", chosen),
            self.abnormals: PIECES.supports(session.supports, "abnormal", chosen),
            self.plan: PIECES.plan(session.supports, options),
            self.command: TEMPLATES.get_template("commands.sh.jinja").render(options=options),
            self.chosen: gr.Group(visible=chosen is not None),
        }

    def _set_rule(self, session: Session, values: Values) -> Values:
        session.set_rule(values[self.rule])
        return self._show_supports(session, values) | self._show_studies(session, values)

    def _example(self, session: Session, values: Values, key: str) -> Values:
        session.add_examples(key)
        values[self.class_name] = EXAMPLES[key]
        notes = [Note("Generated images", "were added: supports here, and others to look at in step 3.")]
        shown = self._show_supports(session, values, notes) | self._show_studies(session, values)
        return shown | {self.class_name: EXAMPLES[key]}

    def _dropped(self, session: Session, values: Values, drop: Any) -> Iterator[Values]:
        looking, notes = drop in self.look, list[Note]()
        part = self.look_notes if looking else self.notes
        normal, abnormal = (partial(session.add_supports, abnormal=kind) for kind in (False, True))
        works: Values = {self.normal: normal, self.abnormal: abnormal, self.masks: session.add_masks}
        work = next((work for pair, work in works.items() if drop in pair), session.look)
        for done, notes in work(values[drop] or []):
            yield {part: PIECES.notes(notes, f"{100 * done:.0f} % of the images are read.")}
        shown = self._show_studies(session, values) if looking else self._show_supports(session, values)
        yield shown | {part: PIECES.notes(notes), drop: None if drop.__class__ is gr.File else gr.skip()}

    def _choose_support(self, session: Session, values: Values, index: int) -> Values:
        session.support = one = session.supports[index]
        editor = gr.ImageEditor(str(one.file), label=f"Paint on {one.source.name}", visible=one.abnormal)
        shown = {self.mask_editor: editor, self.keep_mask: gr.Button(visible=one.abnormal)}
        return self._show_supports(session, values) | shown

    def _keep_mask(self, session: Session, values: Values) -> Values:
        mask = _painted(values, self.mask_editor, self.mask_box, session.support.file)
        notes = session.set_mask(session.support, mask)
        return self._show_supports(session, values, notes or [Note(session.support.source.name, "has its mask.")])

    def _remove(self, session: Session, values: Values) -> Values:
        session.supports.remove(session.support)
        return self._show_supports(session, values)

    def _train(self, session: Session, values: Values) -> Iterator[Values]:
        before = session.trained
        for progress in session.train(self._options(session, values)):
            yield {self.progress: PIECES.bar(progress)}
        if session.trained is before:
            yield {self.progress: PIECES.notes((), "Stopped. Nothing has changed.")}
            return
        said = {self.progress: PIECES.notes((), "Trained. Step 3 shows what the model finds."), self.threshold: 0.5}
        yield self._show_studies(session, values | said) | said

    def _show_studies(self, session: Session, values: Values) -> Values:
        if not session.studies:
            return {}
        if session.study is None:
            return self._choose_study(session, values, 0)
        slices = len(session.studies[session.study])
        return self._show_result(session, values | {self.slice: session.slice + 1}) | {
            self.slice: gr.Slider(1, max(2, slices), session.slice + 1, visible=slices > 1),
            self.result: gr.Column(visible=True),
            self.painting: gr.Group(visible=False),
        }

    def _choose_study(self, session: Session, values: Values, index: int) -> Values:
        session.study = list(session.studies)[index]
        session.slice = int(np.argmax([view.score for view in session.studies[session.study]]))
        return self._show_studies(session, values)

    def _show_result(self, session: Session, values: Values, winclip: Any = None) -> Values:
        """Show the image that is chosen at the threshold of the slider, and what that does to all others."""
        trained, threshold, strength = session.trained, values[self.threshold], values[self.strength]
        studies = {self.studies: PIECES.studies(session.studies, session.study, threshold)}
        views = session.studies[session.study]
        session.slice = min(int(values[self.slice]), len(views)) - 1
        view = views[session.slice]
        image = Image.open(view.file).convert("RGB")
        panels = [("Image", image_tag(image, "Image"))]
        verdict = PIECES.verdict(view, views, trained, threshold)
        if view.by is None:
            return studies | {self.verdict: verdict, self.picture: PIECES.panels(panels)}
        panels.append(("What is called abnormal is outlined", image_tag(heated(view, threshold, strength), "Heatmap")))
        if winclip is not None:
            heat = image_tag(overlay(image, torch.from_numpy(0.5 * winclip), 0.5, strength), "Heatmap of WinCLIP")
            panels.append(("WinCLIP, from its least to its largest value: it has no threshold", heat))
        table = PIECES.figures(trained, session.scores(), threshold, *(session.before or ()))
        return studies | {self.verdict: verdict, self.picture: PIECES.panels(panels), self.figures: table}

    @staticmethod
    def _view(session: Session) -> Picture:
        if session.study is None:
            msg = "There is no image yet: drop one in step 3 first."
            raise ValueError(msg)
        return session.studies[session.study][session.slice]

    def _compare(self, session: Session, values: Values) -> Values:
        if session.trained is None:
            msg = "Train a model in step 2 first: WinCLIP takes its backbone and its normal supports."
            raise ValueError(msg)
        return self._show_result(session, values, session.trained.winclip_map(session.as_trained(self._view(session))))

    def _open_editor(self, session: Session, _: Values) -> Values:
        return {self.editor: str(self._view(session).file), self.painting: gr.Group(visible=True)}

    def _correct(self, session: Session, values: Values, *, abnormal: bool) -> Values:
        mask = _painted(values, self.editor, self.box, self._view(session).file) if abnormal else None
        notes = session.correct(self._view(session), abnormal=abnormal, mask=mask)
        return self._show_supports(session, values) | {self.correct_notes: PIECES.notes(notes)}

    def _pack(self, session: Session, values: Values) -> Iterator[Values]:
        for step in take_away(session, values[self.threshold], values[self.strength]):
            if isinstance(step, Path):
                yield {self.packing: "", self.files: gr.File(str(step), visible=True)}
            else:
                yield {self.packing: PIECES.bar(step)}


def _painted(values: Values, editor: Any, box: Sequence[Any], file: Path) -> torch.Tensor:
    """Return the mask ``(H, W)`` of what was painted on the image of a file, and of the rectangle beside it."""
    value, image = values[editor] or {}, Image.open(file)
    shown = value.get("background") or Image.new("L", (1, 1))
    small, own = (each.convert("L").resize((16, 16), Image.Resampling.BOX) for each in (shown, image))
    difference = ImageStat.Stat(ImageChops.difference(small, own)).mean[0]
    if difference > 4:  # grey levels, as the browser compresses what it sends back
        msg = "The image is still loading in the editor: wait until it shows it, paint, and try again."
        raise ValueError(msg)
    layers = [np.asarray(layer.convert("RGBA").resize(image.size, 0))[..., 3] > 0 for layer in value["layers"]]
    mask = np.any([np.zeros(image.size[::-1], bool), *layers], axis=0)
    left, top, width, height = ((values[number] or 0) / 100 * image.size[axis % 2] for axis, number in enumerate(box))
    mask[round(top) : round(top + height), round(left) : round(left + width)] = True
    return torch.from_numpy(mask)
