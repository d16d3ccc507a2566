"""The benchmark on a GPU: its models, cases and file, tried on models small enough for a test."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_gpu
import gpu_measures
import make_random_models
import pytest
import torch
from bench_gpu import apart, configuration
from click.testing import CliRunner
from count_step import counted
from gpu_cases import CASES, FAL, Bounds, Case
from gpu_rows import FIGURES, UNMEASURED, foretold, line, row, unknown_options
from make_random_models import TRUE_SIZES
from safetensors.torch import load_file
from step_meter import HOST_STEPS, SEEN_STEPS, Meter, covered, summary
from torch.autograd import DeviceType

from trainer import base_model
from trainer.base_model import Precision
from trainer.config import LEAVES, ModelConfig

SHARD_BYTES = 100_000
ONE_LAYER = {"target_unet_modules": ["transformer_blocks.0.attn.to_q"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    make_random_models.make_base_model(
        "flux",
        folder / "flux",
        small=True,
        t5_layers=1,
        device=torch.device("cpu"),
        shard_bytes=SHARD_BYTES,
    )
    return folder


# In the headers of the published files: stable-diffusion-v1-5, SDXL base 1.0, FLUX.1 [dev]; of T5
# the encoder alone.
PUBLISHED = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
    "flux": {
        "transformer": 11_901_408_320,
        "vae": 83_819_683,
        "text_encoder": 123_060_480,
        "text_encoder_2": 4_762_310_656,
    },
}


@pytest.mark.parametrize(("family", "size"), [("sd15", 512), ("sdxl", 1024), ("flux", 1024)])
def test_a_described_model_has_as_many_weights_as_the_published_one(
    family: str, size: int, tmp_path: Path
) -> None:
    base = make_random_models.describe(family, tmp_path / family, small=False, t5_layers=24)
    counts = {
        part: sum(p.numel() for p in base_model.skeleton(base, part).parameters())
        for part in TRUE_SIZES[family]
    }
    assert counts == PUBLISHED[family]
    assert base.native_size == size


def test_fewer_layers_of_t5_take_less_disk_and_change_no_width(tmp_path: Path) -> None:
    make_random_models.describe("flux", tmp_path / "flux", small=False, t5_layers=2)
    config = json.loads((tmp_path / "flux" / "text_encoder_2" / "config.json").read_text())
    assert (config["num_layers"], config["d_model"]) == (2, 4096)


def test_every_weight_is_written_in_shards_that_stay_small_and_can_be_loaded(models: Path) -> None:
    files = sorted((models / "flux" / "transformer").glob("*.safetensors"))
    # 270 kB, and a shard ends where the next tensor has no room.
    assert 3 <= len(files) <= 5
    for file in files:
        size = sum(tensor.nbytes for tensor in load_file(file).values())
        assert size <= SHARD_BYTES
    every = dict.fromkeys(("frozen", "denoiser", "vae", "text_encoders"), torch.bfloat16)
    base = base_model.locate(ModelConfig(model_url=str(models / "flux")))
    family = base_model.load(base, Precision(**every))
    written = {name: t for file in files for name, t in load_file(file).items()}
    loaded = family.denoiser.state_dict()
    assert loaded.keys() == written.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in written.items())


def test_weights_are_normal_numbers_norms_ones_and_biases_zeros(models: Path) -> None:
    files = (models / "flux" / "transformer").glob("*.safetensors")
    weights = {name: t.float() for file in files for name, t in load_file(file).items()}
    matrix = weights["transformer_blocks.0.ff.net.0.proj.weight"]
    assert float(matrix.std()) == pytest.approx(0.02, rel=0.05)
    assert float(matrix.mean()) == pytest.approx(0, abs=0.002)
    assert set(weights["transformer_blocks.0.attn.norm_q.weight"].tolist()) == {1.0}
    assert not weights["x_embedder.bias"].any()


KNOWN = [name for name, case in CASES.items() if unknown_options(case) is None]


@pytest.mark.parametrize("name", KNOWN)
def test_a_case_is_the_training_that_its_name_says(name: str) -> None:
    case = CASES[name]
    config = configuration(case, Path("model"), Path("photos"), steps=12)
    words = name.split("-")
    assert config.adapter.use_lora == ("full" not in words)
    assert config.adapter.use_dora == ("dora" in words or "fal" in words)
    assert config.adapter.lora_type == next((w for w in words if w in ("lokr", "loha")), "lora")
    assert config.prior.with_prior_preservation == ("fal" in words)
    quantised = (
        {"16gb": "fp8", "12gb": "nf4", "8gb": "fp8"} if "flux" in words or "8gb" in words else {}
    )
    named = next((word for word in words if word in ("int8", "fp8", "nf4")), None)
    assert config.model.quantization == (named or quantised.get(words[-1], "none"))
    if case.preset is None and "fal" not in words:
        assert config.data.resolution_width == int(words[1])
        assert config.run.batch_size == int(words[2].removeprefix("b"))
        assert bool(config.run.gradient_checkpointing) == ("ckpt" in words)


def test_fals_default_job_is_what_the_service_trains() -> None:
    config = configuration(CASES["fal-default"], Path("model"), Path("photos"), steps=1000)
    assert config.data.resolution_width == config.data.resolution_height == 768
    assert config.run.batch_size == 6
    assert list(config.adapter.target_unet_modules) == FAL["target_unet_modules"]
    # Given, so that none are made.
    assert config.prior.class_images_url == "photos"


def test_options_of_another_trainer_are_told_and_not_tried() -> None:
    told = unknown_options(Case("sdxl", {"rank": 2, "warp_drive": True}))
    assert told == {"status": "unknown options", "message": "this trainer has no warp_drive"}
    assert unknown_options(Case("sdxl", {"rank": 2})) is None
    assert "rank" in LEAVES


def test_a_step_is_counted_as_its_formulas_say(models: Path) -> None:
    base = base_model.locate(ModelConfig(model_url=str(models / "flux")))
    narrow = torch.float32
    precision = Precision(frozen=narrow, denoiser=narrow, vae=narrow, text_encoders=narrow)
    cpu = torch.device("cpu")

    def tflop(**leaves: Any) -> float:
        case = Case("flux", {"rank": 4, **ONE_LAYER, "mixed_precision": "no", **leaves})
        config = configuration(case, models / "flux", Path("photos"), 1, small=True)
        config = config.with_leaf("rank", leaves.get("rank", 4))
        return counted(config, base, precision, cpu).tflop * 1e12

    # 16 tokens of a picture 32 wide: A and B make 2·16·32·r each way and the gradient of each,
    # and what comes before needs no gradient: 2 products forward, 3 backward (not that to x).
    assert tflop(rank=8) - tflop(rank=4) == 5 * 2 * 16 * 32 * 4


@pytest.mark.thorough
def test_a_step_of_sdxl_takes_what_others_counted(tmp_path: Path) -> None:
    make_random_models.describe("sdxl", tmp_path / "sdxl", small=False, t5_layers=24)
    case = CASES["sdxl-1024-b1-lora"]
    told = bench_gpu.counts_of(configuration(case, tmp_path / "sdxl", Path("photos"), 1))
    # A loop around diffusers' UNet with PEFT's LoRA, under torch's own flop counter. Its forward
    # pass without attention takes 5.98, as in diffusers' published benchmarks.
    assert told["counted"]["tflop"] == pytest.approx(14.70, abs=0.02)


def test_what_is_foretold_follows_from_the_counts() -> None:
    counts = {"products_ms": 28.0, "roofline_ms": 45.0, "operations": 10_000}
    assert foretold({}, counts) == (60.0, 80.0)
    assert foretold({"cuda_graph": False}, counts) == (150.0, 250.0)
    assert foretold({"compile_blocks": True}, counts) == (40.0, 45.0)


DONE = {"status": "done", "settings": {}, "step_ms": 50.0, "host_ms": 1.0, "peak_gib": 12.0}
COUNTED = {"tflop": 20.0, "roofline_ms": 30.0, "operations": 9, "forecast_gib": 10.0}


def test_a_row_holds_bounds_against_figures() -> None:
    case = Case("sdxl", bounds=Bounds(ms=65, gib=11, mfu=0.45, whole_seconds=300))
    told = row(case, {**DONE, "counted": COUNTED}, 800.0)
    # 20 TFLOP in 50 ms are 400 TFLOP/s.
    assert told["mfu"] == pytest.approx(0.5)
    assert told["peak_over_forecast"] == pytest.approx(1.2)
    assert told["met"] == {"ms": True, "gib": False, "mfu": True, "whole_seconds": UNMEASURED}
    assert told["bound_ms"] == 65
    assert told["predicted_ms"] == [40.0, 53.3]


def test_a_person_reads_time_prediction_and_what_is_not_kept() -> None:
    told = row(Case("sdxl", bounds=Bounds(ms=40)), {**DONE, "counted": COUNTED}, UNMEASURED)
    words = line("a", told)
    assert "50.0 ms a step (foretold 40 to 53)" in words
    assert "12.00 GiB, NOT within its bound of ms" in words
    assert line("a", {"status": "memory", "message": "no room"}).endswith("memory: no room")
    assert UNMEASURED in line("a", row(Case("sdxl"), {"status": UNMEASURED}, UNMEASURED))


def follow(meter: Meter, seconds_of: Callable[[int], float], clock: list[float]) -> None:
    for step in range(meter.steps):
        clock[0] += seconds_of(step)
        meter.end_step()


def test_the_meter_times_the_steps_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("step_meter.time.perf_counter", lambda: clock[0])
    meter = Meter(timed=4, warm_up=2)
    times = [9.0, 9.0, 1.0, 2.0, 3.0, 10.0, *[0.5] * HOST_STEPS, *[0.1] * SEEN_STEPS]
    follow(meter, times.__getitem__, clock)
    told = meter.figures()
    assert meter.ended == meter.steps == len(times)
    assert told["each_ms"] == [1000, 2000, 3000, 10_000]
    assert told["step_ms"] == 2500
    assert told["mean_ms"] == 4000
    assert told["quartiles_ms"] == [1750, 4750]
    assert told["host_ms"] == pytest.approx(500)
    assert "busy_ms" not in told


@dataclass
class OnAGpu:
    """What the meter uses of a GPU, each call noted; its clock is told."""

    calls: list[str] = field(default_factory=list)
    now: float = 0.0

    def wait(self) -> None:
        self.calls.append("wait")

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        mark = SimpleNamespace(at=None)
        mark.record = lambda: setattr(mark, "at", self.now)
        mark.elapsed_time = lambda other: other.at - mark.at
        return mark

    def profile(self, activities: list[Any]) -> Any:
        def kernel(start: int, end: int, **given: Any) -> Any:
            span = SimpleNamespace(start=start, end=end)
            usual = {"device_type": DeviceType.CUDA, "is_user_annotation": False}
            return SimpleNamespace(time_range=span, **{**usual, **given})

        # Microseconds of three steps: 6 ms of kernels, and what is none.
        events = [kernel(0, 4000), kernel(3000, 5000), kernel(9000, 10_000)]
        events += [kernel(0, 99_000, is_user_annotation=True)]
        events += [kernel(0, 99_000, device_type=DeviceType.CPU)]
        note = self.calls.append
        return SimpleNamespace(
            start=lambda: note("start"), stop=lambda: note("stop"), events=lambda: events
        )


def test_on_a_gpu_nothing_is_waited_for_while_steps_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = OnAGpu()
    monkeypatch.setattr("step_meter.torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("step_meter.torch.cuda.synchronize", gpu.wait)
    monkeypatch.setattr("step_meter.torch.cuda.Event", gpu.event)
    monkeypatch.setattr("step_meter.profile", gpu.profile)
    meter = Meter(timed=4, warm_up=1)
    for _ in range(meter.steps):
        gpu.now += 8.0
        gpu.calls.append("step")
        meter.end_step()
    # The last timed step is waited for, before the host's time is taken.
    host = ["step", "wait"] * HOST_STEPS
    seen = ["start", *["step", "wait"] * SEEN_STEPS, "stop"]
    assert gpu.calls == [*["step"] * 5, "wait", *host, *seen]
    told = meter.figures()
    assert told["each_ms"] == [8.0] * 4
    assert told["kernels"] == 1
    assert told["busy_ms"] == 2
    assert told["busy_share"] == 0.25


def test_kernels_that_run_at_one_time_are_busy_once() -> None:
    assert covered([(0, 2), (5, 6), (1, 3), (1, 2)]) == 4
    assert summary([1.0, 1.0])["quartiles_ms"] == [1.0, 1.0]


def in_this_process(command: list[str], answer: Path, **given: Any) -> Any:
    """What `apart` does, without loading all libraries once more."""
    done = CliRunner().invoke(bench_gpu.main, command[2:])
    assert done.exit_code == 0, done.output
    return json.loads(answer.read_text())


def bench(*words: str) -> str:
    done = CliRunner().invoke(bench_gpu.main, list(words))
    assert done.exit_code == 0, done.output
    return done.output


def test_a_case_that_fails_is_recorded_and_the_others_go_on_and_stay_in_the_file(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_gpu, "apart", in_this_process)
    monkeypatch.setattr(bench_gpu, "MEGAPIXELS", 0.05)
    monkeypatch.setattr(bench_gpu, "PHOTOS", 2)
    good = replace(CASES["flux-512-b1-lora"], leaves=ONE_LAYER)
    monkeypatch.setitem(CASES, "flux-512-b1-lora", good)
    monkeypatch.setitem(CASES, "flux-768-b1-lora", Case("flux", {"rank": 2, "no_option": 1}))
    monkeypatch.setitem(CASES, "flux-1024-b1-lora", Case("flux", {"max_grad_norm": -1}))
    out = tmp_path / "benchmarks" / "gpu.json"
    words = ["run", "--small", "--out", str(out), "--models", str(models), "--steps", "2"]
    said = bench(*words, "--cases", "flux-512-b1-lora,flux-768-b1-lora")
    bench(*words, "--cases", "flux-1024-b1-lora")

    told = json.loads(out.read_text())
    assert list(told["cases"]) == ["flux-512-b1-lora", "flux-768-b1-lora", "flux-1024-b1-lora"]
    assert told["small"] is True
    assert told["machine"]["torch"] == torch.__version__
    case = told["cases"]["flux-512-b1-lora"]
    assert case["status"] == "done"
    assert case["last_loss"] > 0
    assert case["counted"]["forecast_gib"] > 0
    assert case["bound_ms"] == 127
    assert case["met"] == {"ms": UNMEASURED}
    assert {case[name] for name in FIGURES} == {UNMEASURED}
    assert "flux-512-b1-lora                   unmeasured" in said
    assert told["cases"]["flux-768-b1-lora"]["status"] == "unknown options"
    assert told["cases"]["flux-1024-b1-lora"]["status"] == "input"
    assert "max_grad_norm" in told["cases"]["flux-1024-b1-lora"]["message"]


def test_figures_of_another_machine_are_not_mixed_and_a_plan_becomes_this_ones(
    tmp_path: Path,
) -> None:
    out = tmp_path / "gpu.json"
    facts = {"machine": {"device": "here"}, "ceilings": {}, "small": False}
    rows = {"a": {"status": UNMEASURED}}
    out.write_text(json.dumps({**facts, "machine": {"device": UNMEASURED}, "cases": rows}))
    assert bench_gpu.begun(out, facts) == {**facts, "cases": rows}
    out.write_text(json.dumps({**facts, "small": True, "cases": {}}))
    with pytest.raises(Exception, match="another machine"):
        bench_gpu.begun(out, facts)


def test_a_plan_has_predictions_and_bounds_and_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def count(config: Any) -> dict[str, Any]:
        asked.append(config.model.model_url)
        return {"counted": COUNTED}

    monkeypatch.setattr(bench_gpu, "counts_of", count)
    out = tmp_path / "gpu.json"
    bench("plan", "--out", str(out), "--cases", "sdxl-1024-b4-lora,sdxl-1024-b1-lora")
    told = json.loads(out.read_text())
    assert told["machine"] == {"device": UNMEASURED}
    assert len(asked) == len(told["cases"]) == 2
    case = told["cases"]["sdxl-1024-b4-lora"]
    assert case["status"] == UNMEASURED
    assert case["predicted_ms"] == [40.0, 53.3]
    assert case["met"] == {"ms": UNMEASURED, "mfu": UNMEASURED}


def test_true_sizes_are_refused_without_a_gpu(tmp_path: Path) -> None:
    words = ["run", "--out", str(tmp_path / "o.json"), "--models", str(tmp_path / "models")]
    done = CliRunner().invoke(bench_gpu.main, words)
    assert done.exit_code == 2
    assert "no GPU is here" in done.output
    assert not (tmp_path / "models").exists()


def test_cases_are_chosen_by_patterns() -> None:
    assert bench_gpu.chosen("fal-default,sd15-*-peft") == ["fal-default", "sd15-512-b1-lora-peft"]
    with pytest.raises(Exception, match="no case nothing-\\*"):
        bench_gpu.chosen("fal-*,nothing-*")


def test_steps_alone_leave_no_checkpoint_and_a_whole_training_leaves_files(
    models: Path, photo_folder: Path, tmp_path: Path
) -> None:
    case = Case("flux", ONE_LAYER)
    meter = Meter(timed=2, warm_up=1)
    config = configuration(case, models / "flux", photo_folder, meter.steps, small=True)
    alone = gpu_measures.measure(config, tmp_path / "alone", meter)
    assert len(alone["each_ms"]) == 2
    assert alone["host_ms"] > 0
    assert "delivery" not in alone
    assert not list((tmp_path / "alone").rglob("*.safetensors"))
    short = configuration(case, models / "flux", photo_folder, 1, small=True)
    whole = gpu_measures.measure(short, tmp_path / "whole", None)
    assert whole["delivery"]["seconds"] > 0
    assert list((tmp_path / "whole" / "outputs").glob("*.safetensors"))


def test_a_process_that_crashes_or_takes_too_long_is_an_answer(tmp_path: Path) -> None:
    answer = tmp_path / "answer.json"
    crash = "import sys; print('no more memory', file=sys.stderr); sys.exit(9)"
    told = apart([sys.executable, "-c", crash], answer, limit=60)
    assert told == {"status": "crash", "message": "ended with 9: no more memory"}
    sleep = "import time; time.sleep(60)"
    told = apart([sys.executable, "-c", sleep], answer, limit=0.3)
    assert told["status"] == "time limit"
