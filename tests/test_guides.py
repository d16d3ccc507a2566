"""Pictures that guide others: fetched, made as large as the base model's own, measured."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from skimage import data as photographs

from trainer import guides
from trainer.base_model import BaseModel
from trainer.config import ModelConfig
from trainer.errors import InputError
from trainer.families.flux import Flux1
from trainer.generation import GenerationRequest
from trainer.guides import depth, fitted, guiding
from trainer.network import ALLOWED_HOSTS

# Made for pictures of 64 x 64; the files of a model are not needed here.
BASE = BaseModel("flux", Flux1, ModelConfig(), 64, cast(Any, None), {}, {})


def guided(**given: Any) -> guides.Guiding:
    return guiding(GenerationRequest(**{"prompt": "a man", "guide": "canny", **given}), BASE)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guides") / "photo.png"
    Image.fromarray(photographs.astronaut()).resize((300, 150)).save(path)
    return path


@pytest.fixture(scope="module")
def estimator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A depth model of few weights."""
    folder = tmp_path_factory.mktemp("depth")
    config = transformers.DPTConfig(
        **{"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2},
        **{"intermediate_size": 16, "image_size": 32, "patch_size": 8},
        **{"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 8, 8]},
        **{"fusion_hidden_size": 8, "is_hybrid": False, "readout_type": "project"},
    )
    torch.manual_seed(0)
    model = transformers.DPTForDepthEstimation(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # So large that something of the picture arrives, and above 0, where the last step ends.
            parameter.copy_(torch.randn_like(parameter).abs() * 0.1)
    model.save_pretrained(folder)
    processor = {
        **{"image_processor_type": "DPTImageProcessor", "do_resize": True, "do_normalize": True},
        **{"size": {"height": 32, "width": 32}, "resample": 2, "rescale_factor": 1 / 255},
        **{"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_rescale": True},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


class Slow(BaseHTTPRequestHandler):
    """Gives a picture: at once, or in pieces for ever."""

    content: bytes

    def do_GET(self) -> None:  # noqa: N802 - named by the base class
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.content)
        while self.path == "/slow":
            try:
                self.wfile.write(bytes(2**20))
            except OSError:
                return
            time.sleep(0.02)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def site(photo: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A web server with the photograph."""
    Slow.content = photo.read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv(ALLOWED_HOSTS, "127.0.0.1")
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("size", "made"),
    [
        # A megapixel as FLUX has it: by hand, sqrt(1024² * 4/3) = 1182.4 and 886.8 to 16.
        ((4000, 3000), (1184, 880)),
        ((400, 300), (1184, 880)),
        ((1024, 1024), (1024, 1024)),
    ],
)
def test_a_guide_gets_the_area_of_the_base_model_in_its_own_shape(
    size: tuple[int, int], made: tuple[int, int]
) -> None:
    assert fitted(size, 1024**2, 16) == made


def test_guide_and_mask_are_made_as_large_as_the_base_model_s_pictures(
    photo: Path, tmp_path: Path
) -> None:
    mask = Image.new("L", (300, 150))
    mask.paste(255, (0, 0, 150, 150))
    mask.save(tmp_path / "mask.png")

    found = guided(guide="fill", guide_image=str(photo), guide_mask=str(tmp_path / "mask.png"))

    # 64² pixels of 2:1 are 90.5 x 45.3.
    assert found.size == (96, 48)
    assert {picture.size for picture in found.pictures.values()} == {(96, 48)}
    half = np.asarray(found.pictures["mask_image"])
    assert (half[:, :40].min(), half[:, 56:].max()) == (255, 0)


def test_edges_are_found_at_the_size_of_the_picture(photo: Path) -> None:
    found = guided(guide_image=str(photo), canny_thresholds=(50, 200)).pictures["control_image"]

    small = Image.open(photo).resize((96, 48), Image.Resampling.LANCZOS).convert("L")
    assert np.array_equal(np.asarray(found)[..., 0], cv2.Canny(np.asarray(small), 50, 200))


def test_a_guide_is_fetched_from_its_address(photo: Path, site: str) -> None:
    fetched = guided(guide_image=f"{site}/photo").pictures["control_image"]

    assert fetched == guided(guide_image=str(photo)).pictures["control_image"]


def test_an_address_that_never_ends_is_given_up(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guides, "_FETCH_SECONDS", 0.2)
    with pytest.raises(InputError, match="did not come within 0.2 seconds") as caught:
        guided(guide_image=f"{site}/slow")
    assert caught.value.problems[0].field == "guide_image"

    monkeypatch.setattr(guides, "_MOST_BYTES", 2**20)
    with pytest.raises(InputError, match="larger than 1 MiB"):
        guided(guide_image=f"{site}/slow")


def test_an_address_of_this_machine_is_not_asked(photo: Path) -> None:
    with pytest.raises(InputError, match="`guide_image`: .*not on the public internet"):
        guided(guide_image="http://127.0.0.1:9/photo.png")


def test_depth_is_what_transformers_own_pipeline_measures(photo: Path, estimator: Path) -> None:
    image = Image.open(photo).resize((96, 48))
    pipeline = transformers.pipeline("depth-estimation", str(estimator), use_fast=False)
    theirs = np.asarray(pipeline(image)["depth"]).astype(int)

    ours = np.asarray(depth(image, str(estimator))).astype(int)

    assert np.ptp(ours) > 200
    assert np.abs(ours[..., 0] - theirs).mean() < 3


def test_what_measures_distances_is_turned_round(
    photo: Path, estimator: Path, tmp_path: Path
) -> None:
    far = tmp_path / "far"
    far.mkdir()
    for path in estimator.iterdir():
        (far / path.name).write_bytes(path.read_bytes())
    config = json.loads((far / "config.json").read_text())
    (far / "config.json").write_text(json.dumps({**config, "depth_estimation_type": "metric"}))
    image = Image.open(photo)

    near, turned = (np.asarray(depth(image, str(f))).astype(int) for f in (estimator, far))

    assert np.abs(near + turned - 255).max() <= 1


def test_a_request_may_have_its_depth_measured(photo: Path, estimator: Path) -> None:
    given = {"guide": "depth", "guide_image": str(photo), "depth_estimator": str(estimator)}
    measured = guided(**given).pictures["control_image"]

    small = Image.open(photo).resize((96, 48), Image.Resampling.LANCZOS)
    assert measured == depth(small, str(estimator))
    with pytest.raises(InputError, match="`depth_estimator`: .*nowhere"):
        guided(**{**given, "depth_estimator": "/nowhere/at/all"})
