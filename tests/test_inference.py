"""Pictures with what was trained: strengths on weights and pixels, and taking off to the bit."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    HeunDiscreteScheduler,
    UNet2DConditionModel,
)
from finished import FORMS, finished, of_form
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from skimage import data as photographs
from tiny import TWO_LAYERS, never
from transformers import CLIPTextModel

from trainer import base_model, inference, randomness
from trainer.base_model import BaseModel
from trainer.config import ModelConfig, Note
from trainer.errors import InputError, Interrupted, NonFiniteError, OutOfMemoryError
from trainer.events import Event, FileEvent, NoteEvent, StageEvent
from trainer.families.base import Family
from trainer.generation import GenerationRequest, Trained
from trainer.inference import Worker, generate
from trainer.job import RunFolder
from trainer.strength import apply, finished_run, strengthened

# diffusers makes arrays of tensors the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

QUICK: dict[str, Any] = {"num_inference_steps": 2, "prompt": "a man in a suit", "seed": 5}
LORA = "pytorch_lora_weights.safetensors"
EXACT = base_model.Precision(*[torch.float32] * 4)
# For requests that do not care what was made before: the base model is loaded once.
SHARED = Worker()
Weights = dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def runs(
    sd15_folder: Path, photo_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A finished run of a form, trained when it is first asked for."""
    folder = tmp_path_factory.mktemp("runs")

    def of(form: str) -> Path:
        there = folder / form
        return there if there.exists() else of_form(folder, form, sd15_folder, photo_folder)

    return of


