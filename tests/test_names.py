"""Kohya names and back, over every layer of real models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from trainer.names import KohyaNames, redot, undot

PLAIN = KohyaNames(
    denoiser_prefix="lora_unet",
    text_encoder_prefixes={"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    base_model_version="",
    architecture="",
    implementation="",
)
# A few of the block names that SDXL's files use.
SWAPPED = KohyaNames(
    denoiser_prefix="lora_unet",
    text_encoder_prefixes={"text_encoder": "lora_te1"},
    base_model_version="",
    architecture="",
    implementation="",
    layers={
        "down_blocks.1.attentions.0": "input_blocks.4.1",
        "down_blocks.1.resnets.0": "input_blocks.4.0",
        "down_blocks.1.resnets.0.conv1": "input_blocks.4.0.in_layers.2",
        "mid_block.attentions.0": "middle_block.1",
        "time_embedding.linear_1": "time_embed.0",
    },
)


def layers_of(model: torch.nn.Module) -> list[str]:
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    ]


def text_encoder_layers() -> list[str]:
    config = CLIPTextConfig(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    names = layers_of(CLIPTextModel(config))
    # Newer transformers leave out the step that the files have.
    return [name if name.startswith("text_model.") else f"text_model.{name}" for name in names]


@pytest.fixture(scope="module")
def unet_layers(sd15_folder: Path) -> list[str]:
    return layers_of(UNet2DConditionModel.from_pretrained(sd15_folder / "unet"))


@pytest.mark.parametrize(
    ("component", "path", "name"),
    [
        # Spelled as sd-scripts writes them.
        (
            "unet",
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
        ),
        (
            "unet",
            "mid_block.resnets.1.time_emb_proj",
            "lora_unet_mid_block_resnets_1_time_emb_proj",
        ),
        (
            "text_encoder",
            "text_model.encoder.layers.0.self_attn.q_proj",
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        ),
        (
            "text_encoder_2",
            "text_model.encoder.layers.1.mlp.fc2",
            "lora_te2_text_model_encoder_layers_1_mlp_fc2",
        ),
    ],
)
def test_names_are_spelled_as_kohya_files_spell_them(component: str, path: str, name: str) -> None:
    assert PLAIN.of_layer(component, path) == name
    assert PLAIN.layers_of(name) == {(component, path): 1}


@pytest.mark.parametrize("names", [PLAIN, SWAPPED])
def test_every_layer_of_a_unet_comes_back(names: KohyaNames, unet_layers: list[str]) -> None:
    assert len(unet_layers) > 200
    written = [names.of_layer("unet", path) for path in unet_layers]
    assert len(set(written)) == len(unet_layers)
    assert [names.layers_of(name) for name in written] == [
        {("unet", path): 1} for path in unet_layers
    ]


def test_every_layer_of_a_text_encoder_comes_back() -> None:
    paths = text_encoder_layers()
    assert len(paths) == 2 * 6
    written = [PLAIN.of_layer("text_encoder", path) for path in paths]
    assert [PLAIN.layers_of(name) for name in written] == [
        {("text_encoder", path): 1} for path in paths
    ]


def test_the_longest_known_prefix_is_swapped() -> None:
    block = "down_blocks.1.resnets.0"
    assert SWAPPED.of_layer("unet", f"{block}.conv1") == "lora_unet_input_blocks_4_0_in_layers_2"
    assert SWAPPED.of_layer("unet", f"{block}.conv2") == "lora_unet_input_blocks_4_0_conv2"


def test_a_prefix_ends_at_a_step_of_the_path() -> None:
    path = "mid_block.attentions.01.to_q"
    assert SWAPPED.of_layer("unet", path) == "lora_unet_mid_block_attentions_01_to_q"


def test_a_name_of_another_component_is_refused() -> None:
    with pytest.raises(KeyError):
        SWAPPED.layers_of("lora_te2_text_model_encoder_layers_0_mlp_fc1")


def test_a_word_within_a_longer_word_is_not_taken_apart() -> None:
    assert redot("conv_in_proj_in") == "conv_in.proj_in"
    assert redot(undot("to_out.0")) == "to_out.0"
