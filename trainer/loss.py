"""The training loss: squared error per example, min-SNR weights, masks, prior preservation.

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


def latent_weights(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The loss weight of each latent pixel (B, 1, h, w): area mean, then mean 1 in each example.

    Normalised, a small subject counts as much as a large one, and a mask changes what is learnt,
    not how strongly. An example whose mask is all 0 has nothing to learn: its weights are 0.

    Args:
        mask: (B, 1, H, W) weights of pixels, at least 0.
        size: (h, w) of the latents.
    """
    means = torch.nn.functional.adaptive_avg_pool2d(mask.float(), size)
    whole = means.flatten(1).mean(1).view(-1, 1, 1, 1)
    return torch.where(whole > 0, means / whole, 0.0)


def example_losses(
    prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared error of each example (B,), in fp32.

    Args:
        prediction: (B, C, …).
        target: of the same shape.
        weights: (B, 1, …) of latent pixels, see `latent_weights`. None: all 1.
    """
    errors = (prediction.float() - target.float()).square()
    if weights is not None:
        errors = errors * weights
    return errors.flatten(1).mean(1)


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
    shares: torch.Tensor,
    is_class: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of one micro-batch: a sum, so that micro-batches of a step add up.

    Args:
        prediction: (B, C, …).
        target: of the same shape.
        snr: (B,) signal-to-noise ratios of the examples.
        prediction_type: what the denoiser predicts.
        snr_gamma: see `min_snr_weights`.
        shares: (B,) share of each example in the step's mean, for class pictures times the
            weight of prior preservation; 0 for a slot that only fills up.
        is_class: (B,) true for class pictures, whose loss min-SNR leaves alone (diffusers'
            advanced scripts).
        mask: (B, 1, H, W) weights of pixels, see `latent_weights`. None: all alike.
    """
    height, width = target.shape[-2:]
    weights = None if mask is None else latent_weights(mask, (height, width))
    losses = example_losses(prediction, target, weights)
    scale = min_snr_weights(snr, snr_gamma, prediction_type)
    scale = torch.where(is_class, 1.0, scale) * shares
    return (losses * scale.to(losses)).sum()