@pytest.fixture(scope="module")
def token_run(
    sd15_folder: Path, photo_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tokens"
    leaves = {**TWO_LAYERS, "train_text_encoder_ti": True, "token_abstraction": "TOK"}
    return finished(folder, sd15_folder, photo_folder, **leaves)


@pytest.fixture(scope="module")
def flux_run(
    flux_folder: Path, photo_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "flux"
    leaves = {"target_unet_modules": ["x_embedder", "transformer_blocks.0.attn.to_q"]}
    return finished(folder, flux_folder, photo_folder, **leaves)


def wanted(*runs: Path, strength: float = 1.0, **given: Any) -> GenerationRequest:
    trained = tuple(Trained(run=str(run), strength=strength) for run in runs)
    return GenerationRequest(**{**QUICK, "trained": trained, **given})


def pictures(
    folder: Path, request: GenerationRequest, worker: Worker | None = None
) -> list[np.ndarray[Any, Any]]:
    """The pixels of what is made."""
    events = list((worker or SHARED).generate(request, RunFolder(folder), never))
    paths = [folder / event.path for event in events if isinstance(event, FileEvent)]
    return [np.asarray(Image.open(path)).astype(int) for path in paths]


def picture(
    folder: Path, request: GenerationRequest, worker: Worker | None = None
) -> np.ndarray[Any, Any]:
    [made] = pictures(folder, request, worker)
    return made


def stock(pipeline: Any, **call: Any) -> np.ndarray[Any, Any]:
    """The picture that diffusers itself makes, from the same first noise."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(randomness.key(QUICK["seed"], "generate", 0))
    call = {"prompt": QUICK["prompt"], "num_inference_steps": 2, **call}
    made = pipeline(generator=generator, **call).images[0]
    return np.asarray(made).astype(int)


def weights_of(holder: Family | Worker) -> Weights:
    """All weights of a base model, copied."""
    if isinstance(holder, Worker):
        assert holder._loaded is not None
        holder = holder._loaded.family
    components = holder.pipeline.components
    return {
        name: {n: t.clone() for n, t in part.state_dict().items()}
        for name, part in components.items()
        if isinstance(part, torch.nn.Module)
    }


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(
        one[part].keys() == other[part].keys()
        and all(torch.equal(one[part][name], other[part][name]) for name in one[part])
        for part in one
    )


Loaded = tuple[BaseModel, Family]


def loaded_from(model: Path) -> Loaded:
    base = base_model.locate(ModelConfig(model_url=str(model)))
    return base, base_model.load(base, EXACT)


@pytest.fixture(scope="module")
def loaded(sd15_folder: Path) -> Loaded:
    """The base model, for changes that are undone."""
    return loaded_from(sd15_folder)


def weights_at(loaded: Loaded, run: Path, strength: float) -> Weights:
    """The weights of a base model with a run on it."""
    base, family = loaded
    changes = [finished_run(Trained(run=str(run), strength=strength))]
    applied = apply(family, base, changes, guided=False)
    found = weights_of(family)
    applied.undo()
    return found


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_linear_in_the_strength(
    form: str, runs: Callable[[str], Path], loaded: Loaded
) -> None:
    run = runs(form)
    base, whole = weights_at(loaded, run, 0), weights_at(loaded, run, 1)
    changed = [
        (part, name)
        for part in base
        for name in base[part]
        if not torch.equal(base[part][name], whole[part][name])
    ]

    assert len(changed) >= 2
    for strength in (0.5, 2.0, -1.0):
        partly = weights_at(loaded, run, strength)
        for part, name in changed:
            before, after = base[part][name], whole[part][name]
            assert torch.equal(partly[part][name], before + strength * (after - before))
    assert same(weights_at(loaded, run, 0), base)


def test_several_runs_are_added_up_whatever_their_order() -> None:
    weight = torch.tensor([1.0, 2.0])
    one = (0.5, lambda weight: weight + 4)
    other = (2.0, lambda weight: weight * 3)

    # By hand: W + 0.5 * 4 + 2 * (3W - W).
    assert strengthened(weight, [one, other]).tolist() == [7.0, 12.0]
    assert strengthened(weight, [other, one]).tolist() == [7.0, 12.0]


def test_at_strength_0_the_pixels_are_those_of_the_base_model(
    runs: Callable[[str], Path], sd15_folder: Path, tmp_path: Path
) -> None:
    worker = SHARED
    alone = picture(tmp_path, wanted(model={"model_url": str(sd15_folder)}), worker)
    pipeline = DiffusionPipeline.from_pretrained(sd15_folder, local_files_only=True)

    assert np.abs(alone - stock(pipeline)).max() <= 1
    for form in FORMS:
        picture(tmp_path, wanted(runs(form), strength=1), worker)
        made = picture(tmp_path, wanted(runs(form), strength=0), worker)
        assert np.array_equal(made, alone)


def test_at_strength_1_a_lora_makes_the_pixels_that_diffusers_makes_with_it(
    runs: Callable[[str], Path], sd15_folder: Path, tmp_path: Path
) -> None:
    pipeline = DiffusionPipeline.from_pretrained(sd15_folder, local_files_only=True)
    before = stock(pipeline)
    pipeline.load_lora_weights(str(runs("lora") / "outputs"), weight_name=LORA)
    theirs = stock(pipeline)

    ours = picture(tmp_path, wanted(runs("lora")))

    assert np.abs(theirs - before).max() > 10
    assert np.abs(ours - theirs).max() <= 1


def test_at_strength_1_whole_weights_make_the_pixels_of_the_trained_model(
    runs: Callable[[str], Path], loaded: Loaded, sd15_folder: Path, tmp_path: Path
) -> None:
    outputs = runs("full") / "outputs"
    pipeline = DiffusionPipeline.from_pretrained(
        sd15_folder,
        unet=UNet2DConditionModel.from_pretrained(outputs / "unet"),
        text_encoder=CLIPTextModel.from_pretrained(outputs / "text_encoder"),
        local_files_only=True,
    )
    theirs = stock(pipeline)

    ours = picture(tmp_path, wanted(runs("full")))
    file = load_file(outputs / "unet" / "diffusion_pytorch_model.safetensors")
    weights = weights_at(loaded, runs("full"), 1)["unet"]

    assert np.abs(theirs - picture(tmp_path, wanted(runs("full"), strength=0))).max() > 10
    assert np.abs(ours - theirs).max() <= 1
    assert all(torch.equal(weights[name], tensor) for name, tensor in file.items())


def test_on_another_base_model_whole_weights_bring_their_change(
    runs: Callable[[str], Path], loaded: Loaded, sd15_folder: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(sd15_folder, tmp_path / "other")
    path = other / "unet" / "diffusion_pytorch_model.safetensors"
    shifted = {name: tensor + 0.01 for name, tensor in load_file(path).items()}
    save_file(shifted, path, {"format": "pt"})

    moved = weights_at(loaded_from(other), runs("full"), 1)["unet"]

    base, trained = (weights_at(loaded, runs("full"), s)["unet"] for s in (0, 1))
    for name, tensor in moved.items():
        torch.testing.assert_close(tensor, shifted[name] + (trained[name] - base[name]))
        assert not torch.equal(tensor, trained[name])


def test_new_tokens_stand_where_their_word_stands(token_run: Path, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(base_of(token_run), local_files_only=True)
    pipeline.load_lora_weights(str(token_run / "outputs"), weight_name=LORA)
    vectors = load_file(token_run / "outputs" / "lora_emb.safetensors")["clip_l"]
    pipeline.load_textual_inversion(vectors, token=["<s0>", "<s1>"])
    generator = torch.Generator().manual_seed(randomness.key(5, "generate", 0))
    theirs = pipeline("a photo of <s0><s1>", num_inference_steps=2, generator=generator).images[0]

    ours = picture(tmp_path, wanted(token_run, prompt="a photo of TOK"))

    assert np.abs(ours - np.asarray(theirs).astype(int)).max() <= 1


def base_of(run: Path) -> str:
    return finished_run(Trained(run=str(run))).config.model.model_url


def test_at_strength_0_the_prompt_keeps_its_words(token_run: Path, tmp_path: Path) -> None:
    model = {"model_url": base_of(token_run)}
    alone = picture(tmp_path, wanted(model=model, prompt="a photo of TOK"))

    made = picture(tmp_path, wanted(token_run, strength=0, prompt="a photo of TOK"))

    assert np.array_equal(made, alone)


def test_runs_with_the_same_word_for_new_tokens_are_refused(
    token_run: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(token_run, tmp_path / "copy")

    with pytest.raises(InputError, match="`TOK` stands for new tokens in both runs"):
        picture(tmp_path, wanted(token_run, copy))


def test_a_worker_undoes_runs_to_the_bit(
    runs: Callable[[str], Path], token_run: Path, sd15_folder: Path, tmp_path: Path
) -> None:
    worker, plain = SHARED, wanted(model={"model_url": str(sd15_folder)})
    first = picture(tmp_path, plain, worker)
    before = weights_of(worker)
    assert worker._loaded is not None
    family, tokenizer = worker._loaded.family, worker._loaded.family.pipeline.tokenizer
    # Trained with the base model's own pixels in mind, these have all forms and places.
    for request in (
        wanted(runs("full")),
        wanted(runs("lora"), runs("dora"), strength=0.7),
        wanted(token_run, runs("loha"), prompt="TOK"),
    ):
        picture(tmp_path, request, worker)
        assert not same(weights_of(worker), before)

    again = picture(tmp_path, plain, worker)

    assert worker._loaded.family is family
    assert family.pipeline.tokenizer is tokenizer
    assert same(weights_of(worker), before)
    assert np.array_equal(first, again)


def test_a_worker_puts_the_same_runs_on_once(
    runs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[float] = []

    def counted(*given: Any, **named: Any) -> Any:
        calls.append(1)
        return apply(*given, **named)

    monkeypatch.setattr(inference, "apply", counted)
    for strength in (0.5, 0.5, 1.0):
        picture(tmp_path, wanted(runs("lora"), strength=strength))

    assert len(calls) == 2


def test_a_run_that_fails_half_way_leaves_the_base_model_as_it_was(
    runs: Callable[[str], Path], sd15_folder: Path, tmp_path: Path
) -> None:
    worker = SHARED
    picture(tmp_path, wanted(model={"model_url": str(sd15_folder)}), worker)
    before = weights_of(worker)
    copy = shutil.copytree(runs("dora"), tmp_path / "copy")
    path = copy / "outputs" / LORA
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    last = max(name for name in tensors if "magnitude" in name)
    save_file({**tensors, last: tensors[last].reshape(-1)[:3].clone()}, path, header)

    with pytest.raises(InputError, match="cannot change `unet"):
        picture(tmp_path, wanted(copy), worker)

    assert same(weights_of(worker), before)


def test_picture_n_is_the_same_however_many_there_are(
    runs: Callable[[str], Path], tmp_path: Path
) -> None:
    worker, request = SHARED, wanted(runs("lora"), num_images=3)
    three = pictures(tmp_path, request, worker)
    one = pictures(tmp_path, request.model_copy(update={"num_images": 1}), worker)
    assert np.array_equal(three[0], one[0])
    assert not np.array_equal(three[0], three[1])


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_the_same_request_gives_the_same_bytes_in_every_format(
    kind: str, plain_worker: tuple[Worker, GenerationRequest], tmp_path: Path
) -> None:
    worker, request = plain_worker
    request = request.model_copy(update={"output_format": kind})
    digests = set()
    for number in range(2):
        folder = tmp_path / str(number)
        events = list(worker.generate(request, RunFolder(folder), never))
        [path] = [e.path for e in events if isinstance(e, FileEvent)]
        assert path == f"outputs/0.{kind}"
        digests.add(hashlib.sha256((folder / path).read_bytes()).hexdigest())
        with Image.open(folder / path) as image:
            assert image.format == kind.upper()
            assert "prompt" not in " ".join(map(str, image.info))
    assert len(digests) == 1


def test_what_is_told_on_the_way(sd15_folder: Path, tmp_path: Path) -> None:
    request = wanted(model={"model_url": str(sd15_folder)}, num_images=2)

    events = list(SHARED.generate(request, RunFolder(tmp_path), never))

    assert events == [
        StageEvent("generate", 0, 2),
        FileEvent("picture", "outputs/0.png"),
        StageEvent("generate", 1, 2),
        FileEvent("picture", "outputs/1.png"),
        StageEvent("generate", 2, 2),
    ]


def test_a_wish_to_stop_is_heard_between_two_pictures(sd15_folder: Path, tmp_path: Path) -> None:
    request = wanted(model={"model_url": str(sd15_folder)}, num_images=2)
    events: list[Event] = []
    with pytest.raises(Interrupted):
        events.extend(generate(request, RunFolder(tmp_path), lambda: True))
    assert (tmp_path / "outputs" / "0.png").exists()
    assert not (tmp_path / "outputs" / "1.png").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"negative_prompt": "a boat"},
        {"clip_skip": 2},
        {"scheduler": "EulerDiscreteScheduler"},
        {"guidance_scale": 2.0},
        {"num_inference_steps": 3},
        {"width": 96},
        {"seed": 6},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_part_of_a_request_acts(
    change: dict[str, Any], plain_worker: tuple[Worker, GenerationRequest], tmp_path: Path
) -> None:
    worker, request = plain_worker
    usual = picture(tmp_path, request, worker)
    assert worker._loaded is not None
    scheduler = worker._loaded.family.pipeline.scheduler

    changed = picture(tmp_path, request.model_copy(update=change), worker)

    assert not np.array_equal(usual, changed)
    assert worker._loaded.family.pipeline.scheduler is scheduler


@pytest.fixture(scope="module")
def plain_worker(sd15_folder: Path) -> tuple[Worker, GenerationRequest]:
    """A worker with a request for the base model alone."""
    return SHARED, wanted(model={"model_url": str(sd15_folder)})


def test_clip_skip_1_is_the_usual_layer_and_2_the_one_before(
    plain_worker: tuple[Worker, GenerationRequest], sd15_folder: Path, tmp_path: Path
) -> None:
    worker, request = plain_worker
    one, two = (
        picture(tmp_path, request.model_copy(update={"clip_skip": skip}), worker) for skip in (1, 2)
    )
    pipeline = DiffusionPipeline.from_pretrained(sd15_folder, local_files_only=True)
    assert np.abs(one - stock(pipeline)).max() <= 1
    encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    ids = tokenizer(QUICK["prompt"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        before_last = encoder(ids, output_hidden_states=True).hidden_states[-2]
        embeds = encoder.final_layer_norm(before_last)
    assert np.abs(two - stock(pipeline, prompt=None, prompt_embeds=embeds)).max() <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 100}, "`width`: is 100, which is not a multiple of 8"),
        ({"clip_skip": 99}, "`clip_skip`: is 99; this base model allows 1 to "),
        ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, "allowed: .*DDIMScheduler"),
        ({"scheduler": "os.system"}, "`scheduler`: `os.system` does not fit"),
        ({"model": {}}, "`model`: names no base model"),
        ({"model": {"model_url": 3}}, "`model_url`: "),
        ({"model": {"model_url": "x", "modelurl": "x"}}, "`modelurl`: "),
        ({"trained": (Trained(run="/nowhere"),)}, "run `/nowhere` has no result"),
        ({"guide": "depth", "guide_image": "x"}, "not one for `depth`"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    change: dict[str, Any],
    message: str,
    plain_worker: tuple[Worker, GenerationRequest],
    tmp_path: Path,
) -> None:
    worker, request = plain_worker
    with pytest.raises(InputError, match=message):
        picture(tmp_path, request.model_copy(update=change), worker)


def test_a_run_that_has_lost_its_files_is_named(
    runs: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(runs("lora"), tmp_path / "copy")
    (copy / "outputs" / LORA).unlink()
    with pytest.raises(InputError, match="copy` has lost `outputs/pytorch_lora_weights"):
        picture(tmp_path, wanted(copy))


def test_a_finished_run_needs_no_checkpoint(runs: Callable[[str], Path], tmp_path: Path) -> None:
    copy = shutil.copytree(runs("lora"), tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints")
    shutil.rmtree(copy / "prepared")
    usual, bare = (picture(tmp_path, wanted(run)) for run in (runs("lora"), copy))
    assert np.array_equal(usual, bare)


def test_a_run_of_another_family_is_named_with_the_reason(
    runs: Callable[[str], Path], flux_run: Path, sdxl_folder: Path, tmp_path: Path
) -> None:
    for run in (flux_run, runs("full")):
        with pytest.raises(InputError, match=f"run `{run}` ") as caught:
            picture(tmp_path, wanted(run, model={"model_url": str(sdxl_folder)}))
        assert caught.value.problems[0].field == "trained"


def test_after_too_little_memory_the_base_model_is_loaded_anew(
    plain_worker: tuple[Worker, GenerationRequest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker, request = plain_worker
    usual = picture(tmp_path, request, worker)

    def too_much(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(inference, "drawn", too_much)
        with pytest.raises(OutOfMemoryError, match="no room"):
            picture(tmp_path, request, worker)
    assert worker._loaded is None
    assert np.array_equal(picture(tmp_path, request, worker), usual)


def test_weights_that_overflow_are_said_to_and_taken_off(
    runs: Callable[[str], Path], plain_worker: tuple[Worker, GenerationRequest], tmp_path: Path
) -> None:
    worker, plain = plain_worker
    usual = picture(tmp_path, plain, worker)
    broken = shutil.copytree(runs("full"), tmp_path / "broken")
    path = broken / "outputs" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({n: t * torch.inf for n, t in load_file(path).items()}, path, {"format": "pt"})

    with pytest.raises(NonFiniteError):
        picture(tmp_path, wanted(broken), worker)

    assert np.array_equal(picture(tmp_path, plain, worker), usual)


def guided_folder(folder: Path, flux: Path, pipeline_class: Any, channels: int) -> Path:
    """FLUX with the channels of a guiding picture beside the noisy latents."""
    base = FluxPipeline.from_pretrained(flux, local_files_only=True)
    config = {**base.transformer.config, "in_channels": channels, "out_channels": 64}
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel.from_config(config)
    shared = {n: t for n, t in base.transformer.state_dict().items() if n != "x_embedder.weight"}
    transformer.load_state_dict(shared, strict=False)
    parts = {n: p for n, p in base.components.items() if p is not None}
    pipeline_class(**{**parts, "transformer": transformer}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guides") / "photo.png"
    Image.fromarray(photographs.astronaut()).resize((70, 64)).save(path)
    return path


def test_a_map_guides_and_layers_of_another_shape_are_left_out_by_name(
    flux_run: Path, flux_folder: Path, photo: Path, tmp_path: Path
) -> None:
    control = guided_folder(tmp_path / "control", flux_folder, FluxControlPipeline, 128)
    given = {"model": {"model_url": str(control)}, "guide_image": str(photo), "width": 64}
    worker = Worker()
    events = list(
        worker.generate(
            wanted(flux_run, guide="depth", **given), RunFolder(tmp_path / "out"), never
        )
    )
    trained = np.asarray(Image.open(tmp_path / "out" / "outputs" / "0.png")).astype(int)

    pipeline = FluxControlPipeline.from_pretrained(control, local_files_only=True)
    alone = stock(pipeline, control_image=Image.open(photo), width=64, height=64)
    notes = [event.message for event in events if isinstance(event, NoteEvent)]
    assert notes == [
        "`transformer.x_embedder.weight` has another shape in this base model, and keeps its "
        "weights"
    ]
    assert np.abs(trained - alone).max() > 1
    base = picture(tmp_path, wanted(flux_run, strength=0, guide="depth", **given), worker)
    assert np.abs(base - alone).max() <= 1
    thresholds = {"guide": "canny", "canny_thresholds": (50, 200)}
    outlined = picture(tmp_path, wanted(**given, **thresholds), worker)
    grey = Image.open(photo).resize((64, 64), Image.Resampling.LANCZOS).convert("L")
    found = Image.fromarray(cv2.Canny(np.asarray(grey), 50, 200)).convert("RGB")
    theirs = stock(pipeline, control_image=found, width=64, height=64)
    assert np.abs(outlined - theirs).max() <= 1


def test_a_hole_is_filled_by_mask_or_transparency(
    flux_run: Path, flux_folder: Path, photo: Path, tmp_path: Path
) -> None:
    fill = guided_folder(tmp_path / "fill", flux_folder, FluxFillPipeline, 384)
    image = Image.open(photo)
    mask = Image.new("L", image.size)
    mask.paste(255, (10, 10, 40, 40))
    mask.save(tmp_path / "mask.png")
    image.putalpha(mask.point([255 - value for value in range(256)]))
    image.save(tmp_path / "clear.png")
    given = {"model": {"model_url": str(fill)}, "guide": "fill"}
    worker = Worker()

    by_mask = picture(
        tmp_path,
        wanted(**given, guide_image=str(photo), guide_mask=str(tmp_path / "mask.png")),
        worker,
    )
    by_alpha = picture(tmp_path, wanted(**given, guide_image=str(tmp_path / "clear.png")), worker)

    pipeline = FluxFillPipeline.from_pretrained(fill, local_files_only=True)
    theirs = stock(pipeline, image=Image.open(photo), mask_image=mask, width=64, height=64)
    assert by_mask.shape == (64, 64, 3)
    assert np.abs(by_mask - theirs).max() <= 1
    assert np.abs(by_mask - by_alpha).mean() < 4
    with pytest.raises(InputError, match="`guide_mask`: is missing"):
        picture(tmp_path, wanted(**given, guide_image=str(photo)), worker)


def notes_of(events: list[Event]) -> list[tuple[str, str, str]]:
    return [(e.note, e.field, e.message) for e in events if isinstance(e, NoteEvent)]


def test_what_whoever_asks_has_to_say_comes_first(tmp_path: Path) -> None:
    said = Note(kind="ignored", field="request.mood", message="there is no such field")
    request = wanted(model={"model_url": "/nowhere"}, notes=(said,))
    events: list[Event] = []

    # Also where nothing can be made.
    with pytest.raises(InputError, match="nowhere"):
        for event in SHARED.generate(request, RunFolder(tmp_path), never):
            events.append(event)  # noqa: PERF402 - what came before the error is kept

    assert notes_of(events) == [("ignored", "request.mood", "there is no such field")]


def test_a_sampler_for_other_noise_gives_way_to_the_model_s_own(
    flux_folder: Path, tmp_path: Path
) -> None:
    worker, own = Worker(), wanted(model={"model_url": str(flux_folder)}, clip_skip=1)
    usual = picture(tmp_path, own, worker)
    request = own.model_copy(update={"scheduler": "EulerAncestralDiscreteScheduler"})

    events = list(
        worker.generate(
            request.model_copy(update={"karras": True}), RunFolder(tmp_path / "other"), never
        )
    )

    assert [note[:2] for note in notes_of(events)] == [("ignored", "scheduler")]
    made = np.asarray(Image.open(tmp_path / "other" / "outputs" / "0.png"))
    assert np.array_equal(made, usual)


def test_noise_levels_are_karras_where_the_sampler_has_them(
    plain_worker: tuple[Worker, GenerationRequest], sd15_folder: Path, tmp_path: Path
) -> None:
    worker, request = plain_worker
    request = request.model_copy(update={"karras": True, "num_inference_steps": 3})
    heun = request.model_copy(update={"scheduler": "HeunDiscreteScheduler"})
    pipeline = DiffusionPipeline.from_pretrained(sd15_folder, local_files_only=True)
    config = pipeline.scheduler.config
    pipeline.scheduler = HeunDiscreteScheduler.from_config(config, use_karras_sigmas=True)

    made = picture(tmp_path, heun, worker)
    ddim = request.model_copy(update={"scheduler": "DDIMScheduler"})
    events = list(worker.generate(ddim, RunFolder(tmp_path), never))

    assert np.abs(made - stock(pipeline, num_inference_steps=3)).max() <= 1
    without = picture(tmp_path, heun.model_copy(update={"karras": False}), worker)
    assert np.abs(made - without).max() > 1
    assert [note[:2] for note in notes_of(events)] == [("ignored", "karras")]


def test_a_negative_prompt_that_nothing_would_hear_is_refused(
    flux_folder: Path, tmp_path: Path
) -> None:
    model = {"model_url": str(flux_folder)}
    for field, value in {"negative_prompt": "a boat", "clip_skip": 2}.items():
        with pytest.raises(InputError, match=f"`{field}`"):
            picture(tmp_path, wanted(model=model, **{field: value}))


def test_pictures_are_of_prompts_as_long_as_the_base_model_is_told(
    flux_folder: Path, sd15_folder: Path, tmp_path: Path
) -> None:
    model = {"model_url": str(flux_folder), "max_sequence_length": 32}
    pipeline = DiffusionPipeline.from_pretrained(flux_folder, local_files_only=True)

    short = picture(tmp_path, wanted(model=model))
    of_32, of_512 = (stock(pipeline, width=64, height=64, max_sequence_length=n) for n in (32, 512))

    assert np.abs(short - of_32).max() <= 1
    assert np.abs(short - of_512).max() > 1
    deaf = {"model_url": str(sd15_folder), "max_sequence_length": 32}
    events = SHARED.generate(wanted(model=deaf), RunFolder(tmp_path), never)
    assert [note[:2] for note in notes_of(events)] == [("ignored", "model.max_sequence_length")]


def test_prompts_are_as_long_as_a_run_s_captions_on_whatever_base_model(
    flux_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    leaves = {"target_unet_modules": ["x_embedder"], "max_sequence_length": 32}
    run = finished(tmp_path / "short", flux_folder, photo_folder, **leaves)
    named = {"model_url": str(flux_folder)}

    ours, elsewhere = picture(tmp_path, wanted(run)), picture(tmp_path, wanted(run, model=named))
    other = wanted(run, model=named | {"max_sequence_length": 512})
    notes = notes_of(list(SHARED.generate(other, RunFolder(tmp_path), never)))

    assert np.array_equal(ours, elsewhere)
    assert [note[:2] for note in notes] == [("warning", "model.max_sequence_length")]
    assert "captions of 32 tokens; prompts have 512" in notes[0][2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guide": "depth"}, "`guide` and `guide_image` come together"),
        ({"guide_mask": "m.png"}, "`guide_mask` is for"),
        ({"canny_thresholds": (1, 2)}, "`canny_thresholds` are for"),
        ({"depth_estimator": "some/model"}, "`depth_estimator` is for"),
    ],
)
def test_parts_of_a_guide_that_do_not_belong_together_are_refused(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        wanted(**given)
