# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""One torch thread, quiet libraries, and the models and images that several files use."""

import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from anomalib.data import Folder
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from anomalib_mvfa import MVFA, MVFAModel

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 56, "layers": 24, "width": 32, "head_width": 16, "patch_size": 14, "mlp_ratio": 4},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}
SMALL_CONFIG = {
    **GOLDEN_CONFIG,
    "vision_cfg": {"image_size": 56, "layers": 4, "width": 32, "head_width": 16, "patch_size": 14},
}


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    folder = tempfile.TemporaryDirectory()  # nothing is left in the user's cache, nor taken from it
    config.add_cleanup(folder.cleanup)
    os.environ["ANOMALIB_MVFA_CACHE"] = folder.name
    if find_spec("gradio") is None:  # an extra: nothing else imports the page
        config.option.ignore = [*(config.option.ignore or ()), "anomalib_mvfa/app/page.py"]
    for module in ("lightning", "torch", "torchmetrics", "anomalib"):
        config.addinivalue_line("filterwarnings", rf"ignore::UserWarning:{module}(\..*)?")


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "mvfa.safetensors")


@pytest.fixture(scope="session")
def official_adapters() -> Path:
    return GOLDEN / "official_format_adapters.pth"


@pytest.fixture(scope="session")
def golden_files(golden: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Configuration and weights of the tower that the golden tensors were made with."""
    folder = tmp_path_factory.mktemp("golden")
    config, weights = folder / "golden.json", folder / "golden.safetensors"
    config.write_text(json.dumps(GOLDEN_CONFIG), encoding="utf-8")
    torch.manual_seed(0)
    state = open_clip.CLIP(**GOLDEN_CONFIG).state_dict()
    state.update({name.replace("/", "."): value for name, value in golden.items() if name.startswith("visual/")})
    save_file({name: value.contiguous() for name, value in state.items()}, weights)
    return str(config), str(weights)


@pytest.fixture(scope="session")
def small_backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Configuration of a tower for tests that train: 4 blocks, 16 patches. Use it with ``pretrained="random"``."""
    config = tmp_path_factory.mktemp("small") / "small.json"
    config.write_text(json.dumps(SMALL_CONFIG), encoding="utf-8")
    return str(config)


@pytest.fixture
def golden_mvfa(golden: dict[str, Tensor], golden_files: tuple[str, str]) -> MVFA:
    """The untrained golden model, as a Lightning module."""
    config, weights = golden_files
    mvfa = MVFA(config, weights, class_name="Brain", learning_rate=2e-4)
    mvfa.configure_model()
    mvfa.model.text_features.copy_(golden["text_features"])
    for kind, adapters in (("seg", mvfa.model.seg_adapters), ("det", mvfa.model.det_adapters)):
        prefix = f"adapters_init/{kind}."
        adapters.load_state_dict(
            {name.removeprefix(prefix): v for name, v in golden.items() if name.startswith(prefix)}
        )
    return mvfa


@pytest.fixture
def tiny() -> MVFAModel:
    """The demonstration model with seeded adapters."""
    torch.manual_seed(3)
    return MVFAModel("tiny", class_name="Brain").eval()


@pytest.fixture
def make_folder(tmp_path: Path, make_folder_in: Callable[..., Folder]) -> Callable[..., Folder]:
    """Write grey disks, the abnormal ones with a bright square and a mask, and return a Folder of them."""
    return partial(make_folder_in, tmp_path / "data")


@pytest.fixture(scope="session")
def make_folder_in() -> Callable[..., Folder]:
    """As ``make_folder``, in a folder of the caller's choice."""

    def make(
        root: Path, normal: int = 6, abnormal: int = 6, masks: bool = True, size: tuple[int, int] = (72, 64)
    ) -> Folder:
        rng = np.random.default_rng(5)
        width, height = size
        y, x = np.mgrid[:height, :width]
        disk = (x - width / 2) ** 2 + (y - height / 2) ** 2 < (0.4 * min(size)) ** 2
        for kind, count in (("normal", normal), ("abnormal", abnormal)):
            for index in range(count):
                picture = np.where(disk, 110, 20) + rng.integers(0, 25, (height, width))
                mask = np.zeros((height, width), np.uint8)
                if kind == "abnormal":
                    row, column = rng.integers(height // 4, height // 2, 2)
                    mask[row : row + 12, column : column + 12] = 255
                    picture[mask > 0] = 230
                    _save(mask, root / "masks" / f"{index:02}.png")
                _save(picture.astype(np.uint8), root / kind / f"{index:02}.png")
        return Folder(
            "disks",
            normal_dir="normal",
            abnormal_dir="abnormal" if abnormal else None,
            mask_dir="masks" if masks and abnormal else None,
            root=root,
            train_batch_size=4,
            eval_batch_size=4,
            num_workers=0,
            seed=0,
        )

    return make


def _save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
