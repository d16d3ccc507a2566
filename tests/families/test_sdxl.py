"""SDXL's conditioning on sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainer import base_model
from trainer.base_model import Precision
from trainer.config import ModelConfig


def test_time_ids_are_original_size_crop_corner_and_target_size_heights_first(
    sdxl_folder: Path,
) -> None:
    located = base_model.locate(ModelConfig(model_url=str(sdxl_folder)))
    family = base_model.load(located, Precision(*[torch.float32] * 4))
    seen: list[dict[str, Any]] = []
    family.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["added_cond_kwargs"]), with_kwargs=True
    )
    text = family.encode_text(["a TOK"])
    family.predict(
        torch.zeros(1, 4, 8, 12),
        torch.tensor([3]),
        text,
        {
            "original_size": torch.tensor([[600, 800]]),
            "crop_top_left": torch.tensor([[5, 7]]),
            "target_size": torch.tensor([[64, 96]]),
        },
    )
    assert seen[0]["time_ids"].tolist() == [[600, 800, 5, 7, 64, 96]]
    assert torch.equal(seen[0]["text_embeds"], text["pooled_prompt_embeds"])


def test_the_pooled_text_is_that_of_the_second_encoder(sdxl_folder: Path) -> None:
    located = base_model.locate(ModelConfig(model_url=str(sdxl_folder)))
    family = base_model.load(located, Precision(*[torch.float32] * 4))
    tokens = family.pipeline.tokenizer_2(
        "a TOK", padding="max_length", max_length=77, return_tensors="pt"
    )
    expected = family.pipeline.text_encoder_2(tokens.input_ids).text_embeds
    torch.testing.assert_close(family.encode_text(["a TOK"])["pooled_prompt_embeds"], expected)
