"""The names that kohya files must use for a live pipeline's layers, worked out from its modules.

A second derivation, from the block structure itself, against which written files are checked;
it shares nothing with the tables from which they are written but the prefixes of components.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.names import KohyaNames

Layer = tuple[str, str]


class UnknownStructureError(Exception):
    """How kohya files call the layers of such a model is not known here."""


@dataclass(frozen=True)
class FileLayer:
    """A layer of a file as live layers, whose rows stand below one another.

    Args:
        layers: component and path of each, in order.
        halves_swapped: whether the file has the second half of the rows first.
        is_plain: whether it has its diffusers name although the original calls it otherwise.
    """

    layers: tuple[Layer, ...]
    halves_swapped: bool = False
    is_plain: bool = False

    def weight(self, live: Mapping[Layer, nn.Module]) -> Tensor:
        """The live layers' weight in the file's order, in 32 bits; a copy where it is not one."""
        weights = [live[layer].get_parameter("weight").detach().float() for layer in self.layers]
        whole = weights[0] if len(weights) == 1 else torch.cat(weights)
        return self._turned(whole)

    def parts(
        self, weight: Tensor, live: Mapping[Layer, nn.Module]
    ) -> Iterator[tuple[Layer, Tensor]]:
        """A weight in the file's order as those of the live layers."""
        start, weight = 0, self._turned(weight)
        for layer in self.layers:
            end = start + live[layer].get_parameter("weight").shape[0]
            yield layer, weight[start:end]
            start = end

    def _turned(self, weight: Tensor) -> Tensor:
        return weight.roll(weight.shape[0] // 2, 0) if self.halves_swapped else weight


_DENOISERS = ("unet", "transformer")
_UNET_PARTS = {"down_blocks", "mid_block", "up_blocks"}
_STREAM_PARTS = {"transformer_blocks", "single_transformer_blocks"}
_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
# What stands before and after the original's blocks: Sequentials whose parts are numbered.
_ENDS = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}


