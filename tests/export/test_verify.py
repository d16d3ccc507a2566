"""Verification passes every right file and fails every broken one."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checking import rewrite, run_verification
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline, UNet2DConditionModel
from trained_adapters import TrainedAdapter

from trainer.events import StageEvent, VerifyEvent
from trainer.export import verify as verification
from trainer.export.diffusers import FILE_NAME, write_diffusers, write_peft_folders
from trainer.export.facts import TrainingFacts
from trainer.export.full import write_denoiser
from trainer.export.kohya import write_kohya
from trainer.export.state import MAGNITUDE, AdapterState, Strength, largest_ranks
from trainer.names import KohyaNames

# A few layers of every kind: what holds for them holds for all, and readers take their time by
# layer.
FEW = (
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "mid_block.resnets.0.conv1",
    "down_blocks.0.resnets.0.conv1",
)

ADAPTERS = {
    "lora": ("lora", {}),
    "lora with another alpha": ("lora", {"alpha": 2, "targets": FEW}),
    "lora with mixed ranks": (
        "lora",
        {"rank": 8, "alpha": 8, "second_rank": 2, "targets": ("to_k", "to_q")},
    ),
    "lora with text encoders of their own strength": (
        "lora",
        {"alpha": 2, "text": Strength(3, 5.0), "targets": FEW},
    ),
    "dora": ("lora", {"use_dora": True, "alpha": 2, "targets": FEW}),
    "dora with text encoders of their own strength": (
        "lora",
        {"use_dora": True, "alpha": 2, "text": Strength(8, 3.0), "targets": FEW},
    ),
    "lokr": ("lokr", {"alpha": 2, "targets": FEW}),
    "lokr in factors of 4": (
        "lokr",
        {"alpha": 2, "targets": FEW, "decompose_factor": 4, "decompose_both": True},
    ),
    "lokr with Tucker cores": ("lokr", {"alpha": 2, "targets": FEW, "use_effective_conv2d": True}),
    "lokr with text encoders of their own strength": (
        "lokr",
        {"alpha": 2, "text": Strength(2, 6.0), "targets": FEW},
    ),
    "loha": ("loha", {"alpha": 2, "targets": FEW}),
    "loha with text encoders of their own strength": (
        "loha",
        {"alpha": 2, "text": Strength(2, 6.0), "targets": FEW},
    ),
    "loha with Tucker cores": ("loha", {"alpha": 2, "targets": FEW, "use_effective_conv2d": True}),
}


# Every kind on one family, and one of each algorithm on the other too: names and text encoders
# are all that differs, and no algorithm has names of its own.
CASES = [("sdxl", kind) for kind in ADAPTERS] + [
    ("sd15", kind) for kind in ("lora", "dora", "lokr", "loha")
]


def write_all(
    root: Path, adapter: TrainedAdapter, facts: TrainingFacts, dtype: torch.dtype
) -> list[tuple[str, Path]]:
    """Every file that there is for an adapter, with its role."""
    diffusers, kohya = root / FILE_NAME, root / "astronaut.safetensors"
    write_diffusers(diffusers, adapter.state, dtype)
    write_kohya(kohya, adapter.state, adapter.names, facts, dtype)
    files = [("diffusers_lora", diffusers), ("kohya_lora", kohya)]
    if adapter.state.use_dora:
        marked = root / "astronaut_comfyui.safetensors"
        write_kohya(
            marked,
            adapter.state,
            adapter.names,
            facts,
            dtype,
            convention="comfyui",
            base_weight=adapter.base_weight,
        )
        files.append(("kohya_lora_comfyui", marked))
    folders = write_peft_folders(root / "peft", adapter.state, dtype)
    return [*files, *(("peft_folder", path) for path in folders)]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_every_reader_gets_the_trained_weights_from_every_file(
    kind: str,
    family: str,
    trained: Callable[..., TrainedAdapter],
    facts: TrainingFacts,
    tmp_path: Path,
) -> None:
    algorithm, options = ADAPTERS[kind]
    adapter = trained(family, algorithm, **options)
    files = write_all(tmp_path, adapter, facts, torch.float32)

    checks, _ = run_verification(tmp_path, files, adapter)

    assert {c.status for c in checks if c.reader != "diffusers"} <= {"passed", "not checked"}
    assert not [check for check in checks if check.status == "failed"]
    weight_files = {path.name for _, path in files if path.suffix == ".safetensors"}
    assert {Path(c.path).name for c in checks if c.status == "passed"} == weight_files
    for check in checks:
        if check.status == "passed":
            assert check.keys_matched == check.keys_total > 0
            assert check.largest_change_difference < 1e-5


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 5e-2)], ids=["fp16", "bf16"]
)
@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "loha"])
def test_short_number_formats_pass_within_their_tolerance(
    kind: str,
    dtype: torch.dtype,
    tolerance: float,
    trained: Callable[..., TrainedAdapter],
    facts: TrainingFacts,
    tmp_path: Path,
) -> None:
    algorithm, options = ADAPTERS[kind]
    adapter = trained("sd15", algorithm, **{**options, "targets": FEW})
    files = write_all(tmp_path, adapter, facts, dtype)

    checks, _ = run_verification(tmp_path, files, adapter)

    assert not [check for check in checks if check.status == "failed"]
    assert {check.tolerance for check in checks if check.status == "passed"} == {tolerance}
    assert max(check.largest_change_difference or 0 for check in checks) > 1e-5


def test_a_reader_that_does_not_apply_is_never_called_passed(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts, tmp_path: Path
) -> None:
    adapter = trained("sdxl", "lora", use_dora=True, alpha=2, targets=FEW)
    files = write_all(tmp_path, adapter, facts, torch.float32)

    checks, _ = run_verification(tmp_path, files, adapter)

    unchecked = {(c.path, c.reader) for c in checks if c.status == "not checked"}
    assert unchecked == {
        ("astronaut.safetensors", "diffusers"),
        ("astronaut_comfyui.safetensors", "diffusers"),
        ("astronaut_comfyui.safetensors", "lycoris"),
    }
    assert all(check.reason for check in checks if check.status == "not checked")


def test_verification_says_where_it_is_and_what_it_found(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts, tmp_path: Path
) -> None:
    adapter = trained("sd15", targets=FEW)
    files = write_all(tmp_path, adapter, facts, torch.float32)

    checks, events = run_verification(tmp_path, files, adapter)

    found = [event for event in events if isinstance(event, VerifyEvent)]
    stages = [event for event in events if isinstance(event, StageEvent)]
    assert len(found) == len(checks) == 7
    assert (stages[0].done, stages[-1].done, stages[-1].total) == (0, 7, 7)
    assert {event.path for event in found} == {check.path for check in checks}


def test_the_report_is_the_same_bytes_for_the_same_files(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts, tmp_path: Path
) -> None:
    adapter = trained("sd15", "lora", use_dora=True, alpha=2, targets=FEW)
    files = write_all(tmp_path, adapter, facts, torch.float32)
    reports = [tmp_path / "first.json", tmp_path / "second.json"]

    for report in reports:
        checks, _ = run_verification(tmp_path, files, adapter)
        verification.write_report(report, checks)

    assert reports[0].read_bytes() == reports[1].read_bytes()
    content = json.loads(reports[0].read_text())
    assert content["passed"] is True
    assert str(tmp_path) not in reports[0].read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_a_fully_trained_denoiser_comes_back_exactly(
    dtype: torch.dtype, trained: Callable[..., TrainedAdapter], tmp_path: Path
) -> None:
    adapter, files = _fully_trained(trained, tmp_path, dtype)

    checks, _ = run_verification(tmp_path, files, adapter)

    assert [(check.reader, check.status) for check in checks] == [("diffusers", "passed")]
    assert checks[0].keys_matched == checks[0].keys_total == len(adapter.weights["unet"])


def test_a_fully_trained_denoiser_is_loaded_while_no_base_model_is_held(
    trained: Callable[..., TrainedAdapter], tmp_path: Path
) -> None:
    adapter, files = _fully_trained(trained, tmp_path, torch.float32)
    before = _living_denoisers()
    at_the_base_model: list[int] = []

    def fresh() -> object:
        at_the_base_model.append(_living_denoisers() - before)
        # Loading the folder from here on, beside the base model, would fail.
        (tmp_path / "unet" / "config.json").unlink()
        return adapter.fresh()

    written = [verification.WrittenFile(role, path, adapter.weights) for role, path in files]
    stage = verification.verify(tmp_path, written, fresh, adapter.names)
    events = list(stage)

    assert [event.status for event in events if isinstance(event, VerifyEvent)] == ["passed"]
    assert at_the_base_model == [0]


def _living_denoisers() -> int:
    return sum(type(found) is UNet2DConditionModel for found in gc.get_objects())


def test_a_fully_trained_denoiser_without_its_configuration_fails(
    trained: Callable[..., TrainedAdapter], tmp_path: Path
) -> None:
    adapter, files = _fully_trained(trained, tmp_path, torch.float32)
    (tmp_path / "unet" / "config.json").unlink()

    checks, _ = run_verification(
        tmp_path, [file for file in files if file[1].suffix == ".safetensors"], adapter
    )

    assert [check.status for check in checks] == ["failed"]


def test_a_model_whose_original_names_are_unknown_is_not_checked(
    facts: TrainingFacts, tmp_path: Path
) -> None:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    pipeline = StableDiffusion3Pipeline(transformer, *[None] * 8)
    path = "transformer_blocks.0.attn.to_q"
    weight = transformer.get_submodule(path).weight.detach()
    factors = {
        f"{path}.lora_A.weight": torch.ones(2, 32),
        f"{path}.lora_B.weight": torch.ones(32, 2),
    }
    strengths = {"transformer": Strength(2, 2.0)}
    state = AdapterState("lora", False, {"transformer": factors}, strengths)
    names = KohyaNames(
        denoiser_prefix="lora_unet",
        text_encoder_prefixes={},
        base_model_version="sd3",
        architecture="stable-diffusion-3",
        implementation="",
        denoiser="transformer",
        layers={"transformer_blocks": "joint_blocks"},
    )
    file = tmp_path / "a.safetensors"
    write_kohya(file, state, names, facts, torch.float32)
    # Ones times ones over a rank of 2: every weight grows by 2.
    adapter = TrainedAdapter(state, {"transformer": {path: weight + 2}}, pipeline, names)

    checks, _ = run_verification(tmp_path, [("kohya_lora", file)], adapter)

    found = {check.reader: (check.status, check.reason) for check in checks}
    reason = "the original names of the layers of SD3Transformer2DModel cannot be worked out"
    assert found["lycoris"] == found["formula"] == ("not checked", reason)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_file_of_an_adapter_that_learnt_nothing_says_so(
    use_dora: bool, trained: Callable[..., TrainedAdapter], tmp_path: Path
) -> None:
    learnt = trained("sd15", targets=FEW, use_dora=use_dora)
    base = {
        component: {path: learnt.base_weight(component, path) for path in layers}
        for component, layers in learnt.weights.items()
    }
    adapter = TrainedAdapter(_without_change(learnt, base), base, learnt.base, learnt.names)
    found = []

    for each, name in ((learnt, "learnt"), (adapter, "nothing")):
        write_diffusers(tmp_path / name, each.state, torch.float32)
        file = (tmp_path / name).rename(tmp_path / f"{name}.safetensors")
        checks, _ = run_verification(tmp_path, [("diffusers_lora", file)], each)
        assert {check.status for check in checks} == {"passed"}
        found.append(verification.nothing_learnt(checks))

    assert found == [False, True]


def _without_change(
    adapter: TrainedAdapter, base: dict[str, dict[str, torch.Tensor]]
) -> AdapterState:
    """The adapter as it is before training: B zero, magnitudes the norms of the base's rows."""
    layers = adapter.state.layers()
    for (component, path), parts in layers.items():
        parts["lora_B"] = torch.zeros_like(parts["lora_B"])
        if MAGNITUDE in parts:
            norms = torch.linalg.vector_norm(base[component][path].flatten(1), dim=1)
            parts[MAGNITUDE] = norms.view_as(parts[MAGNITUDE])
    return AdapterState.of_layers("lora", largest_ranks(layers), layers)


