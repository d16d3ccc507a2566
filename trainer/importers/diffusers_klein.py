"""Options that diffusers' script for FLUX.2 [klein] alone has, or means otherwise than the others.

Source: the argument parser and the training loop of `train_dreambooth_lora_flux2_klein.py`.
"""

from __future__ import annotations

from typing import Any

from trainer.importers import reasons
from trainer.importers.desk import Desk, Table
from trainer.importers.diffusers_table import take_size
from trainer.importers.rows import becomes, computed, is_true, needless

# Layers of Qwen3 that the pipeline reads captions from, and those that the script does by itself.
_READ_LAYERS = (9, 18, 27)
OWN_LAYERS = (10, 20, 30)
# Every attention, and the single blocks as a whole, by the ends of diffusers' names.
TARGETS = ("to_k", "to_q", "to_v", "to_out.0", "to_qkv_mlp_proj", "attn.to_out")
REMARKS = (
    "The script's first version adapts the attention of the double blocks alone: for it, set "
    "target_unet_modules to [to_k, to_q, to_v, to_out.0].",
    "The script trains on the means of the VAE's latents; here latents are drawn around them.",
)
_LISTED = "aspect_ratio_buckets"
_NO_TEXT = "no text encoder learns, there too"


def _take_text_layers(desk: Desk, name: str, value: Any) -> None:
    try:
        given = value if isinstance(value, list | tuple) else [value]
        layers = tuple(int(layer) for layer in given)
    except (TypeError, ValueError, OverflowError):
        desk.refuse(name, "numbers of layers")
        return
    if layers == _READ_LAYERS:
        desk.leave(name, reasons.AS_HERE, matters=False)
    else:
        desk.leave(name, "captions are read from layers 9, 18 and 27, as the pipeline reads them")


def _take_resolution(desk: Desk, name: str, value: Any) -> None:
    if _LISTED not in desk.given:
        take_size(desk, name, value)
    elif name in desk.given:
        desk.leave(name, f"{_LISTED} goes before it", matters=False)


def _take_buckets(desk: Desk, name: str, value: Any) -> None:
    if not is_true(value):
        desk.leave(name, "is off", matters=False)
        return
    desk.take(name, "enable_bucket", True)
    if _LISTED not in desk.given:
        desk.remarks.append(
            "Pictures that are smaller than --resolution keep their area there; here they are "
            "brought to the trained one."
        )


def _take_listed(desk: Desk, name: str, value: Any) -> None:
    """A list of height,width;height,width: the largest is the trained size."""
    try:
        pairs = [[int(side) for side in pair.split(",")] for pair in str(value).split(";")]
    except ValueError:
        pairs = [[]]
    if not all(len(pair) == 2 for pair in pairs):
        desk.refuse(name, "HEIGHT,WIDTH;HEIGHT,WIDTH and so on, in pixels")
        return
    height, width = max(pairs, key=lambda pair: pair[0] * pair[1])
    desk.take(name, "enable_bucket", True)
    desk.take(name, "resolution_width", width)
    desk.take(name, "resolution_height", height)
    desk.leave(f"{name}: sizes", reasons.SQUEEZED, matters=False, value=value)


ROWS: Table = {
    "text_encoder_out_layers": computed(_take_text_layers),
    "text_encoder_lr": needless(_NO_TEXT),
    "adam_weight_decay_text_encoder": needless(_NO_TEXT),
    "fsdp_text_encoder": needless(reasons.MEMORY),
    "guidance_scale": needless("the denoiser is told no guidance, there too"),
    "caption_dropout": becomes("caption_dropout"),
    "resolution": computed(_take_resolution, "resolution_width", "resolution_height"),
    "use_aspect_ratio_buckets": computed(_take_buckets, "enable_bucket"),
    _LISTED: computed(_take_listed, "enable_bucket", "resolution_width", "resolution_height"),
}
