"""What only a GPU can show of speed: CUDA graphs, layouts, compiled blocks, and no waiting."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import bench_gpu
import pytest
import torch
from click.testing import CliRunner
from snapshots import watched
from tiny import compose, configuration, losses
from torch.nn import Parameter

from trainer import optim
from trainer.config import OptimConfig
from trainer.events import NoteEvent
from trainer.optim import (
    CAPTURABLE,
    ParameterGroup,
    build_optimizer,
    build_schedule,
    make_capturable,
    step_where,
)
from trainer.resident import Rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

GPU = torch.device("cuda")
# Enough steps for a recording to pay, and most of them played.
STEPS = 60
LEAVES: dict[str, Any] = {
    "max_train_steps": STEPS,
    "mixed_precision": "bf16",
    "target_unet_modules": ["attn1.to_q", "conv1"],
    "lr_scheduler": "cosine",
}
FORMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "lokr": {"lora_type": "lokr"},
    "loha": {"lora_type": "loha"},
    "prodigy": {"optimizer": "prodigy"},
    "accumulated": {"gradient_accumulation_steps": 2},
    "recomputed": {"gradient_checkpointing": True},
    "lent caption": {"batch_size": 2, "target_unet_modules": ["attn2.to_k", "attn2.to_v"]},
    "32 bits": {"mixed_precision": "no"},
    "int8": {"quantization": "int8"},
    "all weights": {"use_lora": False, "target_unet_modules": ..., "learning_rate": 1e-5},
}


def told(model: Path, photos: Path, folder: Path, **leaves: Any) -> tuple[list[float], list[str]]:
    """The losses of a training's steps, and which options it warned of."""
    given = {name: value for name, value in (LEAVES | leaves).items() if value is not ...}
    training, _ = compose(configuration(model, photos, **given), folder)
    _, events = watched(training, folder)
    warned = [e.field for e in events if isinstance(e, NoteEvent) and e.note == "warning"]
    return losses(events), warned


