"""The training loss: squared error per example, min-SNR weights, masks and example weights.

Values and tensors in, tensors out; knows neither models nor configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

Weights = Callable[[torch.Tensor, float], torch.Tensor]

# Prediction type to the weight from SNR and gamma (Hang et al. 2023, section 3.4). The row of
# epsilon is min(SNR, gamma) / SNR, written so that it stays finite where SNR is 0.
MIN_SNR_WEIGHTS: Mapping[str, Weights] = {
    "epsilon": lambda snr, gamma: (gamma / snr).clamp(max=1),
    "v_prediction": lambda snr, gamma: snr.clamp(max=gamma) / (snr + 1),
    "sample": lambda snr, gamma: snr.clamp(max=gamma),
}


def example_losses(
    prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared error of each example (B,), in fp32.

    Args:
        prediction: (B, C, …).
        target: of the same shape.
        mask: (B, 1, …) weights of pixels, at least 0, not all 0; divided by their mean in each
            example, so that a small subject counts as much as a large one. None: all alike.
    """
    errors = (prediction.float() - target.float()).square()
    if mask is None:
        return errors.flatten(1).mean(1)
    weights = mask.float() / mask.float().flatten(1).mean(1).view(-1, *[1] * (mask.ndim - 1))
    return (errors * weights).flatten(1).mean(1)


def min_snr_weights(snr: torch.Tensor, gamma: float | None, prediction_type: str) -> torch.Tensor:
    """Weight (B,) of each example's loss by min-SNR-gamma (Hang et al. 2023).

    Args:
        snr: (B,) signal-to-noise ratios, 0 where a schedule ends without any signal.
        gamma: the bound on SNR; None or 0: all weights 1.
        prediction_type: a key of `MIN_SNR_WEIGHTS`.
    """
    if not gamma:
        return torch.ones_like(snr)
    return MIN_SNR_WEIGHTS[prediction_type](snr, gamma)


def diffusion_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    *,
    snr: torch.Tensor,
    prediction_type: str,
    snr_gamma: float | None,
    weights: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of one micro-batch: a sum, so that micro-batches of a step add up.

    Args:
        prediction: (B, C, …).
        target: of the same shape.
        snr: (B,) signal-to-noise ratios of the examples.
        prediction_type: what the denoiser predicts.
        snr_gamma: see `min_snr_weights`.
        weights: (B,) share of each example in the step's mean; 0 for a slot that only fills up.
        mask: see `example_losses`.
    """
    losses = example_losses(prediction, target, mask)
    scale = min_snr_weights(snr, snr_gamma, prediction_type) * weights
    return (losses * scale.to(losses)).sum()
