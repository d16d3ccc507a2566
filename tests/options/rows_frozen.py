"""Rows of what is kept of frozen weights, and where."""

from __future__ import annotations

from options.case import Case
from options.matrix import acts, idle, refused

from trainer.machine import NO_GPU, SAME_ANYWAY


def the_frozen_weights_are_rounded(case: Case) -> None:
    # Half a step of int8 is 1/254 of the largest number of a row: predictions move, but little.
    plain, rounded = case.before().first.gradients, case.after().first.gradients
    assert plain.keys() == rounded.keys()
    moved = sum(float((plain[name] - rounded[name]).square().sum()) for name in plain)
    whole = sum(float(gradient.square().sum()) for gradient in plain.values())
    assert 0 < moved < 0.01 * whole


FROZEN = [
    acts(
        "quantization",
        "gradient",
        "the same adapter learns on rounded weights: gradients move by less than a tenth",
        the_frozen_weights_are_rounded,
        flipped={"quantization": "int8"},
    ),
    refused(
        "quantization",
        {"quantization": "int8"},
        "weights that learn are not quantised",
        base={"use_lora": False, "rank": ..., "target_unet_modules": ...},
    ),
    refused(
        "offload_blocks",
        {"offload_blocks": 1},
        "weights that learn stay on the GPU",
        base={"use_lora": False, "rank": ..., "target_unet_modules": ...},
    ),
    *idle(NO_GPU, offload_blocks=1, offload_models=True),
    *idle(SAME_ANYWAY, deterministic=True),
]