@pytest.mark.parametrize("fault", ["nan", "changed", "missing"])
def test_a_fully_trained_denoiser_with_a_fault_fails(
    fault: str, trained: Callable[..., TrainedAdapter], tmp_path: Path
) -> None:
    adapter, files = _fully_trained(trained, tmp_path, torch.float32, fault)

    checks, _ = run_verification(tmp_path, files, adapter)

    assert [check.status for check in checks] == ["failed"]


def _fully_trained(
    trained: Callable[..., TrainedAdapter], root: Path, dtype: torch.dtype, fault: str = ""
) -> tuple[TrainedAdapter, list[tuple[str, Path]]]:
    base = trained("sd15", targets=FEW)
    unet = base.fresh().unet
    torch.manual_seed(3)
    weights = {
        name: parameter.detach() + 1e-3 * torch.randn_like(parameter)
        for name, parameter in unet.named_parameters()
    }
    stored = dict(weights)
    if fault == "changed":
        stored["conv_in.bias"] = stored["conv_in.bias"] * 1.001
    if fault == "missing":
        del stored["mid_block.resnets.0.conv1.weight"]
    written = write_denoiser(root / "unet", stored, unet.config, dtype)
    if fault == "nan":
        rewrite(written[1], lambda tensors, _: tensors["conv_in.weight"].fill_(float("nan")))
    adapter = TrainedAdapter(base.state, {"unet": weights}, base.base, base.names)
    roles = ("denoiser_config", "denoiser_weights")
    return adapter, list(zip(roles, written, strict=True))
