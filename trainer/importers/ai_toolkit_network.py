"""The network of an ai-toolkit job: which adapter it is, on which layers, and how strong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.importers import reasons
from trainer.importers.adapted import CONVOLUTIONS, LAST_LAYER, WHOLE_BLOCKS
from trainer.importers.desk import Desk
from trainer.importers.rows import is_true
from trainer.importers.strengths import (
    ALPHA_IS_RANK,
    NO_CONVOLUTIONS,
    Strength,
    tell_convolutions,
)

# How a model says that it is FLUX.1, whose layers are known.
LAYERS_KNOWN = (
    *("model.is_flux=True", "model.arch=flux", "model.arch=flex1", "model.arch=flux_kontext"),
)
# How it says that it is one that does not exist here.
OTHER_MODELS = (
    *("is_v2", "is_v3", "is_pixart", "is_pixart_sigma", "is_auraflow", "is_lumina2", "is_ssd"),
    "is_vega",
)
_FORMS: Mapping[str, str] = {"lora": "lora", "locon": "lora", "lokr": "lokr", "dora": "lora"}
_NO_RANK = "no convolutions get an adapter"
_CONV_ALPHA = "network.conv_alpha"
# A rank above that of any layer: then LoKr's second factor is whole.
_WHOLE = 1_000_000


def model_says(given: Mapping[str, Any]) -> set[str]:
    """What a model says of itself; a tag behind a colon is only for its page."""
    arch = given.get("model.arch")
    said = {name: given.get(name) for name in ("model.is_flux", "model.is_xl")}
    said["model.arch"] = None if arch is None else str(arch).partition(":")[0]
    return {f"{name}={value}" for name, value in said.items()}


def is_lokr(desk: Desk) -> bool:
    """Whether the adapter is LoKr."""
    return str(desk.setting("network.type")).lower() == "lokr"


def is_whole(desk: Desk) -> bool:
    """Whether LoKr's second factor is whole; the switch counts for no other adapter."""
    return is_lokr(desk) and is_true(desk.setting("network.lokr_full_rank"))


def take_network(desk: Desk, name: str, value: Any) -> None:
    form = str(value).lower()
    if form in _FORMS:
        desk.take(name, "lora_type", _FORMS[form])
    else:
        desk.leave(name, reasons.NO_FORM)
    if form == "dora":
        desk.take(name, "use_dora", True)
    if not any(option.startswith("network.") for option in desk.given):
        desk.take(name, "use_lora", False)
        return
    if desk.kind == "table":
        convolved = CONVOLUTIONS if desk.setting("network.conv") else ()
        desk.take(name, "target_unet_modules", [*WHOLE_BLOCKS["table"], *convolved])
    elif model_says(desk.given) & set(LAYERS_KNOWN):
        desk.take(name, "target_unet_modules", list(WHOLE_BLOCKS["flow"]))
        desk.remarks.append(LAST_LAYER)
    elif desk.kind is not None:
        desk.remarks.append("Adapters are on the layers that this program takes for such a model.")


def take_conv(desk: Desk, name: str, value: Any) -> None:
    """The rank of convolutions, with their alpha, which is their rank where nothing is said."""
    if desk.kind == "flow":
        desk.leave(name, NO_CONVOLUTIONS, matters=False)
        return
    rank = desk.number(name)
    if rank == 0:
        desk.leave(name, _NO_RANK, matters=False)
        return
    alpha = desk.given.get(_CONV_ALPHA)
    own = Strength(rank, rank if alpha is None else desk.number(_CONV_ALPHA))
    others = _strength(desk)
    tell_convolutions(desk, own, others, rank=(name, value), alpha=(_CONV_ALPHA, alpha))


def take_conv_alpha(desk: Desk, name: str, value: Any) -> None:
    del value
    if desk.kind == "flow" or not desk.setting("network.conv"):
        desk.leave(name, _NO_RANK, matters=False)
    else:
        desk.told[name] = ("network.conv", ())


def _strength(desk: Desk) -> Strength:
    """Rank and alpha of linear layers, each by the option that goes before the other."""
    rank = "network.rank" if "network.rank" in desk.given else "network.linear"
    is_alpha = "network.linear_alpha" not in desk.given and "network.alpha" in desk.given
    return Strength(
        desk.number(rank), desk.number("network.alpha" if is_alpha else "network.linear_alpha")
    )


def take_alpha(desk: Desk, name: str, value: Any) -> None:
    """The alpha of linear layers; `alpha` stands for it where it is not given."""
    if is_whole(desk):
        desk.leave(name, "factors that are whole have a strength of 1", matters=False)
    elif desk.kind == "flow" and not is_lokr(desk):
        desk.leave(name, "a transformer's LoRA has a strength of 1 there", matters=False)
    elif (
        name == "network.linear_alpha" and name not in desk.given and "network.alpha" in desk.given
    ):
        return
    elif name == "network.alpha" and "network.linear_alpha" in desk.given:
        desk.leave(name, "linear_alpha goes before it", matters=False)
    elif (strength := _strength(desk)).alpha != strength.given_alpha:
        desk.take(name, "alpha", strength.alpha)
        desk.remarks.append(ALPHA_IS_RANK.format(name=name))
    else:
        desk.take(name, "alpha", value)


def take_whole_rank(desk: Desk, name: str, value: Any) -> None:
    if is_whole(desk):
        desk.take(name, "rank", _WHOLE)
    elif is_true(value):
        desk.leave(name, "counts for LoKr alone", matters=False)
    else:
        desk.leave(name, "is off", matters=False)


def take_rank(desk: Desk, name: str, value: Any) -> None:
    if is_whole(desk):
        desk.leave(name, "lokr_full_rank goes before it", matters=False)
    elif name == "network.linear" and "network.rank" in desk.given:
        desk.leave(name, "rank goes before it", matters=False)
    else:
        desk.take(name, "rank", value)
