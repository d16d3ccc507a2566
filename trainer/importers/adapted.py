"""Which layers other programs put adapters on, by the ends of diffusers' names."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.importers.desk import Kind

ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
# Every linear layer and 1x1 convolution of a UNet's transformers.
_TRANSFORMERS = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
# What else its other blocks have: with these, kohya's `conv_dim` and LyCORIS adapt everything.
# The first two have the rank of linear layers there: they are linear, or 1 x 1.
BESIDE_CONVOLUTIONS = ("conv_shortcut", "time_emb_proj")
CONVOLUTIONS = (
    *BESIDE_CONVOLUTIONS,
    *("conv1", "conv2", "downsamplers.0.conv", "upsamplers.0.conv"),
)
_JOINT_ATTENTION = ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
# The trainings of diffusers adapt these of a joint transformer.
JOINT = tuple(f"attn.{name}" for name in (*ATTENTION, *_JOINT_ATTENTION)) + _FORWARD
# Every linear layer of all blocks of a transformer of flow matching.
_BLOCKS = (
    *ATTENTION,
    *_JOINT_ATTENTION,
    *_FORWARD,
    *("norm1.linear", "norm1_context.linear", "norm.linear", "proj_mlp", "proj_out"),
)
# What is said of them: names end alike there.
LAST_LAYER = (
    "The transformer's last layer, proj_out, gets an adapter, too: layers of its single blocks are "
    "called so as well."
)
# Attention, of both streams where there are two.
ATTENTION_OF: Mapping[Kind, tuple[str, ...]] = {
    "table": ATTENTION,
    "flow": (*ATTENTION, *_JOINT_ATTENTION),
}
# What kohya's networks and those made after them adapt.
WHOLE_BLOCKS: Mapping[Kind, tuple[str, ...]] = {"table": _TRANSFORMERS, "flow": _BLOCKS}
# The same of CLIP: attention, and with the layers after it.
CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
CLIP = (*CLIP_ATTENTION, "fc1", "fc2")