@pytest.mark.parametrize("form", FORMS)
def test_a_cuda_graph_learns_what_computed_steps_learn(
    form: str, sdxl_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    computed, _ = told(sdxl_folder, photo_folder, tmp_path / "1", cuda_graph=False, **FORMS[form])
    played, warned = told(sdxl_folder, photo_folder, tmp_path / "2", **FORMS[form])
    assert "cuda_graph" not in warned
    assert played == pytest.approx(computed, rel=1e-2)


def test_a_cuda_graph_can_be_asked_for_with_flux(
    flux_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    leaves = {"target_unet_modules": ["to_q"], "cuda_graph": True}
    assert len(told(flux_folder, photo_folder, tmp_path, **leaves)[0]) == STEPS


@pytest.mark.parametrize("leaf", ["channels_last", "compile_blocks", "tf32"])
def test_what_is_computed_otherwise_learns_the_same_but_for_rounding(
    leaf: str, sdxl_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    plain, _ = told(sdxl_folder, photo_folder, tmp_path / "1", **{leaf: False})
    other, _ = told(sdxl_folder, photo_folder, tmp_path / "2", **{leaf: True})
    assert other == pytest.approx(plain, rel=2e-2)


@pytest.mark.parametrize("backend", ["flash", "efficient", "math"])
def test_each_attention_learns_the_same_but_for_rounding(
    backend: str, sdxl_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    plain, _ = told(sdxl_folder, photo_folder, tmp_path / "1")
    other, _ = told(sdxl_folder, photo_folder, tmp_path / "2", attention=backend)
    assert other == pytest.approx(plain, rel=2e-2)


@pytest.mark.parametrize("name", CAPTURABLE)
def test_a_graph_of_the_optimizers_step_follows_the_schedule_and_leaves_out_what_is_odd(
    name: Any,
) -> None:
    settings = OptimConfig(optimizer=name, lr_scheduler="cosine", lr_warmup_steps=3)

    def start() -> tuple[Parameter, torch.optim.Optimizer, Any]:
        weight = Parameter(torch.ones(64, 128, device=GPU))
        weight.grad = torch.zeros_like(weight)
        group = ParameterGroup("denoiser", [weight], learning_rate=0.5, weight_decay=0.1)
        optimizer = build_optimizer([group], settings)
        return weight, optimizer, build_schedule(optimizer, settings, 20)

    torch.manual_seed(0)
    gradients = torch.randn(20, 64, 128, device=GPU) + 1
    gradients[7, 5, 7] = math.nan
    plain, plain_optimizer, plain_schedule = start()
    captured, optimizer, schedule = start()
    make_capturable(optimizer, name)
    allowed, graph = torch.ones((), dtype=torch.bool, device=GPU), torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    assert plain.grad is not None
    assert captured.grad is not None
    for step in range(20):
        allowed.fill_(step != 7)
        plain.grad.copy_(gradients[step])
        step_where(plain_optimizer, name, allowed)
        captured.grad.copy_(gradients[step])
        if step < 3:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step_where(optimizer, name, allowed)
            torch.cuda.current_stream().wait_stream(side)
        else:
            if step == 3:
                with torch.cuda.graph(graph, stream=side):
                    step_where(optimizer, name, allowed)
            graph.replay()
        plain_schedule.step()
        schedule.step()
    torch.testing.assert_close(captured - 1, plain - 1, rtol=1e-4, atol=1e-7)


def test_prodigys_step_and_clipping_do_not_wait_for_the_gpu() -> None:
    weights = [Parameter(torch.ones(8, 8, device=GPU)) for _ in range(5)]
    group = ParameterGroup("denoiser", weights, learning_rate=1.0, weight_decay=0.1)
    optimizer = build_optimizer([group], OptimConfig(optimizer="prodigy"))
    allowed = torch.ones((), dtype=torch.bool, device=GPU)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            optim.clip(weights, 1.0)
            step_where(optimizer, "prodigy", allowed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_copies_two_small_tensors_for_its_inputs_and_waits_for_nothing(
    sdxl_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    training, _ = compose(configuration(sdxl_folder, photo_folder, **LEAVES), tmp_path)
    batch, encodings = training.dataset[0][0], training.encodings
    encodings.inputs(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        inputs = encodings.inputs(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert encodings.resident
    assert {tensor.device.type for tensor in inputs.flat().values()} == {"cuda"}


def test_rows_beside_the_gpu_are_the_same_rows() -> None:
    columns = {"mean": torch.rand(5, 4, 8, 8)}
    rows = torch.tensor([3, 0])
    here, beside = (Rows(columns, GPU, resident=r).at(rows)["mean"] for r in (True, False))
    assert beside.is_cuda
    assert torch.equal(here, beside)


def test_pixels_of_a_batch_come_in_page_locked_memory(
    sdxl_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    leaves = LEAVES | {"cache_latents": False}
    training, _ = compose(configuration(sdxl_folder, photo_folder, **leaves), tmp_path)
    (batch,) = next(training._batches())
    assert batch.pixels is not None
    assert batch.pixels.is_pinned()


def test_the_benchmark_measures_small_models(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    names = "sdxl-1024-b1-lora,fal-default,flux-512-b1-lora"
    words = ["run", "--small", "--models", str(tmp_path / "models"), "--out", str(out)]
    done = CliRunner().invoke(bench_gpu.main, [*words, "--steps", "4", "--cases", names])
    assert done.exit_code == 0, done.output
    measured = json.loads(out.read_text())
    assert measured["ceilings"]["bf16_tflops"] > 1
    for row in measured["cases"].values():
        assert row["status"] == "done", row
        assert row["kernels"] > 10
        assert 0 < row["busy_share"] <= 1
        assert min(row["host_ms"], row["peak_gib"]) > 0
