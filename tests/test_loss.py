"""The loss, against hand arithmetic, and min-SNR against the definition in the paper."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from trainer.loss import diffusion_loss, example_losses, latent_weights, min_snr_weights
from trainer.objectives import Ddpm

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def snr_at(*timesteps: int) -> torch.Tensor:
    share = DDPMScheduler(**SCHEDULE).alphas_cumprod[list(timesteps)]
    return share / (1 - share)


def test_the_loss_of_an_example_is_its_mean_squared_error() -> None:
    prediction = torch.tensor([[[[1.0, 2.0]]], [[[0.0, 3.0]]]])
    target = torch.tensor([[[[0.0, 0.0]]], [[[0.0, 0.0]]]])
    # (1 + 4) / 2 and (0 + 9) / 2.
    assert example_losses(prediction, target).tolist() == [2.5, 4.5]


def test_the_loss_is_computed_in_32_bits() -> None:
    prediction = torch.full((1, 1, 1, 2), 300.0, dtype=torch.float16)
    losses = example_losses(prediction, torch.zeros_like(prediction))
    # 300² is beyond the largest 16-bit float, 65504.
    assert losses.dtype == torch.float32
    assert losses.tolist() == [90000.0]


def test_a_masked_pixel_does_not_change_the_loss() -> None:
    mask = torch.tensor([[[[1.0, 0.0]]]])
    target = torch.zeros(1, 2, 1, 2)
    near, far = torch.ones(1, 2, 1, 2), torch.ones(1, 2, 1, 2)
    far[..., 1] = 100.0
    weights = latent_weights(mask, (1, 2))
    assert torch.equal(example_losses(near, target, weights), example_losses(far, target, weights))


def test_a_masks_scale_and_area_do_not_change_the_loss_of_a_uniform_error() -> None:
    prediction, target = torch.full((3, 4, 8, 8), 2.0), torch.zeros(3, 4, 8, 8)
    mask = torch.zeros(3, 1, 8, 8)
    mask[0] = 1.0
    mask[1] = 0.25
    mask[2, :, :2, :2] = 1.0
    weights = latent_weights(mask, (8, 8))
    torch.testing.assert_close(example_losses(prediction, target, weights), torch.full((3,), 4.0))


def test_a_mask_weights_each_pixel_once() -> None:
    # Weights 1 and 3, mean 2: (1/2 * 4² + 3/2 * 2²) / 2 = 7; masking prediction and target
    # instead would square the weights.
    prediction = torch.tensor([[[[4.0, 2.0]]]])
    mask = torch.tensor([[[[1.0, 3.0]]]])
    weights = latent_weights(mask, (1, 2))
    assert example_losses(prediction, torch.zeros_like(prediction), weights).tolist() == [7.0]


def test_a_mask_becomes_latent_weights_by_its_area_so_that_thin_lines_survive() -> None:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 3] = 1.0
    weights = latent_weights(mask, (2, 2))
    # A line one pixel wide covers an eighth of the left latents, nothing of the right: 1/8, 0
    # over their mean, 1/16. Taking every eighth pixel would miss it.
    assert weights.tolist() == [[[[2.0, 0.0], [2.0, 0.0]]]]


def test_a_mask_that_leaves_nothing_leaves_no_loss_and_no_nan() -> None:
    weights = latent_weights(torch.zeros(1, 1, 8, 8), (1, 1))
    assert example_losses(torch.ones(1, 4, 1, 1), torch.zeros(1, 4, 1, 1), weights).tolist() == [0]


@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_epsilon_weights_are_gamma_over_snr_capped_at_one(gamma: float) -> None:
    weights = min_snr_weights(snr_at(50, 700), gamma, "epsilon").tolist()
    expected = [min(1.0, gamma / ratio) for ratio in snr_at(50, 700).tolist()]
    assert weights == pytest.approx(expected, rel=1e-6)
    assert weights[0] < 1.0
    assert weights[1] == 1.0


@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_v_prediction_weights_divide_by_snr_plus_one(gamma: float) -> None:
    weights = min_snr_weights(snr_at(50, 700), gamma, "v_prediction").tolist()
    expected = [min(ratio, gamma) / (ratio + 1) for ratio in snr_at(50, 700).tolist()]
    assert weights == pytest.approx(expected, rel=1e-6)
    # Adding one to epsilon's weight instead would give numbers between 1 and 2.
    assert max(weights) < 1.0


@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_sample_prediction_weights_are_snr_capped_at_gamma(gamma: float) -> None:
    weights = min_snr_weights(snr_at(50, 700), gamma, "sample").tolist()
    expected = [min(ratio, gamma) for ratio in snr_at(50, 700).tolist()]
    assert weights == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("gamma", "first_full", "mean"), [(0.5, 460, 0.677), (5.0, 147, 0.917)])
def test_weights_over_the_stable_diffusion_schedule_are_the_measured_ones(
    gamma: float, first_full: int, mean: float
) -> None:
    # Measured independently with diffusers' schedule in numpy.
    weights = min_snr_weights(snr_at(*range(1000)), gamma, "epsilon")
    assert int((weights >= 1).nonzero()[0]) == first_full
    assert weights.mean().item() == pytest.approx(mean, abs=0.001)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_weights_stay_finite_where_no_signal_is_left(prediction_type: str) -> None:
    scheduler = DDPMScheduler(**SCHEDULE, rescale_betas_zero_snr=True)
    snr = Ddpm.from_scheduler(scheduler).snr(torch.tensor([998, 999]))
    weights = min_snr_weights(snr, 5.0, prediction_type)
    expected = {"epsilon": 1.0, "v_prediction": 0.0, "sample": 0.0}[prediction_type]
    assert snr[1] == 0
    assert torch.isfinite(weights).all()
    assert weights[1] == expected


@pytest.mark.parametrize("gamma", [None, 0.0, 0])
def test_without_gamma_every_weight_is_one(gamma: float | None) -> None:
    assert min_snr_weights(snr_at(0, 999), gamma, "v_prediction").tolist() == [1.0, 1.0]


@pytest.mark.parametrize("gamma", [0.5, 5.0, None])
def test_gradients_are_the_weighted_sum_of_the_examples_gradients(gamma: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, target = torch.randn(2, 2, 4, 3, 3, generator=generator).unbind()
    layer = torch.nn.Parameter(torch.tensor(0.3))
    snr = snr_at(50, 700)

    def gradient(snr_gamma: float | None, weights: list[float]) -> torch.Tensor:
        loss = diffusion_loss(
            layer * inputs,
            target,
            snr=snr,
            prediction_type="epsilon",
            snr_gamma=snr_gamma,
            shares=torch.tensor(weights),
            is_class=torch.zeros(2, dtype=torch.bool),
        )
        return torch.autograd.grad(loss, layer)[0]

    first, second = gradient(None, [1.0, 0.0]), gradient(None, [0.0, 1.0])
    scales = [1.0, 1.0] if gamma is None else [min(1.0, gamma / float(r)) for r in snr]
    torch.testing.assert_close(
        gradient(gamma, [0.5, 0.5]), 0.5 * (scales[0] * first + scales[1] * second)
    )


def test_micro_batches_add_up_to_the_mean_over_the_step() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 5, 4, 3, 3, generator=generator).unbind()

    def loss_of(slots: slice) -> torch.Tensor:
        count = len(range(5)[slots])
        return diffusion_loss(
            prediction[slots],
            target[slots],
            snr=snr_at(10, 200, 400, 600, 800)[slots],
            prediction_type="epsilon",
            snr_gamma=5.0,
            shares=torch.full((count,), 1 / 5),
            is_class=torch.zeros(count, dtype=torch.bool),
        )

    parts = loss_of(slice(0, 2)) + loss_of(slice(2, 4)) + loss_of(slice(4, 5))
    torch.testing.assert_close(parts, loss_of(slice(0, 5)))


def test_an_example_of_weight_zero_leaves_no_trace() -> None:
    prediction = torch.ones(2, 4, 3, 3, requires_grad=True)
    loss = diffusion_loss(
        prediction,
        torch.zeros(2, 4, 3, 3),
        snr=snr_at(10, 10),
        prediction_type="epsilon",
        snr_gamma=None,
        shares=torch.tensor([1.0, 0.0]),
        is_class=torch.zeros(2, dtype=torch.bool),
    )
    loss.backward()
    assert loss.item() == 1.0
    assert prediction.grad is not None
    assert prediction.grad[1].abs().max() == 0


def test_min_snr_weights_the_subject_and_leaves_the_class_alone() -> None:
    snr = snr_at(50, 50)
    loss = diffusion_loss(
        torch.ones(2, 4, 3, 3),
        torch.zeros(2, 4, 3, 3),
        snr=snr,
        prediction_type="epsilon",
        snr_gamma=0.5,
        shares=torch.tensor([1.0, 2.5]),
        is_class=torch.tensor([False, True]),
    )
    assert loss.item() == pytest.approx(0.5 / float(snr[0]) + 2.5, rel=1e-6)
