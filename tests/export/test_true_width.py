"""A kohya file of FLUX.1's true width in stock diffusers, whose reader has that width built in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file

from trainer.export.facts import TrainingFacts
from trainer.export.kohya import write_kohya
from trainer.export.state import AdapterState, Strength
from trainer.export.verify import WrittenFile, verify
from trainer.families.flux import FAMILY

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "add_v_proj"]


@pytest.mark.thorough
def test_stock_diffusers_reads_the_file_at_true_width(tmp_path: Path) -> None:
    torch.manual_seed(0)
    # Weights of 16 bits, one block of each kind: 0.5 billion of them.
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    transformer = transformer.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in transformer.parameters():
        parameter.data = torch.full((), 0.5, dtype=torch.bfloat16).expand(parameter.shape)
    layers = {
        name: layer
        for name, layer in transformer.named_modules()
        if isinstance(layer, torch.nn.Linear) and name.endswith(tuple(TARGETS))
    }
    tensors, holds = {}, {}
    for name, layer in layers.items():
        rows, inputs = layer.weight.shape
        down, up = torch.randn(2, inputs), torch.randn(rows, 2) * 0.01
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        holds[name] = 0.5 + up @ down
    state = AdapterState("lora", False, {"transformer": tensors}, {"transformer": Strength(2, 2)})
    path = tmp_path / "lora.safetensors"
    write_kohya(path, state, FAMILY.kohya, TrainingFacts("lora"), torch.float32)

    def fresh() -> FluxPipeline:
        return FluxPipeline(None, None, None, None, None, None, transformer)

    file = WrittenFile("kohya_lora", path, {"transformer": holds})
    stage = verify(tmp_path, [file], fresh, FAMILY.kohya)
    while True:
        try:
            next(stage)
        except StopIteration as end:
            checks = {check.reader: check for check in end.value}
            break

    assert len(layers) == 4 + 1 + 4
    assert (checks["diffusers"].status, checks["diffusers"].reason) == ("passed", "")
    assert checks["diffusers"].keys_matched == len(load_file(path)) * 2 // 3
