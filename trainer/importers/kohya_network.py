"""kohya's networks and LyCORIS': which adapter they are, on which layers, and how strong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.errors import Problem
from trainer.importers import reasons
from trainer.importers.adapted import (
    ATTENTION_OF,
    BESIDE_CONVOLUTIONS,
    CLIP,
    CLIP_ATTENTION,
    CONVOLUTIONS,
    LAST_LAYER,
    WHOLE_BLOCKS,
)
from trainer.importers.desk import Desk, Table
from trainer.importers.optimizers import named_arguments
from trainer.importers.rows import becomes, computed, is_off, is_true, told_with, without
from trainer.importers.strengths import (
    ALPHA_IS_RANK,
    NO_CONVOLUTIONS,
    Strength,
    tell_convolutions,
)
from trainer.leaves import shown

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
_SINGLE_BLOCKS = "adapts the attention of double blocks alone there; here that of single ones, too"
# Those that adapt convolutions by themselves, and those that never do.
_CONVOLVED = ("full", "unet-only")
_LINEAR = ("full-lin", "attn-mlp", "attn-only", "unet-transformer-only", "ia3")
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
    convolutions = _convolutions(desk, arguments, preset, is_lycoris=is_lycoris)
    assert desk.kind is not None
    layers: Sequence[str] = WHOLE_BLOCKS[desk.kind]
    of_texts: Sequence[str] = CLIP
    if preset == "attn-only":
        layers, of_texts = ATTENTION_OF[desk.kind], CLIP_ATTENTION
        if desk.kind == "flow":
            desk.leave("network_args: preset", _SINGLE_BLOCKS, value=preset)
    if preset and preset not in _PRESETS:
        desk.leave("network_args: preset", reasons.LAYERS, value=preset)
    desk.take(name, "target_unet_modules", [*layers, *convolutions])
    if text_learns(desk):
        desk.take(name, "target_text_encoder_modules", list(of_texts))
    if desk.kind == "flow":
        _tell_of_fused(desk, arguments)
    for key, argument in arguments.items():
        _leave_argument(desk, key, argument)


def _leave_argument(desk: Desk, key: str, argument: Any) -> None:
    if key == "rs_lora" and not is_off(argument):
        strength = network_strength(desk)
        alpha = strength.alpha * math.sqrt(strength.rank)
        reason = f"an adapter's strength is alpha over rank: alpha {alpha:g} is as strong"
    elif key in _NEEDLESS:
        desk.leave(f"network_args: {key}", _NEEDLESS[key], matters=False, value=argument)
        return
    else:
        reason = _WITHOUT.get(key, reasons.UNKNOWN)
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


def _convolutions(
    desk: Desk, arguments: dict[str, Any], preset: str, *, is_lycoris: bool
) -> Sequence[str]:
    """The layers that get an adapter where convolutions do, and what becomes of their own numbers.

    LyCORIS gives them the numbers of all other layers by itself, sd-scripts an alpha of 1.
    """
    rank, alpha = arguments.pop("conv_dim", None), arguments.pop("conv_alpha", None)
    none = _without_convolutions(desk, rank, preset, is_lycoris=is_lycoris)
    if none:
        given = {"conv_dim": rank, "conv_alpha": alpha}
        for key, value in given.items():
            if value is not None:
                desk.leave(f"network_args: {key}", none, matters=False, value=value)
        is_off_by_rank = desk.kind == "table" and rank is not None and preset not in _LINEAR
        return BESIDE_CONVOLUTIONS if is_off_by_rank else ()
    others = network_strength(desk)
    own = Strength(
        others.rank if rank is None else _number(desk, "conv_dim", rank),
        _number(desk, "conv_alpha", alpha)
        if alpha is not None
        else others.given_alpha
        if is_lycoris
        else 1.0,
    )
    tell_convolutions(
        desk,
        own,
        others,
        rank=("network_args: conv_dim", rank),
        alpha=("network_args: conv_alpha", alpha),
    )
    return CONVOLUTIONS


def _without_convolutions(desk: Desk, rank: Any, preset: str, *, is_lycoris: bool) -> str:
    """Why convolutions larger than 1 x 1 get no adapter; empty where they do."""
    if desk.kind == "flow":
        return NO_CONVOLUTIONS
    if preset in _LINEAR:
        return f"no convolutions get an adapter by preset {preset}"
    if rank is None:
        return "" if is_lycoris and preset in _CONVOLVED else "does nothing without conv_dim"
    return "" if _number(desk, "conv_dim", rank) else "no convolutions get an adapter at rank 0"


def _number(desk: Desk, key: str, value: Any) -> float:
    """An argument as a number from 0 on; 0 where it is none, which is a problem."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if 0 <= number < math.inf:
        return number
    message = f"got {shown(value)}; allowed: a number, at least 0"
    problem = Problem(f"network_args: {key}", message)
    desk.problems += [problem] if problem not in desk.problems else []
    return 0.0


def network_strength(desk: Desk) -> Strength:
    """Rank and alpha of a network's linear layers."""
    return Strength(desk.number("network_dim"), desk.number("network_alpha"))


def _said(desk: Desk, key: str, leaf: str, becomes_: Any, value: Any) -> None:
    """Takes over an argument under its own name."""
    name = f"network_args: {key}"
    desk.given = {**desk.given, name: value}
    desk.take(name, leaf, becomes_)


def _take_alpha(desk: Desk, name: str, value: Any) -> None:
    strength = network_strength(desk)
    if strength.alpha == strength.given_alpha:
        desk.take(name, "alpha", value)
    else:
        desk.take(name, "alpha", strength.alpha)
        desk.remarks.append(ALPHA_IS_RANK.format(name=name))


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
    "network_train_text_encoder_only": without(reasons.DENOISER),
}
