"""The kohya file: names, one alpha, DoRA's two meanings and what the header tells."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trained_adapters import TABLES, TrainedAdapter

from trainer.export.facts import TrainingFacts, public_name
from trainer.export.kohya import kohya_tensors, row_norms, write_kohya
from trainer.export.readers import metadata_of
from trainer.export.state import Strength


def test_every_layer_has_one_alpha_the_rank_without_axes(
    trained: Callable[..., TrainedAdapter],
) -> None:
    adapter = trained("sdxl", rank=8, alpha=8, second_rank=2)

    tensors = kohya_tensors(adapter.state, adapter.names, torch.float16)

    alphas = {key: tensor for key, tensor in tensors.items() if key.endswith(".alpha")}
    layers = {key.split(".")[0] for key in tensors}
    assert {key.split(".")[0] for key in alphas} == layers
    assert {(tensor.ndim, float(tensor), tensor.dtype) for tensor in alphas.values()} == {
        (0, 8.0, torch.float32)
    }


@pytest.mark.parametrize("use_dora", [False, True])
def test_text_encoders_of_their_own_strength_have_the_same_alpha(
    use_dora: bool, trained: Callable[..., TrainedAdapter], facts: TrainingFacts, tmp_path: Path
) -> None:
    adapter = trained("sdxl", alpha=2, text=Strength(8, 3.0), use_dora=use_dora)

    write_kohya(tmp_path / "a", adapter.state, adapter.names, facts, torch.float32)

    tensors, header = load_file(tmp_path / "a"), metadata_of(tmp_path / "a")
    alphas = {float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")}
    assert alphas == {8.0}
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("8", "8.0")
    # By hand: readers multiply by 8 / 4, training did by 2 / 4.
    layer = adapter.state.layers()["unet", "mid_block.resnets.0.conv1"]
    up = tensors["lora_unet_middle_block_0_in_layers_2.lora_up.weight"]
    assert torch.equal(up * (8 / 4), layer["lora_B"] * (2 / 4))
    args = json.loads(header["ss_network_args"])
    assert {key: value for key, value in args.items() if "trained" in key} == {
        "trained_alpha": "2",
        "trained_dim": "4",
        "text_encoder_trained_alpha": "3",
        "text_encoder_trained_dim": "8",
        "text_encoder_2_trained_alpha": "3",
        "text_encoder_2_trained_dim": "8",
    }


def test_the_header_keeps_the_trained_rank_of_layers_that_are_one_in_the_file(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts, tmp_path: Path
) -> None:
    adapter = trained("flux", "loha", alpha=2, targets=("to_q", "to_k", "to_v"))

    write_kohya(tmp_path / "a", adapter.state, adapter.names, facts, torch.float32)

    header = metadata_of(tmp_path / "a")
    args = json.loads(header["ss_network_args"])
    # Three parts of rank 4.
    assert (header["ss_network_dim"], args["trained_dim"], args["trained_alpha"]) == (
        "12",
        "4",
        "2",
    )


@pytest.mark.parametrize("algorithm", ["lokr", "loha"])
def test_layers_that_lycoris_merges_have_their_own_rank_as_alpha(
    algorithm: str, trained: Callable[..., TrainedAdapter]
) -> None:
    adapter = trained("sd15", algorithm, rank=2, alpha=2, text=Strength(1, 6.0))

    tensors = kohya_tensors(adapter.state, adapter.names, torch.float32)

    ends = {"lokr": ".lokr_w2_b", "loha": ".hada_w2_b"}[algorithm]
    ranks = {key.split(".")[0]: len(t) for key, t in tensors.items() if key.endswith(ends)}
    assert set(ranks.values()) == {1, 2}
    assert {name: float(tensors[f"{name}.alpha"]) for name in ranks} == ranks


def test_sdxl_layers_have_their_original_names(trained: Callable[..., TrainedAdapter]) -> None:
    adapter = trained("sdxl")

    layers = {key.split(".")[0] for key in kohya_tensors(adapter.state, adapter.names, torch.half)}

    # By hand from the block diagram: down block 1 begins at input block 4.
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q" in layers
    assert "lora_unet_input_blocks_1_0_in_layers_2" in layers
    assert "lora_unet_middle_block_2_out_layers_3" in layers
    assert "lora_unet_output_blocks_5_1_transformer_blocks_0_attn2_to_out_0" in layers
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj" in layers
    assert "lora_te2_text_model_encoder_layers_2_self_attn_out_proj" in layers
    assert not any("_blocks_0_attentions" in layer or "down_blocks" in layer for layer in layers)


def test_sd15_layers_keep_their_diffusers_names(trained: Callable[..., TrainedAdapter]) -> None:
    adapter = trained("sd15")

    layers = {key.split(".")[0] for key in kohya_tensors(adapter.state, adapter.names, torch.half)}

    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q" in layers
    assert "lora_unet_mid_block_resnets_0_conv1" in layers
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj" in layers


def test_convolutions_keep_four_axes(trained: Callable[..., TrainedAdapter]) -> None:
    adapter = trained("sd15", use_dora=True, alpha=2)

    tensors = kohya_tensors(adapter.state, adapter.names, torch.float32)

    name = "lora_unet_mid_block_resnets_0_conv1"
    assert tensors[f"{name}.lora_down.weight"].shape == (4, 32, 3, 3)
    assert tensors[f"{name}.lora_up.weight"].shape == (32, 4, 1, 1)
    assert tensors[f"{name}.dora_scale"].shape == (32, 1, 1, 1)
    linear = "lora_te_text_model_encoder_layers_0_self_attn_q_proj.dora_scale"
    assert tensors[linear].shape == (32, 1)


def test_the_papers_magnitudes_are_pefts_own(trained: Callable[..., TrainedAdapter]) -> None:
    adapter = trained("sd15", use_dora=True, alpha=2)

    tensors = kohya_tensors(adapter.state, adapter.names, torch.float16)

    layer = "mid_block.resnets.0.conv1"
    magnitude = adapter.state.layers()["unet", layer]["lora_magnitude_vector"]
    written = tensors["lora_unet_mid_block_resnets_0_conv1.dora_scale"]
    assert torch.equal(written.flatten(), magnitude.flatten())


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_comfyuis_formula_gives_the_trained_weight_from_its_file(
    family: str, trained: Callable[..., TrainedAdapter]
) -> None:
    adapter = trained(family, use_dora=True, alpha=2)
    tensors = kohya_tensors(
        adapter.state,
        adapter.names,
        torch.float32,
        convention="comfyui",
        base_weight=adapter.base_weight,
    )

    path = "mid_block.resnets.0.conv1"
    name = adapter.names.of_layer("unet", path)
    weight = adapter.base_weight("unet", path)
    down, up = (tensors[f"{name}.lora_{part}.weight"] for part in ("down", "up"))
    change = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    # ComfyUI, weight_decompose: dora_scale / ||W|| times (W + dW).
    merged = (weight + change) * tensors[f"{name}.dora_scale"] / row_norms(weight)

    torch.testing.assert_close(merged, adapter.weights["unet"][path])


def test_comfyuis_magnitudes_need_the_base_weights(trained: Callable[..., TrainedAdapter]) -> None:
    adapter = trained("sd15", use_dora=True, alpha=2)

    with pytest.raises(ValueError, match="weights before training"):
        kohya_tensors(adapter.state, adapter.names, torch.float32, convention="comfyui")


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_header_tells_family_network_and_training(
    family: str, trained: Callable[..., TrainedAdapter], facts: TrainingFacts, tmp_path: Path
) -> None:
    adapter = trained(family, alpha=2)

    write_kohya(tmp_path / "a.safetensors", adapter.state, adapter.names, facts, torch.float32)

    header = metadata_of(tmp_path / "a.safetensors")
    expected = {
        "sd15": ("sd_v1", "stable-diffusion-v1/lora", "diffusers"),
        "sdxl": (
            "sdxl_base_v1-0",
            "stable-diffusion-xl-v1-base/lora",
            "https://github.com/Stability-AI/generative-models",
        ),
    }[family]
    found = ("ss_base_model_version", "modelspec.architecture", "modelspec.implementation")
    assert tuple(header[key] for key in found) == expected
    assert header["ss_network_module"] == "networks.lora"
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "4.0")
    assert json.loads(header["ss_network_args"])["trained_alpha"] == "2"
    assert header["ss_v2"] == "False"
    assert header["ss_resolution"] == "(64, 96)"
    assert header["modelspec.resolution"] == "64x96"
    assert (header["modelspec.trigger_phrase"],) == facts.instance_prompts
    assert json.loads(header["ss_tag_frequency"]) == {
        "astronaut": {"TOK": 4, "a portrait of TOK": 1}
    }
    assert (header["ss_seed"], header["ss_min_snr_gamma"]) == ("42", "5.0")


def test_the_header_names_the_prompts_of_all_concepts(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts, tmp_path: Path
) -> None:
    several = replace(facts, instance_prompts=("a TOK1", "a TOK2"))

    write_kohya(tmp_path / "a", trained("sd15").state, TABLES["sd15"], several, torch.float32)

    assert metadata_of(tmp_path / "a")["modelspec.trigger_phrase"] == "a TOK1, a TOK2"


def test_the_header_keeps_zeros_and_falsehoods_and_leaves_out_what_is_not_known(
    trained: Callable[..., TrainedAdapter], tmp_path: Path
) -> None:
    settings = {"seed": 0, "noise_offset": 0.0, "random_flip": False, "snr_gamma": None}
    facts = TrainingFacts(output_name="astronaut", settings=settings)

    write_kohya(tmp_path / "a", trained("sd15").state, TABLES["sd15"], facts, torch.float32)

    header = metadata_of(tmp_path / "a")
    found = {key: header[key] for key in ("ss_seed", "ss_noise_offset", "ss_flip_aug")}
    assert found == {"ss_seed": "0", "ss_noise_offset": "0.0", "ss_flip_aug": "False"}
    unknown = {"ss_min_snr_gamma", "ss_sd_model_name", "ss_num_train_images", "ss_learning_rate"}
    assert unknown & header.keys() == set()


@pytest.mark.parametrize(
    ("algorithm", "targets", "stated"),
    [
        ("lora", ("to_q", "conv1"), True),
        ("lora", ("to_q", "proj_in"), False),
        ("lokr", ("to_q", "conv1"), True),
        ("loha", ("to_q", "conv1"), True),
    ],
)
def test_the_header_states_the_convolutions_rank_where_there_are_any(
    algorithm: str,
    targets: tuple[str, ...],
    stated: bool,
    trained: Callable[..., TrainedAdapter],
    facts: TrainingFacts,
    tmp_path: Path,
) -> None:
    # proj_in of SD1.5 is a 1x1 convolution, which sd-scripts' network_dim covers.
    adapter = trained("sd15", algorithm, targets=targets)

    write_kohya(tmp_path / "a", adapter.state, adapter.names, facts, torch.float32)

    args = json.loads(metadata_of(tmp_path / "a")["ss_network_args"])
    expected = {"conv_dim": "4", "conv_alpha": "4"} if stated else {}
    assert {key: args[key] for key in ("conv_dim", "conv_alpha") if key in args} == expected


def test_the_header_has_no_place_and_no_time(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts, tmp_path: Path
) -> None:
    adapter = trained("sd15")

    write_kohya(tmp_path / "a.safetensors", adapter.state, adapter.names, facts, torch.float32)

    header = metadata_of(tmp_path / "a.safetensors")
    assert "private" not in json.dumps(header)
    assert not [key for key in header if "date" in key or "time" in key or "started" in key]


def test_both_meanings_of_dora_are_said_in_the_header(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts, tmp_path: Path
) -> None:
    adapter = trained("sd15", use_dora=True, alpha=2)
    for convention in ("paper", "comfyui"):
        write_kohya(
            tmp_path / convention,
            adapter.state,
            adapter.names,
            facts,
            torch.float32,
            convention=convention,
            base_weight=adapter.base_weight,
        )

    for convention in ("paper", "comfyui"):
        header = metadata_of(tmp_path / convention)
        assert header["dora_convention"] == convention
        args = json.loads(header["ss_network_args"])
        assert args["dora_convention"] == convention
        assert (args["dora_wd"], args["wd_on_output"]) == ("True", "True")


@pytest.mark.parametrize("algorithm", ["lokr", "loha"])
def test_other_algorithms_are_named_for_lycoris(
    algorithm: str,
    trained: Callable[..., TrainedAdapter],
    facts: TrainingFacts,
    tmp_path: Path,
) -> None:
    adapter = trained("sd15", algorithm, alpha=2)

    write_kohya(tmp_path / "a", adapter.state, adapter.names, facts, torch.float32)

    header = metadata_of(tmp_path / "a")
    assert header["ss_network_module"] == "lycoris.kohya"
    assert json.loads(header["ss_network_args"])["algo"] == algorithm


def test_the_model_hash_is_that_of_the_data_section(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts, tmp_path: Path
) -> None:
    adapter = trained("sd15")

    write_kohya(tmp_path / "a", adapter.state, adapter.names, facts, torch.float32)

    content = (tmp_path / "a").read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    header = metadata_of(tmp_path / "a")
    assert header["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert len(header["sshs_legacy_hash"]) == 8


def test_the_same_training_gives_the_same_bytes(
    trained: Callable[..., TrainedAdapter], facts: TrainingFacts, tmp_path: Path
) -> None:
    adapter = trained("sdxl", use_dora=True, alpha=2)

    for name in ("first", "second"):
        write_kohya(tmp_path / name, adapter.state, adapter.names, facts, torch.bfloat16)

    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    kinds = {tensor.dtype for tensor in load_file(tmp_path / "first").values()}
    assert kinds == {torch.bfloat16, torch.float32}


def test_a_local_base_model_is_named_without_its_place(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    assert public_name(str(tmp_path / "my-model")) == "my-model"
    assert public_name("/elsewhere/model.safetensors") == "model.safetensors"
    assert public_name("/elsewhere/model-1.0") == "model-1.0"
    assert public_name("owner/model") == "owner/model"


def test_every_family_table_has_its_own_version() -> None:
    assert len({names.base_model_version for names in TABLES.values()}) == len(TABLES)
