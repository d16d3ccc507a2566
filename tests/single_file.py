"""Writes a tiny pipeline as one file in the layout of the original checkpoints.

Layer names follow CompVis' `ldm` and OpenCLIP, written down here independently of the families'
own tables; diffusers' `from_single_file` reads the result.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

State = dict[str, torch.Tensor]

_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def original_unet_name(name: str) -> str:
    """A diffusers UNet tensor's name in `ldm`, for two residual layers per block."""
    for ours, theirs in _UNET_ENDS.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    match = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name)
    if match:
        side, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * 3}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            return f"output_blocks.{block * 3 + 2}.UPSAMPLER.{rest}"
        place = 1 + block * 3 + index if side == "down" else block * 3 + index
        blocks = "input_blocks" if side == "down" else "output_blocks"
        inner = "0" if kind == "resnets" else "1"
        return f"{blocks}.{place}.{inner}.{_resnet(rest) if kind == 'resnets' else rest}"
    match = re.fullmatch(r"mid_block\.(\w+)\.(\d)\.(.+)", name)
    assert match is not None, name
    place = 1 if match[1] == "attentions" else 2 * int(match[2])
    return f"middle_block.{place}.{_resnet(match[3]) if match[1] == 'resnets' else match[3]}"


def _resnet(rest: str) -> str:
    layer, tensor = rest.rsplit(".", 1)
    return f"{_UNET_RESNET[layer]}.{tensor}"


def original_unet(state: State) -> State:
    """A whole UNet; an upsampler comes after an attention where its block has one."""
    named = {original_unet_name(name): tensor for name, tensor in state.items()}
    final: State = {}
    for name, tensor in named.items():
        block = name.split(".UPSAMPLER.")[0]
        has_attention = any(other.startswith(f"{block}.1.") for other in named)
        final[name.replace("UPSAMPLER", "2" if has_attention else "1")] = tensor
    return {f"model.diffusion_model.{name}": tensor for name, tensor in final.items()}


def original_vae(state: State, num_blocks: int) -> State:
    """A whole VAE; its attention layers are 1 x 1 convolutions."""
    return {
        f"first_stage_model.{_vae_name(name, num_blocks)}": (
            tensor[..., None, None] if re.search(r"attentions.*\.to_\w.*weight", name) else tensor
        )
        for name, tensor in state.items()
    }


def _vae_name(name: str, num_blocks: int) -> str:
    rules = [
        (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
        (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
    ]
    for index in range(num_blocks):
        theirs = num_blocks - 1 - index
        rules.append((rf"up_blocks\.{index}\.resnets\.(\d)", rf"up.{theirs}.block.\1"))
        rules.append((rf"up_blocks\.{index}\.upsamplers\.0", f"up.{theirs}.upsample"))
    for ours, part in _VAE_ATTENTION.items():
        rules.append((rf"mid_block\.attentions\.0\.{re.escape(ours)}", f"mid.attn_1.{part}"))
    return _rewritten(name, rules)


def _rewritten(name: str, rules: list[tuple[str, str]]) -> str:
    return functools.reduce(lambda text, rule: re.sub(*rule, text), rules, name)


def hugging_face_clip(state: State, prefix: str) -> State:
    """A CLIP text encoder under transformers' names of before its version 5."""
    return {
        f"{prefix}.{name if name.startswith('text_') else f'text_model.{name}'}": tensor
        for name, tensor in state.items()
    }


_OPEN_CLIP = [
    (r"^text_model\.", ""),
    (r"encoder\.layers\.(\d+)\.", r"transformer.resblocks.\1."),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"embeddings\.token_embedding", "token_embedding"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    ("final_layer_norm", "ln_final"),
]


def open_clip(state: State, prefix: str) -> State:
    """A CLIP text encoder under OpenCLIP's names, with its three projections in one."""
    named = {_rewritten(name, _OPEN_CLIP): tensor for name, tensor in state.items()}
    named["text_projection"] = named.pop("text_projection.weight").T.contiguous()
    for key in [name for name in named if ".self_attn.q_proj." in name]:
        block, kind = key.split(".self_attn.q_proj.")
        parts = [named.pop(f"{block}.self_attn.{part}_proj.{kind}") for part in "qkv"]
        named[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
    return {f"{prefix}.{name}": tensor for name, tensor in named.items()}


def write_sd15(pipeline: Any, path: Path) -> Path:
    """A Stable Diffusion 1.5 pipeline as one file."""
    state = original_unet(pipeline.unet.state_dict())
    state |= original_vae(pipeline.vae.state_dict(), 4)
    clip = hugging_face_clip(pipeline.text_encoder.state_dict(), "cond_stage_model.transformer")
    save_file({name: tensor.contiguous() for name, tensor in (state | clip).items()}, path)
    return path


def write_sdxl(pipeline: Any, path: Path) -> Path:
    """An SDXL pipeline as one file."""
    state = original_unet(pipeline.unet.state_dict())
    state |= original_vae(pipeline.vae.state_dict(), 4)
    state |= hugging_face_clip(
        pipeline.text_encoder.state_dict(), "conditioner.embedders.0.transformer"
    )
    state |= open_clip(pipeline.text_encoder_2.state_dict(), "conditioner.embedders.1.model")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path
