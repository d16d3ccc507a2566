"""kohya's networks and LyCORIS': which adapter they are, on which layers, and how strong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.importers.adapted import ATTENTION, CLIP, CONVOLUTIONS, WHOLE_BLOCKS
from trainer.importers.desk import (
    Desk,
    Table,
    becomes,
    computed,
    is_true,
    told_with,
    without,
)
from trainer.importers.shared import assume, named_arguments

_CACHED_TEXT = "cache_text_encoder_outputs"
_LYCORIS = "lycoris.kohya"
_NETWORKS = ("networks.lora", "networks.lora_flux", _LYCORIS)
# LyCORIS' algorithms, and what they are here.
_FORMS: Mapping[str, str] = {
    "lora": "lora",
    "locon": "lora",
    "loha": "loha",
    "lokr": "lokr",
}
_NO_FORM = "is no form of adapter here: a LoRA of the same rank is trained"
_NO_DROPOUT = "adapters are trained whole"
_PRESETS = ("full", "attn-mlp", "attn-only")
# Arguments of networks: option here, or why there is none.
_WITHOUT: Mapping[str, str] = {
    "dropout": _NO_DROPOUT,
    "rank_dropout": _NO_DROPOUT,
    "module_dropout": _NO_DROPOUT,
    "rank_dropout_scale": _NO_DROPOUT,
    "train_norm": "norms are not trained",
    "use_tucker": "convolutions are not decomposed further",
    "use_cp": "convolutions are not decomposed further",
    "use_scalar": "an adapter has one strength, alpha over rank",
    "rs_lora": "an adapter's strength is alpha over rank: raise alpha",
    "weight_decompose": "see --use-dora",
    "bypass_mode": "only changes how it is computed",
    "decompose_both": "the large factor alone is decomposed",
    "full_matrix": "give a larger rank",
    "loraplus_lr_ratio": "both halves of an adapter learn at one rate",
    "loraplus_unet_lr_ratio": "both halves of an adapter learn at one rate",
    "loraplus_text_encoder_lr_ratio": "both halves of an adapter learn at one rate",
    "block_dims": "an adapter has one rank",
    "block_alphas": "an adapter has one alpha",
    "conv_block_dims": "an adapter has one rank",
    "conv_block_alphas": "an adapter has one alpha",
    "block_lr_zero_threshold": "all blocks learn at one rate",
    "down_lr_weight": "all blocks learn at one rate",
    "mid_lr_weight": "all blocks learn at one rate",
    "up_lr_weight": "all blocks learn at one rate",
    "train_t5xxl": "T5 does not learn here",
    "train_blocks": "see --target-unet-modules",
    "split_qkv": "query, key and value get an adapter each",
}


def _take_network(desk: Desk, name: str, value: Any) -> None:
    """The form of the adapter, its arguments, and the layers that get one."""
    module = str(value)
    if module not in _NETWORKS:
        desk.leave(name, _NO_FORM)
    arguments = named_arguments(desk, "network_args")
    is_lycoris = module == _LYCORIS
    if is_lycoris:
        _take_form(desk, str(arguments.pop("algo", "lora")).lower(), arguments)
    preset = str(arguments.pop("preset", "full" if is_lycoris else "")).lower()
    convolved = _with_convolutions(desk, arguments, is_lycoris and preset == "full")
    assert desk.kind is not None
    layers = WHOLE_BLOCKS[desk.kind] if preset != "attn-only" else ATTENTION
    if preset and preset not in _PRESETS:
        desk.leave("network_args: preset", "see --target-unet-modules", value=preset)
    targets = [*layers, *(CONVOLUTIONS if convolved and desk.kind == "table" else ())]
    desk.take(name, "target_unet_modules", targets)
    if text_learns(desk):
        desk.take(name, "target_text_encoder_modules", list(CLIP))
    for key, argument in arguments.items():
        is_off = argument in (None, False, 0, 0.0)
        reason = _WITHOUT.get(key, "is not known here")
        desk.leave(f"network_args: {key}", reason, matters=not is_off, value=argument)


def text_learns(desk: Desk) -> bool:
    """Whether text encoders learn beside a network: by themselves, and not at a rate of 0."""
    if any(is_true(desk.setting(n)) for n in ("network_train_unet_only", _CACHED_TEXT)):
        return False
    rate = desk.setting("text_encoder_lr")
    rates = rate if isinstance(rate, list) else [rate]
    return any(str(each) not in ("0", "0.0") for each in rates)


def _take_form(desk: Desk, algorithm: str, arguments: dict[str, Any]) -> None:
    if algorithm in _FORMS:
        _said(desk, "algo", "lora_type", _FORMS[algorithm], algorithm)
    else:
        desk.leave("network_args: algo", _NO_FORM, value=algorithm)
    if is_true(arguments.pop("dora_wd", False)):
        if _FORMS.get(algorithm) == "lora":
            _said(desk, "dora_wd", "use_dora", True, True)
        else:
            desk.leave("network_args: dora_wd", "DoRA exists for LoRA alone", value=True)
    if "factor" in arguments:
        factor = arguments.pop("factor")
        _said(desk, "factor", "lokr_factor", factor, factor)


def _with_convolutions(desk: Desk, arguments: dict[str, Any], by_itself: bool) -> bool:
    """Whether convolutions get an adapter, too; it has the rank of all others here."""
    rank, alpha = desk.setting("network_dim"), desk.setting("network_alpha")
    own_rank = arguments.pop("conv_dim", None)
    own_alpha = arguments.pop("conv_alpha", alpha if own_rank is None or by_itself else 1.0)
    if own_rank is None:
        return by_itself
    if float(own_rank) == 0:
        return False
    if float(own_rank) != float(rank):
        reason = f"convolutions get the rank of all other layers, {rank}"
        desk.leave("network_args: conv_dim", reason, value=own_rank)
    elif float(own_alpha) != float(alpha):
        reason = f"convolutions get the alpha of all other layers, {alpha}"
        desk.leave("network_args: conv_alpha", reason, value=own_alpha)
    return True


def _said(desk: Desk, key: str, leaf: str, becomes_: Any, value: Any) -> None:
    """Takes over an argument under its own name."""
    name = f"network_args: {key}"
    desk.given = {**desk.given, name: value}
    desk.take(name, leaf, becomes_)


def _take_alpha(desk: Desk, name: str, value: Any) -> None:
    """kohya takes 0 for the rank: a strength of 1."""
    if desk.number(name) == 0:
        assume(desk, name, "alpha", desk.number("network_dim"))
    else:
        desk.take(name, "alpha", value)


NETWORK: Table = {
    "network_module": computed(
        _take_network,
        *("use_lora", "lora_type", "use_dora", "lokr_factor"),
        *("target_unet_modules", "target_text_encoder_modules"),
    ),
    "network_args": told_with("network_module", "lora_type", "use_dora", "lokr_factor"),
    "network_dim": becomes("rank"),
    "network_alpha": computed(_take_alpha, "alpha"),
    "network_dropout": without(_NO_DROPOUT),
    "network_weights": without("a training begins with an adapter that does nothing yet"),
    "base_weights": without("merge them into the base model, and give that as model_url"),
    "base_weights_multiplier": without("merge them into the base model"),
    "dim_from_weights": without("give --rank"),
    "scale_weight_norms": without("adapters are not scaled down; see --adam-weight-decay"),
    "network_train_text_encoder_only": without("the denoiser always learns"),
}
