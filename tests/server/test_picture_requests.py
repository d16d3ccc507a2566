"""What requests for pictures mean: each service's defaults and ranges, and all doors alike."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from annotated_types import Ge, Le
from pydantic import BaseModel
from starlette.testclient import TestClient
from test_fal_queue import GUIDE, ended, submit

from trainer import generating
from trainer.cli import run
from trainer.generation import GenerationFolder, GenerationRequest
from trainer.server.bfl import pictures as bfl
from trainer.server.fal import apps
from trainer.server.novita import pictures as novita
from trainer.server.workshop import Workshop

# Default, and the least and the most; from the service's API reference.
COMMON = {"prompt": "", "seed": None, "output_format": "jpeg", "safety_tolerance": (2, 0, 6)}
GUIDED = {**COMMON, "finetune_strength": (1.1, 0, 2), "steps": (50, 15, 50)}
BFL: dict[str, dict[str, Any]] = {
    "flux-pro-1.1-ultra-finetuned": {
        **COMMON,
        "finetune_strength": (1.2, 0, 2),
        "aspect_ratio": "16:9",
        "image_prompt": None,
        "image_prompt_strength": (0.1, 0, 1),
        "prompt_upsampling": False,
        "raw": False,
    },
    "flux-pro-finetuned": {
        **COMMON,
        "finetune_strength": (1.1, 0, 2),
        "steps": (40, 1, 50),
        "guidance": (2.5, 1.5, 5),
        "width": (1024, 256, 1440),
        "height": (768, 256, 1440),
        "prompt_upsampling": False,
    },
    "flux-pro-1.0-fill-finetuned": {**GUIDED, "mask": None, "guidance": (60, 1.5, 100)},
    "flux-pro-1.0-depth-finetuned": {
        **{name: value for name, value in GUIDED.items() if name != "prompt"},
        **{"control_image": None, "preprocessed_image": None, "guidance": (15, 1, 100)},
    },
    "flux-pro-1.0-canny-finetuned": {
        **{name: value for name, value in GUIDED.items() if name != "prompt"},
        **{"control_image": None, "preprocessed_image": None, "guidance": (30, 1, 100)},
        **{"canny_low_threshold": (50, 0, 500), "canny_high_threshold": (200, 0, 500)},
    },
}
FAL = {
    "num_inference_steps": (None, 1, 200),
    "guidance_scale": (None, 0, 100),
    "num_images": (1, 1, 16),
    "output_format": "jpeg",
    "sync_mode": False,
    "seed": (None, 0, 2**63 - 1),
}
NOVITA = {
    "width": (512, 32, 4096),
    "height": (512, 32, 4096),
    "image_num": (1, 1, 8),
    "steps": (20, 1, 100),
    "guidance_scale": (7.5, 1, 30),
    "clip_skip": (None, 1, 12),
    "seed": (-1, -1, 2**63 - 1),
    "sampler_name": None,
}
MODELS: list[tuple[type[BaseModel], dict[str, Any]]] = [
    *((bfl.WAYS[way].model, fields) for way, fields in BFL.items()),
    (apps.PictureInput, FAL),
    (apps.LoraWeight, {"scale": (1, 0, 4)}),
    (novita.Wanted, NOVITA),
    (novita.Lora, {"strength": (1, -2, 2)}),
    (novita.Extra, {"response_image_type": "png"}),
]


@pytest.mark.parametrize(("model", "fields"), MODELS, ids=lambda v: getattr(v, "__name__", ""))
def test_defaults_and_ranges_are_the_service_s(
    model: type[BaseModel], fields: dict[str, Any]
) -> None:
    for name, wanted in fields.items():
        info = model.model_fields[name]
        found: Any = info.default
        if isinstance(wanted, tuple):
            least = [bound.ge for bound in info.metadata if isinstance(bound, Ge)]
            most = [bound.le for bound in info.metadata if isinstance(bound, Le)]
            found = (found, *least, *most)
        assert (name, found) == (name, wanted)


@pytest.mark.parametrize("way", BFL)
def test_what_a_way_of_the_service_requires_is_required(way: str) -> None:
    required = {n for n, info in bfl.WAYS[way].model.model_fields.items() if info.is_required()}

    wanted = {"finetune_id"} | ({"image"} if "fill" in way else set())
    assert required == wanted | ({"prompt"} if "depth" in way or "canny" in way else set())


def test_every_field_of_novita_s_client_is_known_with_its_default() -> None:
    proto = pytest.importorskip("novita_client.proto")
    usual = proto.Txt2ImgV3Request(model_name="m", prompt="p")
    fields = novita.Wanted.model_fields

    assert vars(usual).keys() <= fields.keys()
    differing = {
        name
        for name, value in vars(usual).items()
        if value is not None and name not in ("model_name", "prompt")
        if fields[name].default != value
    }
    # Where a request says none, the base model's own fits any; the client says one each time.
    assert differing == {"sampler_name"}


@pytest.mark.parametrize(
    ("name", "scheduler", "karras"),
    [
        ("Euler a", "EulerAncestralDiscreteScheduler", False),
        ("Euler", "EulerDiscreteScheduler", False),
        ("LMS Karras", "LMSDiscreteScheduler", True),
        ("Heun", "HeunDiscreteScheduler", False),
        ("DPM2", "KDPM2DiscreteScheduler", False),
        ("DPM2 a Karras", "KDPM2AncestralDiscreteScheduler", True),
        ("DPM++ 2S a", "DPMSolverSinglestepScheduler", False),
        ("DPM++ 2M Karras", "DPMSolverMultistepScheduler", True),
        ("DPM++ Karras", "DPMSolverMultistepScheduler", True),
        ("DPM++ SDE", "DPMSolverSinglestepScheduler", False),
        ("DDIM", "DDIMScheduler", False),
        ("PLMS", "PNDMScheduler", False),
        ("UniPC", "UniPCMultistepScheduler", False),
        ("DPM fast", "DPMSolverSinglestepScheduler", False),
        ("DPM adaptive", "DPMSolverSinglestepScheduler", False),
        ("", None, False),
    ],
)
def test_samplers_are_those_of_diffusers_own_table(
    server: TestClient, name: str, scheduler: str | None, karras: bool
) -> None:
    request = asked_of_novita(server, sampler_name=name)

    assert (request.scheduler, request.karras) == (scheduler, karras)


def test_seed_minus_1_is_any(server: TestClient) -> None:
    seeds = {asked_of_novita(server, seed=seed).seed for seed in (-1, -1, None, 7)}

    assert len(seeds) == 4
    assert 7 in seeds
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("square_hd", (1024, 1024)),
        ("square", (512, 512)),
        ("portrait_4_3", (768, 1024)),
        ("portrait_16_9", (576, 1024)),
        ("landscape_4_3", (1024, 768)),
        ("landscape_16_9", (1024, 576)),
    ],
)
def test_fal_s_sizes_by_name(server: TestClient, name: str, size: tuple[int, int]) -> None:
    request = asked_of_fal(server, image_size=name)

    assert (request.width, request.height) == size


def workshop_of(server: TestClient) -> Workshop:
    workshop: Workshop = server.app.state.workshop
    return workshop


def asked_of_fal(server: TestClient, **given: Any) -> GenerationRequest:
    body = {"prompt": "a TOK", **given}
    work = apps.work_of("fal-ai/flux-lora", "generation", body, workshop_of(server))
    return GenerationRequest.model_validate_json(work)


def asked_of_novita(server: TestClient, run_folder: str = "", **given: Any) -> GenerationRequest:
    body = {"request": {"model_name": "FLUX.1-dev", "prompt": "a TOK", **given}}
    body["request"] = {n: value for n, value in body["request"].items() if value is not None}
    asked = novita.Body.model_validate(body)
    return novita.generation_request(asked, body, workshop_of(server).inputs, lambda _: run_folder)


def test_all_doors_ask_for_the_same_picture(
    server: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = submit(server, "fal-ai/flux-lora", json=GUIDE)
    ended(server, training)
    url = server.get(training["response_url"]).json()["diffusers_lora_file"]["url"]
    workshop = workshop_of(server)
    job = workshop.job(training["request_id"], apps.NAME)
    folder = workshop.folders.of(job.id).run.root.resolve()
    common: dict[str, Any] = {"seed": 7, "prompt": "a TOK"}
    size = {"width": 768, "height": 512}
    told: list[GenerationRequest] = []

    def for_people(request: GenerationRequest, folder: GenerationFolder, *, as_json: bool) -> int:
        told.append(request)
        return 0

    monkeypatch.setattr(generating, "_for_people", for_people)
    flags = ["--seed", "7", "--prompt", "a TOK", "--width", "768", "--height", "512"]
    flags += ["--strength", "0.8", "--steps", "28", "--guidance-scale", "3.5"]
    assert run(["generate", str(folder), *flags]) == 0
    fal = asked_of_fal(
        server,
        **common,
        **{"image_size": size, "loras": [{"path": url, "scale": 0.8}], "output_format": "png"},
        **{"num_inference_steps": 28, "guidance_scale": 3.5},
    )
    from_novita = asked_of_novita(
        server,
        str(folder),
        **common,
        **size,
        **{"steps": 28, "guidance_scale": 3.5, "loras": [{"model_name": "m", "strength": 0.8}]},
    )
    body = {
        **common,
        **size,
        **{"finetune_id": "f", "finetune_strength": 0.8, "output_format": "png"},
        **{"steps": 28, "guidance": 3.5},
    }
    way = bfl.WAYS["flux-pro-finetuned"]
    asked = way.model.model_validate(body)
    from_bfl = bfl.generation_request(asked, body, way, job, workshop)

    assert told == [fal]
    assert from_bfl == fal
    # Its requests name a base model each time: here that of the run.
    base = yaml.safe_load(job.work)["model"]["model_url"]
    assert from_novita == fal.model_copy(update={"model": {"model_url": base}})


def test_the_command_has_sampler_and_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[GenerationRequest] = []

    def for_people(request: GenerationRequest, folder: GenerationFolder, *, as_json: bool) -> int:
        told.append(request)
        return 0

    monkeypatch.setattr(generating, "_for_people", for_people)
    flags = ["--prompt", "x", "--scheduler", "DDIMScheduler", "--karras", "--clip-skip", "2"]
    assert run(["generate", "somewhere", *flags]) == 0
    assert run(["generate", "somewhere", "--prompt", "x"]) == 0

    found = [(request.scheduler, request.karras, request.clip_skip) for request in told]
    assert found == [("DDIMScheduler", True, 2), (None, False, None)]