def live_layers(pipeline: Any) -> dict[Layer, nn.Module]:
    """Every linear and convolution layer of a pipeline, by component and path."""
    return {
        (component, path): module
        for component, model in pipeline.components.items()
        if isinstance(model, nn.Module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


# Transformers of two streams, whose original numbers the layers of Sequentials and embedders.
_STREAM_ENDS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "timestep_embedder.linear_1": "time_in_in_layer",
    "timestep_embedder.linear_2": "time_in_out_layer",
    "text_embedder.linear_1": "vector_in_in_layer",
    "text_embedder.linear_2": "vector_in_out_layer",
    "guidance_embedder.linear_1": "guidance_in_in_layer",
    "guidance_embedder.linear_2": "guidance_in_out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img_lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt_lin",
    "single_stream_modulation.linear": "single_stream_modulation_lin",
    "norm_out.linear": "final_layer_adaLN_modulation_1",
    "proj_out": "final_layer_linear",
}
_STREAM_BLOCK = {
    "attn.to_q": "img_attn_qkv",
    "attn.to_k": "img_attn_qkv",
    "attn.to_v": "img_attn_qkv",
    "attn.add_q_proj": "txt_attn_qkv",
    "attn.add_k_proj": "txt_attn_qkv",
    "attn.add_v_proj": "txt_attn_qkv",
    "attn.to_out.0": "img_attn_proj",
    "attn.to_add_out": "txt_attn_proj",
    "ff.net.0.proj": "img_mlp_0",
    "ff.net.2": "img_mlp_2",
    "ff.linear_in": "img_mlp_0",
    "ff.linear_out": "img_mlp_2",
    "ff_context.net.0.proj": "txt_mlp_0",
    "ff_context.net.2": "txt_mlp_2",
    "ff_context.linear_in": "txt_mlp_0",
    "ff_context.linear_out": "txt_mlp_2",
    "norm1.linear": "img_mod_lin",
    "norm1_context.linear": "txt_mod_lin",
}
_SINGLE_BLOCK = {
    "proj_out": "linear2",
    "attn.to_out": "linear2",
    "attn.to_q": "linear1",
    "attn.to_k": "linear1",
    "attn.to_v": "linear1",
    "proj_mlp": "linear1",
    "attn.to_qkv_mlp_proj": "linear1",
    "norm.linear": "modulation_lin",
}


def expected_names(pipeline: Any, names: KohyaNames) -> dict[str, FileLayer]:
    """Kohya layer name to live layers, for the denoiser and the text encoders.

    Args:
        pipeline: a diffusers pipeline.
        names: says the prefixes, and whether the family renames its denoiser's blocks.

    Raises:
        UnknownStructureError: the family renames blocks, but the denoiser is neither a UNet nor
            a transformer of two streams, or is one with layers of its own.
    """
    expected: dict[str, FileLayer] = {}
    [(denoiser, model)] = [pair for pair in pipeline.components.items() if pair[0] in _DENOISERS]
    children = dict(model.named_children()).keys()
    if names.layers and children >= _STREAM_PARTS:
        expected |= _streams(denoiser, model, names)
        wanted = [layer for layer in live_layers(pipeline) if layer[0] != denoiser]
    else:
        wanted = list(live_layers(pipeline))
    blocks = dict(_original_blocks(model)) if names.layers and not expected else {}
    for component, path in wanted:
        if component in names.text_encoder_prefixes:
            full = path if path.startswith("text_") else f"text_model.{path}"
            name = f"{names.text_encoder_prefixes[component]}_{full.replace('.', '_')}"
        elif component in _DENOISERS:
            name = f"{names.denoiser_prefix}_{_in_original(path, blocks)}"
        else:
            continue
        expected[name] = FileLayer(((component, path),))
    return expected


def _streams(component: str, model: nn.Module, names: KohyaNames) -> dict[str, FileLayer]:
    """Every layer of a transformer of two streams, and each under its diffusers name too."""
    linear = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    found: dict[str, list[str]] = {}
    for path in linear:
        found.setdefault(f"{names.denoiser_prefix}_{_in_streams(path)}", []).append(path)
    # The live model keeps q, k and v in this order, and the single blocks' MLP before them.
    for paths in found.values():
        paths.sort(key=lambda path: path.endswith("proj_mlp"))
    expected = {
        name: FileLayer(
            tuple((component, path) for path in paths), halves_swapped=paths == ["norm_out.linear"]
        )
        for name, paths in found.items()
    }
    plain = {f"lycoris_{path.replace('.', '_')}": path for path in linear}
    layers = {name: FileLayer(((component, path),), is_plain=True) for name, path in plain.items()}
    return expected | layers


def _in_streams(path: str) -> str:
    """The name of a layer in the original, which has one for q, k and v of each stream."""
    blocks, _, rest = path.partition(".")
    if blocks not in _STREAM_PARTS:
        return _known(_STREAM_ENDS, ".".join(path.split(".")[-2:]), path)
    number, _, inside = rest.partition(".")
    if blocks == "single_transformer_blocks":
        return f"single_blocks_{number}_{_known(_SINGLE_BLOCK, inside, path)}"
    return f"double_blocks_{number}_{_known(_STREAM_BLOCK, inside, path)}"


def _known(table: Mapping[str, str], layer: str, path: str) -> str:
    if layer not in table:
        raise UnknownStructureError(f"the original name of the layer `{path}` is not known")
    return table[layer]


def _in_original(path: str, blocks: Mapping[str, str]) -> str:
    """A layer's name in the original implementation, where every part of a block has a number."""
    steps = path.split(".")
    for length in range(len(steps), 0, -1):
        block = ".".join(steps[:length])
        if block in blocks:
            return "_".join([blocks[block], *(_RESNET.get(step, step) for step in steps[length:])])
    return "_".join(steps)


def _original_blocks(unet: nn.Module) -> Iterator[tuple[str, str]]:
    """Resnets, attentions and resamplers in the order in which the original numbers them."""
    if not dict(unet.named_children()).keys() >= _UNET_PARTS:
        raise UnknownStructureError(
            f"the original names of the layers of {type(unet).__name__} cannot be worked out"
        )
    yield from _ENDS.items()
    number = 0
    for i, block in enumerate(_list(unet, "down_blocks")):
        parts = dict(block.named_children())
        for j, _ in enumerate(_list(block, "resnets")):
            number += 1
            yield f"down_blocks.{i}.resnets.{j}", f"input_blocks_{number}_0"
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks_{number}_1"
        if "downsamplers" in parts:
            number += 1
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks_{number}_0_op"
    yield "mid_block.resnets.0", "middle_block_0"
    yield "mid_block.attentions.0", "middle_block_1"
    yield "mid_block.resnets.1", "middle_block_2"
    number = -1
    for i, block in enumerate(_list(unet, "up_blocks")):
        parts = dict(block.named_children())
        for j, _ in enumerate(_list(block, "resnets")):
            number += 1
            yield f"up_blocks.{i}.resnets.{j}", f"output_blocks_{number}_0"
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks_{number}_1"
        place = 2 if "attentions" in parts else 1
        yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks_{number}_{place}_conv"


def _list(module: nn.Module, name: str) -> Iterator[nn.Module]:
    return module.get_submodule(name).children()
