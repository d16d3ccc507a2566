"""kohya's networks and LyCORIS': which adapter they are, on which layers, and how strong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trainer.importers import reasons
from trainer.importers.adapted import ATTENTION, CLIP, CONVOLUTIONS, LAST_LAYER, WHOLE_BLOCKS
from trainer.importers.desk import Desk, Table
from trainer.importers.optimizers import named_arguments
from trainer.importers.rows import becomes, computed, is_off, is_true, told_with, without

CACHED_TEXT = "cache_text_encoder_outputs"
# Rates of text encoders: with a network, of which one may have several, and without one.
# `text_encoder_lr1` and `…2` stand in the scripts' guides and in forks of them.
NETWORK_RATES = ("text_encoder_lr", "text_encoder_lr1", "text_encoder_lr2")
WEIGHT_RATES = ("learning_rate_te", "learning_rate_te1", "learning_rate_te2", "learning_rate_te3")
_LYCORIS = "lycoris.kohya"
_NETWORKS = ("networks.lora", "networks.lora_flux", _LYCORIS)
# LyCORIS' algorithms, and what they are here.
_FORMS: Mapping[str, str] = {
    "lora": "lora",
    "locon": "lora",
    "loha": "loha",
    "lokr": "lokr",
}
_PRESETS = ("full", "attn-mlp", "attn-only")
_ONE_RANK, _ONE_RATE = "an adapter has one rank", "all layers learn at one rate"
_BOTH_HALVES = "both halves of an adapter learn at one rate"
# Arguments of networks, and why there are none.
_WITHOUT: Mapping[str, str] = {
    **dict.fromkeys(
        ("dropout", "rank_dropout", "module_dropout", "rank_dropout_scale"), reasons.DROPOUT
    ),
    "train_norm": "norms are not trained",
    **dict.fromkeys(("use_tucker", "use_cp"), "convolutions are not decomposed further"),
    "use_scalar": "an adapter has one strength, alpha over rank",
    "weight_decompose": "see --use-dora",
    "decompose_both": "the large factor alone is decomposed",
    "full_matrix": "give a larger rank",
    **dict.fromkeys(
        ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"),
        _BOTH_HALVES,
    ),
    **dict.fromkeys(
        (
            *("block_dims", "conv_block_dims", "network_reg_dims", "single_dim", "single_mod_dim"),
            *("img_attn_dim", "txt_attn_dim", "img_mlp_dim", "txt_mlp_dim"),
            *("img_mod_dim", "txt_mod_dim"),
        ),
        _ONE_RANK,
    ),
    **dict.fromkeys(("block_alphas", "conv_block_alphas"), "an adapter has one alpha"),
    **dict.fromkeys(
        (
            *("block_lr_zero_threshold", "down_lr_weight", "mid_lr_weight", "up_lr_weight"),
            "network_reg_lrs",
        ),
        _ONE_RATE,
    ),
    **dict.fromkeys(
        (
            *("train_blocks", "train_double_block_indices", "train_single_block_indices"),
            "in_dims",
        ),
        reasons.LAYERS,
    ),
    **dict.fromkeys(("ggpo_beta", "ggpo_sigma"), "nothing is added to what an adapter makes"),
    "train_t5xxl": "T5 does not learn here",
}
_NEEDLESS: Mapping[str, str] = {
    "bypass_mode": "changes only how it is computed",
    "verbose": "changes only what is printed",
}


def _take_network(desk: Desk, name: str, value: Any) -> None:
    """The form of the adapter, its arguments, and the layers that get one."""
    module = str(value)
    if module not in _NETWORKS:
        desk.leave(name, reasons.NO_FORM)
    arguments = named_arguments(desk, "network_args")
    is_lycoris = module == _LYCORIS
    if is_lycoris:
        _take_form(desk, str(arguments.pop("algo", "lora")).lower(), arguments)
    preset = str(arguments.pop("preset", "full" if is_lycoris else "")).lower()
    convolved = _with_convolutions(desk, arguments, is_lycoris and preset == "full")
    assert desk.kind is not None
    layers = WHOLE_BLOCKS[desk.kind] if preset != "attn-only" else ATTENTION
    if preset and preset not in _PRESETS:
        desk.leave("network_args: preset", reasons.LAYERS, value=preset)
    targets = [*layers, *(CONVOLUTIONS if convolved and desk.kind == "table" else ())]
    desk.take(name, "target_unet_modules", targets)
    if text_learns(desk):
        desk.take(name, "target_text_encoder_modules", list(CLIP))
    if desk.kind == "flow":
        _tell_of_fused(desk, arguments)
    for key, argument in arguments.items():
        _leave_argument(desk, key, argument)


def _leave_argument(desk: Desk, key: str, argument: Any) -> None:
    if key == "rs_lora" and not is_off(argument):
        alpha = desk.number("network_alpha") * math.sqrt(desk.number("network_dim"))
        reason = f"an adapter's strength is alpha over rank: alpha {alpha:g} is as strong"
    elif key in _NEEDLESS:
        desk.leave(f"network_args: {key}", _NEEDLESS[key], matters=False, value=argument)
        return
    else:
        reason = _WITHOUT.get(key, "is not known here")
    desk.leave(f"network_args: {key}", reason, matters=not is_off(argument), value=argument)


def _tell_of_fused(desk: Desk, arguments: dict[str, Any]) -> None:
    """FLUX.1's layers there are several of ours in one, which share half an adapter."""
    desk.remarks.append(LAST_LAYER)
    name, is_split = "network_args: split_qkv", is_true(arguments.pop("split_qkv", False))
    if is_split:
        desk.leave(name, "query, key and value have an adapter each", matters=False, value=True)
    else:
        reason = "query, key and value share one half of an adapter there, in single blocks with "
        reason += "proj_mlp; here each has its own"
        desk.leave(name, reason, value=False)


