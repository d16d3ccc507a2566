"""A trained SDXL adapter in other programs, in a process that has nothing of this package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny import configuration, train
from trained_adapters import SDXL

from trainer import adapters

# Loads the adapter as a user of diffusers does, and predicts.
DIFFUSERS_PROGRAM = """
import sys
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

base, outputs, inputs, answer = sys.argv[1:]
pipe = StableDiffusionXLPipeline.from_pretrained(base)
given = load_file(inputs)
conditions = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}

def predict():
    with torch.no_grad():
        return pipe.unet(
            given["latents"], given["timesteps"], given["text"], added_cond_kwargs=conditions
        ).sample

before = predict()
pipe.load_lora_weights(outputs)
save_file({"before": before, "after": predict()}, answer)
assert "trainer" not in sys.modules
"""

# Puts the base model's layers into a bare tree under their kohya names, and lets LyCORIS merge.
LYCORIS_PROGRAM = """
import json
import sys
import torch
from diffusers import UNet2DConditionModel
from lycoris import create_lycoris_from_weights
from safetensors.torch import load_file, save_file

base, file, names, answer = sys.argv[1:]
unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
names = json.loads(names)
tree = torch.nn.Module()
for name, path in names.items():
    tree.add_module(name, unet.get_submodule(path))
tensors = {f"lycoris_{key}": tensor for key, tensor in load_file(file).items()}
network, _ = create_lycoris_from_weights(1.0, "", tree, weights_sd=tensors)
network.merge_to(1.0)
merged = {path: getattr(tree, name).weight.detach().clone() for name, path in names.items()}
save_file(merged, answer)
assert "trainer" not in sys.modules
"""


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Args:
        base: the base model's folder.
        outputs: the result files.
        unet: a fresh denoiser with the adapter tensors of the last checkpoint.
    """

    base: Path
    outputs: Path
    unet: UNet2DConditionModel


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "dora"])
def finished(
    request: pytest.FixtureRequest,
    sdxl_folder: Path,
    photo_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Trained]:
    """A training with an alpha other than its rank, on attentions and convolutions."""
    folder = tmp_path_factory.mktemp("run")
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]
    config = configuration(
        sdxl_folder,
        photo_folder,
        use_dora=request.param,
        alpha=2.0,
        target_unet_modules=targets,
        learning_rate=1e-2,
    )
    train(config, folder)
    unet = UNet2DConditionModel.from_pretrained(sdxl_folder, subfolder="unet")
    adapters.make_trainable(
        unet,
        config.adapter,
        config.adapter.target_unet_modules,
        field="target_unet_modules",
        component="unet",
        seed=0,
        must_match=True,
    )
    last = load_file(folder / "checkpoints" / "step-4" / "weights.safetensors")
    adapters.load_adapter_tensors(
        unet, {name.removeprefix("unet."): tensor for name, tensor in last.items()}
    )
    yield Trained(sdxl_folder, folder / "outputs", unet)


def run_program(program: str, folder: Path, *arguments: str | Path) -> dict[str, torch.Tensor]:
    """What a program saves into the file that is its last argument."""
    answer = folder / "answer.safetensors"
    command = [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return load_file(answer)


def test_diffusers_predicts_what_the_trained_model_predicts(
    finished: Trained, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(5)
    width, pooled = finished.unet.config.cross_attention_dim, _pooled_width(finished.unet)
    given = {
        "latents": torch.randn(2, 4, 8, 8, generator=generator),
        "timesteps": torch.tensor([17, 801]),
        "text": torch.randn(2, 77, width, generator=generator),
        "pooled": torch.randn(2, pooled, generator=generator),
        "time_ids": torch.tensor([[96, 64, 0, 8, 64, 64]] * 2),
    }
    save_file(given, tmp_path / "inputs.safetensors")
    with torch.no_grad():
        expected = finished.unet(
            given["latents"],
            given["timesteps"],
            given["text"],
            added_cond_kwargs={"text_embeds": given["pooled"], "time_ids": given["time_ids"]},
        ).sample

    found = run_program(
        DIFFUSERS_PROGRAM,
        tmp_path,
        finished.base,
        finished.outputs,
        tmp_path / "inputs.safetensors",
    )

    assert float((found["before"] - expected).abs().max()) > 1e-3
    torch.testing.assert_close(found["after"], expected, atol=1e-5, rtol=0)


def test_lycoris_merges_the_kohya_file_into_the_trained_weights(
    finished: Trained, tmp_path: Path
) -> None:
    trained = dict(adapters.EffectiveWeights(finished.unet))
    base = load_file(finished.base / "unet" / "diffusion_pytorch_model.safetensors")
    # The table of names that was written out by hand.
    names = {SDXL.of_layer("unet", path): path for path in trained}

    found = run_program(
        LYCORIS_PROGRAM,
        tmp_path,
        finished.base,
        finished.outputs / "lora.safetensors",
        json.dumps(names),
    )

    assert found.keys() == trained.keys()
    for path, expected in trained.items():
        change = torch.linalg.vector_norm(expected - base[f"{path}.weight"])
        difference = torch.linalg.vector_norm(found[path] - expected)
        assert change > 1e-3 * torch.linalg.vector_norm(expected)
        assert difference < 1e-4 * change, path


def _pooled_width(unet: UNet2DConditionModel) -> int:
    """Width of the pooled text: what the size conditioning leaves of its layer's input."""
    return (
        unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    )
