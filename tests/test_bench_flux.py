"""The benchmark of FLUX.1's steps, on a base model and pictures small enough for a test."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import bench_flux
import pytest
import torch
from bench_flux import CASES, Case
from click.testing import CliRunner
from safetensors.torch import load_file

from trainer import base_model
from trainer.base_model import Precision
from trainer.config import ModelConfig

SHARD_BYTES = 100_000
SMALL = {"resolution_width": 64, "resolution_height": 64, "rank": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "flux"
    bench_flux.make_base_model(
        folder, small=True, t5_layers=1, device=torch.device("cpu"), shard_bytes=SHARD_BYTES
    )
    return folder


def test_the_described_model_has_as_many_weights_as_the_published_one(tmp_path: Path) -> None:
    base = bench_flux.describe(tmp_path / "flux", small=False, t5_layers=24)
    counts = {
        part: sum(p.numel() for p in base_model.skeleton(base, part).parameters())
        for part in bench_flux.TRUE_SIZES
    }
    # Numbers in the headers of the published files: FLUX.1 [dev], CLIP-L, the encoder of T5 XXL.
    assert counts == {
        "transformer": 11_901_408_320,
        "vae": 83_819_683,
        "text_encoder": 123_060_480,
        "text_encoder_2": 4_762_310_656,
    }
    assert base.native_size == 1024


def test_fewer_layers_of_t5_take_less_disk_and_change_no_width(tmp_path: Path) -> None:
    bench_flux.describe(tmp_path / "flux", small=False, t5_layers=2)
    config = json.loads((tmp_path / "flux" / "text_encoder_2" / "config.json").read_text())
    assert (config["num_layers"], config["d_model"]) == (2, 4096)


def test_every_weight_is_written_in_shards_that_stay_small_and_can_be_loaded(model: Path) -> None:
    files = sorted((model / "transformer").glob("*.safetensors"))
    # 270 kB, and a shard ends where the next tensor has no room.
    assert 3 <= len(files) <= 5
    for file in files:
        size = sum(tensor.nbytes for tensor in load_file(file).values())
        assert size <= SHARD_BYTES
    every = dict.fromkeys(("frozen", "denoiser", "vae", "text_encoders"), torch.bfloat16)
    base = base_model.locate(ModelConfig(model_url=str(model)))
    family = base_model.load(base, Precision(**every))
    written = {name: t for file in files for name, t in load_file(file).items()}
    loaded = family.denoiser.state_dict()
    assert loaded.keys() == written.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in written.items())


def test_weights_are_normal_numbers_norms_ones_and_biases_zeros(model: Path) -> None:
    files = (model / "transformer").glob("*.safetensors")
    weights = {name: t.float() for file in files for name, t in load_file(file).items()}
    matrix = weights["transformer_blocks.0.ff.net.0.proj.weight"]
    assert float(matrix.std()) == pytest.approx(0.02, rel=0.05)
    assert float(matrix.mean()) == pytest.approx(0, abs=0.002)
    assert set(weights["transformer_blocks.0.attn.norm_q.weight"].tolist()) == {1.0}
    assert not weights["x_embedder.bias"].any()


@pytest.mark.parametrize("name", CASES)
def test_a_case_is_the_training_that_its_name_says(name: str, model: Path) -> None:
    config = bench_flux.configuration(CASES[name], model, Path("photos"), steps=12)
    kind, _, rest = name.partition("-")
    assert config.adapter.use_lora == (kind != "full")
    assert config.adapter.use_dora == (kind == "dora")
    assert config.optim.fused_backward == (kind == "full")
    assert config.run.gradient_checkpointing == (kind in ("flux", "full") or "ckpt" in rest)
    assert not config.prior.with_prior_preservation
    assert config.model.quantization == {"16gb": "fp8", "12gb": "nf4"}.get(rest, "none")
    assert (config.run.offload_blocks > 0) == (rest == "24gb")
    if kind != "flux":
        assert config.data.resolution_width == int(rest.split("-")[0])


def test_the_usual_time_is_the_median_after_the_warm_up() -> None:
    assert bench_flux.usual_seconds([9.0, 5.0, 5.0, 1.0, 3.0, 2.0]) == 2.0


def in_this_process(command: list[str], answer: Path, **given: Any) -> Any:
    """What `apart` does, without loading all libraries once more."""
    done = CliRunner().invoke(bench_flux.main, command[2:])
    assert done.exit_code == 0, done.output
    return json.loads(answer.read_text())


def test_a_case_that_fails_is_recorded_and_the_others_go_on_and_stay_in_the_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_flux, "apart", in_this_process)
    monkeypatch.setattr(bench_flux, "MEGAPIXELS", 0.05)
    monkeypatch.setitem(CASES, "lora-512", Case({"resolution_width": 63}))
    monkeypatch.setitem(CASES, "lora-768", Case(SMALL))
    monkeypatch.setitem(CASES, "flux-12gb", Case({"rank": 0}))
    out = tmp_path / "benchmarks" / "flux.json"
    words = ["run", str(model), "--out", str(out), "--steps", "4", "--compare-estimate"]
    for cases in ("lora-512,lora-768", "flux-12gb"):
        done = CliRunner().invoke(bench_flux.main, [*words, "--cases", cases])
        assert done.exit_code == 0, done.output

    told = json.loads(out.read_text())
    assert list(told["cases"]) == ["lora-512", "lora-768", "flux-12gb"]
    assert told["model"]["small"] is True
    assert told["machine"]["torch"] == torch.__version__
    for name, field in (("lora-512", "resolution_width"), ("flux-12gb", "rank")):
        assert told["cases"][name]["status"] == "input"
        assert field in told["cases"][name]["message"]
    case = told["cases"]["lora-768"]
    assert case["status"] == "done"
    assert len(case["steps"]["each"]) == 4
    assert case["step_seconds"] == case["steps"]["each"][3]
    assert case["settings"] == {"preset": None, **SMALL, "steps": 4}
    assert case["forecast_gib"] > 0
    assert case["host_peak_gib"] > 0.1


def test_figures_of_another_model_are_not_mixed(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "flux.json"
    earlier = {"machine": bench_flux.machine(), "model": {"small": False}, "cases": {}}
    out.write_text(json.dumps(earlier))
    done = CliRunner().invoke(bench_flux.main, ["run", str(model), "--out", str(out)])
    assert done.exit_code == 2
    assert "another machine or model" in done.output


def test_steps_alone_leave_no_checkpoint_and_delivery_leaves_files(
    model: Path, photo_folder: Path, tmp_path: Path
) -> None:
    config = bench_flux.configuration(Case(SMALL), model, photo_folder, steps=4)
    alone = bench_flux.measure(config, tmp_path / "alone", deliver=False)
    assert "delivery" not in alone
    assert not list((tmp_path / "alone").rglob("*.safetensors"))
    whole = bench_flux.measure(config, tmp_path / "whole", deliver=True)
    assert whole["delivery"]["seconds"] > 0
    assert list((tmp_path / "whole" / "outputs").glob("*.safetensors"))


def test_a_process_that_crashes_or_takes_too_long_is_an_answer(tmp_path: Path) -> None:
    answer = tmp_path / "answer.json"
    crash = "import sys; print('no more memory', file=sys.stderr); sys.exit(9)"
    told = bench_flux.apart([sys.executable, "-c", crash], answer, limit=60)
    assert told == {"status": "crash", "message": "ended with 9: no more memory"}
    sleep = "import time; time.sleep(60)"
    told = bench_flux.apart([sys.executable, "-c", sleep], answer, limit=0.3)
    assert told["status"] == "time limit"


def test_the_ratio_is_the_measured_peak_over_the_forecast() -> None:
    told = bench_flux.with_ratio({"peak_gib": 30.0, "forecast_gib": 24.0})
    assert told["ratio"] == 1.25
    assert "ratio" not in bench_flux.with_ratio({"peak_gib": None, "forecast_gib": 24.0})


def test_a_person_reads_time_peak_and_failure() -> None:
    done = {"status": "done", "step_seconds": 0.57, "peak_gib": 30.0, "ratio": 1.25}
    assert "570 ms a step, 30.00 GiB at most, 1.250 of the forecast" in bench_flux.line("a", done)
    failed = {"status": "memory", "message": "CUDA out of memory"}
    assert bench_flux.line("a", failed).endswith("memory: CUDA out of memory")