def text_rates(desk: Desk) -> list[tuple[str, Any]]:
    """The rates that are given for text encoders, each with the option that says it."""
    names = NETWORK_RATES if "network_module" in desk.given else WEIGHT_RATES
    found = []
    for name in names:
        rate = desk.setting(name)
        rates = list(rate) if isinstance(rate, list | tuple) else [rate]
        found += [(name, each) for each in rates if each is not None]
    return found


def text_learns(desk: Desk) -> bool:
    """Whether text encoders learn beside a network: by themselves, and not at a rate of 0."""
    if is_true(desk.setting("network_train_unet_only")) or are_texts_kept(desk):
        return False
    rates = text_rates(desk)
    return not rates or not all(is_off(rate) for _, rate in rates)


def are_texts_kept(desk: Desk) -> bool:
    """Whether no text encoder can learn because what they make is kept; FLUX.1's CLIP can."""
    return desk.kind != "flow" and is_true(desk.setting(CACHED_TEXT))


def _take_form(desk: Desk, algorithm: str, arguments: dict[str, Any]) -> None:
    if algorithm in _FORMS:
        _said(desk, "algo", "lora_type", _FORMS[algorithm], algorithm)
    else:
        desk.leave("network_args: algo", reasons.NO_FORM, value=algorithm)
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
        desk.assume(name, "alpha", desk.number("network_dim"))
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
    "network_dropout": without(reasons.DROPOUT),
    "network_weights": without(
        "an adapter is not trained further: each begins as one that does nothing yet"
    ),
    "base_weights": without("merge them into the base model, and give that as model_url"),
    "base_weights_multiplier": without("merge them into the base model"),
    "dim_from_weights": without("give --rank"),
    "scale_weight_norms": without("adapters are not scaled down; see --adam-weight-decay"),
    "network_train_text_encoder_only": without("the denoiser always learns"),
}
