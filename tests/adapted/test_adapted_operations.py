"""How many operations a step takes: what limits a GPU at batch 1, whatever the size of tensors."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from layer_pairs import with_adapter
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import adapters
from trainer.adapted.layers import AdaptedLayer, Copies

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")

# These change how a tensor is looked at, or name memory: no kernel of a GPU comes of them. Torch
# calls all but the last two views itself.
WITHOUT_WORK = {
    *("view", "_unsafe_view", "t", "transpose", "detach", "expand", "slice", "split", "select"),
    *("squeeze", "unsqueeze", "permute", "as_strided", "alias", "unbind", "lift_fresh"),
    *("empty", "empty_like"),
}


class Operations(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not func.is_view or name in WITHOUT_WORK, name
        self.seen[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def count(self) -> int:
        """Operations that do something."""
        return sum(n for name, n in self.seen.items() if name not in WITHOUT_WORK)


def sdxl_with_few_channels() -> UNet2DConditionModel:
    """SDXL's denoiser, every layer of it, a fortieth as wide."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(8, 16, 32),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(2, 4, 8),
            use_linear_projection=True,
            cross_attention_dim=16,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=16 + 6 * 4,
            norm_num_groups=4,
        )
    unet = unet.requires_grad_(False).to(torch.bfloat16).to_empty(device="cpu")
    for tensor in (*unet.parameters(), *unet.buffers()):
        tensor.fill_(0.01)
    return unet


@pytest.mark.parametrize(("form", "most"), [("lora", 10_500), ("dora", 14_000)])
def test_a_step_of_sdxl_takes_no_more_operations_than(form: str, most: int) -> None:
    unet = sdxl_with_few_channels()
    layers, _ = adapters.target_layers(unet, ATTENTION, field="targets", must_match=True)
    with_adapter(unet, form, "ours", layers, rank=2, alpha=2.0)
    assert sum(isinstance(each, AdaptedLayer) for each in unet.modules()) == 560
    copies = Copies([unet], torch.bfloat16)
    learning = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, fused=True)
    # Its first step makes its state.
    for parameter in learning:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    latents, text = torch.ones(1, 4, 8, 8), torch.ones(1, 3, 16)
    added = {"text_embeds": torch.ones(1, 16), "time_ids": torch.ones(1, 6)}

    with Operations() as operations:
        with copies.of_this_step():
            with torch.autocast("cpu", torch.bfloat16):
                prediction = unet(latents, 500, text, added_cond_kwargs=added).sample
            (prediction.float() - latents).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    assert 0.6 * most < operations.count <= most, operations.seen.most_common()
