"""The names that kohya files must use for a live pipeline's layers, worked out from its modules.

A second derivation, from the block structure itself, against which written files are checked;
it shares nothing with the tables from which they are written but the prefixes of components.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from trainer.names import KohyaNames

Layer = tuple[str, str]


class UnknownStructureError(Exception):
    """How kohya files call the layers of such a model is not known here."""


_DENOISERS = ("unet", "transformer")
_UNET_PARTS = {"down_blocks", "mid_block", "up_blocks"}
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


def expected_names(pipeline: Any, names: KohyaNames) -> dict[str, Layer]:
    """Kohya layer name to live layer, for the denoiser and the text encoders.

    Args:
        pipeline: a diffusers pipeline.
        names: says the prefixes, and whether the family renames its denoiser's blocks.

    Raises:
        UnknownStructureError: the family renames blocks, but the denoiser is no UNet.
    """
    expected: dict[str, Layer] = {}
    denoisers = [model for name, model in pipeline.components.items() if name in _DENOISERS]
    blocks = dict(_original_blocks(denoisers[0])) if names.layers else {}
    for component, path in live_layers(pipeline):
        if component in names.text_encoder_prefixes:
            full = path if path.startswith("text_") else f"text_model.{path}"
            name = f"{names.text_encoder_prefixes[component]}_{full.replace('.', '_')}"
        elif component in _DENOISERS:
            name = f"{names.denoiser_prefix}_{_in_original(path, blocks)}"
        else:
            continue
        expected[name] = (component, path)
    return expected


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
