"""The trainings that `bench_gpu.py` measures, what is foretold of them and what they must reach.

A case is named family-resolution-batch-adapter, and then by what is forced in it. With nothing
forced the trainer chooses by itself. Predictions and bounds hold for an H100 of 80 GB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Range = tuple[float, float]


@dataclass(frozen=True)
class Bounds:
    """What a case must reach on an H100; None: nothing is asked.

    Args:
        ms: most time of a step.
        gib: most memory in tensors.
        mfu: least share of the arithmetic that the GPU was measured to do.
        whole_seconds: most time of the whole run, from the command to verified files.
    """

    ms: float | None = None
    gib: float | None = None
    mfu: float | None = None
    whole_seconds: float | None = None


@dataclass(frozen=True)
class Case:
    """A training that is measured.

    Args:
        family: of the base model.
        leaves: options over the preset's.
        preset: what it starts from; None: the defaults.
        predicted_ms: time of a step, foretold; None: a rule foretells it from the counts.
        predicted_gib: most memory, foretold likewise; None: the forecast says it.
        bounds: what it must reach.
    """

    family: str
    leaves: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None
    predicted_ms: Range | None = None
    predicted_gib: float | None = None
    bounds: Bounds = Bounds()


ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
AND_CONVOLUTIONS = (*ATTENTION, "conv1", "conv2")

# How a step is run, where nothing is left to the trainer.
EAGER: Mapping[str, Any] = {
    "adapter_layers": "ours",
    "cuda_graph": False,
    "compile_blocks": False,
    "gradient_checkpointing": False,
}
PEFT: Mapping[str, Any] = {**EAGER, "adapter_layers": "peft", "channels_last": False}
GRAPH: Mapping[str, Any] = {**EAGER, "cuda_graph": True}
COMPILED: Mapping[str, Any] = {**EAGER, "compile_blocks": True}

CHECKPOINTED: Mapping[str, Any] = {"gradient_checkpointing": True}
DORA: Mapping[str, Any] = {"use_dora": True}
LOKR: Mapping[str, Any] = {"lora_type": "lokr"}
LOHA: Mapping[str, Any] = {"lora_type": "loha"}


_NONE = Bounds()


def _size(side: int) -> dict[str, Any]:
    return {"resolution_width": side, "resolution_height": side}


def _case(
    family: str,
    side: int,
    *options: Mapping[str, Any],
    batch_size: int = 1,
    predicted_ms: Range | None = None,
    predicted_gib: float | None = None,
    bounds: Bounds = _NONE,
) -> Case:
    leaves: dict[str, Any] = {
        "rank": 32,
        "target_unet_modules": list(ATTENTION),
        "mixed_precision": "bf16",
        "batch_size": batch_size,
        **_size(side),
    }
    for option in options:
        leaves |= option
    return Case(
        family,
        leaves,
        predicted_ms=predicted_ms,
        predicted_gib=predicted_gib,
        bounds=bounds,
    )


# fal-ai/personalization, its adapter and its batch of 6 pictures and 6 of the class; captions,
# masks and new tokens are left out. Class pictures are given, so none are made.
FAL: Mapping[str, Any] = {
    "batch_size": 6,
    "use_dora": True,
    "target_unet_modules": list(AND_CONVOLUTIONS),
    "with_prior_preservation": True,
    "photo_class": "Person",
    "snr_gamma": 0.5,
}
# A whole job of that service.
FAL_STEPS = 1000

SDXL = "sdxl"
FLUX = "flux"
SD15 = "sd15"

# What the trainer does by itself: the points of the charts, and most of the bounds.
CHOSEN: Mapping[str, Case] = {
    "sdxl-512-b1-lora": _case(SDXL, 512),
    "sdxl-768-b1-lora": _case(SDXL, 768),
    "sdxl-1024-b1-lora": _case(SDXL, 1024, bounds=Bounds(ms=65)),
    "sdxl-1024-b2-lora": _case(SDXL, 1024, batch_size=2),
    "sdxl-1024-b4-lora": _case(SDXL, 1024, batch_size=4, bounds=Bounds(ms=165, mfu=0.45)),
    "sdxl-1024-b8-lora": _case(SDXL, 1024, batch_size=8),
    "sdxl-1024-b1-lora-r8": _case(SDXL, 1024, {"rank": 8}),
    "sdxl-1024-b1-lora-r128": _case(SDXL, 1024, {"rank": 128}),
    "sdxl-1024-b1-dora": _case(SDXL, 1024, DORA, bounds=Bounds(ms=75)),
    "sdxl-1024-b1-lokr": _case(SDXL, 1024, LOKR),
    "sdxl-1024-b1-loha": _case(SDXL, 1024, LOHA),
    "fal-default": _case(SDXL, 768, FAL, bounds=Bounds(ms=300, gib=60, whole_seconds=300)),
    "fal-default-tokens": _case(
        SDXL,
        768,
        FAL,
        {"train_text_encoder_ti": True, "random_rotation_start": -2, "random_rotation_end": 2},
    ),
    "flux-512-b1-lora": _case(FLUX, 512, bounds=Bounds(ms=127)),
    "flux-768-b1-lora": _case(FLUX, 768),
    "flux-1024-b1-lora": _case(FLUX, 1024, bounds=Bounds(ms=435)),
    "flux-512-b2-lora": _case(FLUX, 512, batch_size=2),
    "flux-512-b4-lora": _case(FLUX, 512, batch_size=4),
    "flux-512-b1-lora-r8": _case(FLUX, 512, {"rank": 8}),
    "flux-512-b1-lora-r128": _case(FLUX, 512, {"rank": 128}),
    "flux-1024-b1-dora": _case(FLUX, 1024, DORA),
    "sd15-512-b1-lora": _case(SD15, 512),
    "sd15-512-b4-lora": _case(SD15, 512, batch_size=4),
}

# One choice at a time.
FORCED: Mapping[str, Case] = {
    "sdxl-1024-b1-lora-peft": _case(SDXL, 1024, PEFT, predicted_ms=(200, 350)),
    "sdxl-1024-b1-lora-eager": _case(SDXL, 1024, EAGER, predicted_ms=(150, 260)),
    "sdxl-1024-b1-lora-graph": _case(SDXL, 1024, GRAPH, predicted_ms=(45, 60)),
    "sdxl-1024-b1-lora-compiled": _case(SDXL, 1024, COMPILED),
    "sdxl-1024-b1-lora-compiled-graph": _case(SDXL, 1024, COMPILED, {"cuda_graph": True}),
    "sdxl-1024-b4-lora-peft": _case(SDXL, 1024, PEFT, batch_size=4, predicted_ms=(220, 220)),
    "sdxl-1024-b4-lora-eager": _case(SDXL, 1024, EAGER, batch_size=4, predicted_ms=(175, 175)),
    "sdxl-1024-b1-dora-peft": _case(SDXL, 1024, PEFT, DORA, predicted_ms=(430, 700)),
    "sdxl-1024-b1-dora-graph": _case(SDXL, 1024, GRAPH, DORA, predicted_ms=(50, 65)),
    "sdxl-1024-b1-lokr-peft": _case(SDXL, 1024, PEFT, LOKR),
    "sdxl-1024-b1-loha-peft": _case(SDXL, 1024, PEFT, LOHA),
    "fal-default-peft": _case(SDXL, 768, FAL, PEFT, predicted_ms=(670, 670), predicted_gib=72),
    "fal-default-eager": _case(SDXL, 768, FAL, EAGER, predicted_ms=(330, 330), predicted_gib=51),
    "fal-default-compiled": _case(SDXL, 768, FAL, COMPILED, predicted_ms=(240, 280)),
    "flux-512-b1-lora-peft": _case(FLUX, 512, PEFT, predicted_ms=(175, 290)),
    "flux-1024-b1-lora-peft": _case(FLUX, 1024, PEFT, predicted_ms=(570, 570)),
    "flux-1024-b1-lora-graph": _case(FLUX, 1024, GRAPH),
    "flux-1024-b1-lora-compiled": _case(FLUX, 1024, COMPILED, predicted_ms=(330, 380)),
    "flux-1024-b1-lora-peft-ckpt": _case(FLUX, 1024, PEFT, CHECKPOINTED, predicted_ms=(820, 820)),
    "flux-1024-b1-lora-fp8-compiled": _case(
        FLUX, 1024, COMPILED, {"quantization": "fp8"}, predicted_ms=(250, 300)
    ),
    "sd15-512-b1-lora-peft": _case(SD15, 512, PEFT),
    "sdxl-1024-b1-lora-ckpt": _case(SDXL, 1024, CHECKPOINTED),
    "flux-1024-b1-lora-ckpt": _case(FLUX, 1024, CHECKPOINTED),
    "sdxl-1024-b1-lora-contiguous": _case(SDXL, 1024, {"channels_last": False}),
    "sdxl-1024-b1-lora-channels-last": _case(SDXL, 1024, {"channels_last": True}),
    **{
        f"{family}-1024-b1-lora-{kernel}-attention": _case(family, 1024, {"attention": kernel})
        for family in (SDXL, FLUX)
        for kernel in ("flash", "cudnn", "efficient", "math")
    },
    **{
        f"sdxl-1024-b1-lora-{bits}": _case(SDXL, 1024, {"quantization": bits})
        for bits in ("int8", "fp8", "nf4")
    },
    **{
        f"sdxl-1024-b1-lora-{optimizer}": _case(SDXL, 1024, {"optimizer": optimizer})
        for optimizer in ("adamw8bit", "adafactor", "prodigy")
    },
    "sdxl-1024-b1-lora-fp32": _case(SDXL, 1024, {"mixed_precision": "no", "tf32": False}),
    "sdxl-1024-b1-lora-tf32": _case(SDXL, 1024, {"mixed_precision": "no", "tf32": True}),
}

# Presets that say which GPU they are for, at the sizes that they have.
PRESETS: Mapping[str, Case] = {
    "sdxl-12gb": Case(SDXL, preset="sdxl-12gb"),
    "sdxl-8gb": Case(SDXL, preset="sdxl-8gb"),
    "flux-24gb": Case(FLUX, preset="flux-24gb"),
    "flux-16gb": Case(FLUX, preset="flux-16gb"),
    "flux-12gb": Case(FLUX, preset="flux-12gb"),
    "flux-full-512": Case(FLUX, _size(512), preset="flux-full-80gb"),
    "flux-full-1024": Case(FLUX, _size(1024), preset="flux-full-80gb"),
}

CASES: Mapping[str, Case] = {**CHOSEN, **FORCED, **PRESETS}
# At which every case of a small model is tried.
SMALL: Mapping[str, Any] = {**_size(64), "rank": 2, "batch_size": 1, "offload_blocks": 0}
