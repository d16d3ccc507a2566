"""A trained SDXL adapter in other programs, in a process that has nothing of this package."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny import configuration, train
from trained_adapters import SDXL

from trainer import adapters

# For each training: loads the adapter as a user of diffusers does, and predicts; then puts the base
# model's layers into a bare tree under their kohya names, and lets LyCORIS merge.
PROGRAM = """
import json
import sys
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from lycoris import create_lycoris_from_weights
from safetensors.torch import load_file, save_file

base, inputs, jobs = sys.argv[1:]
given = load_file(inputs)
conditions = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}

def predict(unet):
    with torch.no_grad():
        return unet(
            given["latents"], given["timesteps"], given["text"], added_cond_kwargs=conditions
        ).sample

def predictions(outputs):
    pipe = StableDiffusionXLPipeline.from_pretrained(base)
    before = predict(pipe.unet)
    pipe.load_lora_weights(outputs)
    return {"before": before, "after": predict(pipe.unet)}

def merged(file, names):
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    tree = torch.nn.Module()
    for name, path in names.items():
        tree.add_module(name, unet.get_submodule(path))
    tensors = {f"lycoris_{key}": tensor for key, tensor in load_file(file).items()}
    network, _ = create_lycoris_from_weights(1.0, "", tree, weights_sd=tensors)
    network.merge_to(1.0)
    return {path: getattr(tree, name).weight.detach().clone() for name, path in names.items()}

for job in json.loads(jobs):
    save_file(predictions(job["outputs"]), job["predicted"])
    save_file(merged(job["kohya"], job["names"]), job["merged"])
assert "trainer" not in sys.modules
"""

FORMS = {"lora": False, "dora": True}
MIDDLE = "mid_block.attentions.0.transformer_blocks.0"
# Layers of every kind, at every place of which kohya files change the name.
TARGETS = [
    *(f"{MIDDLE}.{layer}" for layer in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_v")),
    *("attn1.to_out.0", "mid_block.resnets.0.conv1"),
    *("down_blocks.1.resnets.0.conv1", "up_blocks.0.resnets.1.conv1"),
]


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Args:
        base: the base model's folder.
        outputs: the result files.
        unet: a fresh denoiser with the adapter tensors of the last checkpoint.
        predicted: what diffusers predicts without the adapter and with it.
        merged: the weights that LyCORIS makes of the kohya file.
    """

    base: Path
    outputs: Path
    unet: UNet2DConditionModel
    predicted: Path
    merged: Path


@pytest.fixture(scope="module")
def given(sdxl_folder: Path) -> dict[str, torch.Tensor]:
    """What a denoiser is given to predict from."""
    config = UNet2DConditionModel.load_config(sdxl_folder, subfolder="unet")
    generator = torch.Generator().manual_seed(5)
    return {
        "latents": torch.randn(2, 4, 8, 8, generator=generator),
        "timesteps": torch.tensor([17, 801]),
        "text": torch.randn(2, 77, config["cross_attention_dim"], generator=generator),
        "pooled": torch.randn(2, _pooled_width(config), generator=generator),
        "time_ids": torch.tensor([[96, 64, 0, 8, 64, 64]] * 2),
    }


@pytest.fixture(scope="module")
def all_finished(
    given: dict[str, torch.Tensor],
    sdxl_folder: Path,
    photo_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Trained]:
    """A training of each form, and all result files read in one other process."""
    root = tmp_path_factory.mktemp("separate")
    finished = {
        form: _finished(root / form, sdxl_folder, photo_folder, use_dora)
        for form, use_dora in FORMS.items()
    }
    save_file(given, root / "inputs.safetensors")
    jobs = [
        {
            "outputs": str(each.outputs),
            "kohya": str(each.outputs / "lora.safetensors"),
            # The table of names that was written out by hand.
            "names": {SDXL.of_layer("unet", p): p for p in adapters.EffectiveWeights(each.unet)},
            "predicted": str(each.predicted),
            "merged": str(each.merged),
        }
        for each in finished.values()
    ]
    given_to_it = [sdxl_folder, root / "inputs.safetensors", json.dumps(jobs)]
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, *map(str, given_to_it)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    return finished


@pytest.fixture(params=FORMS)
def finished(request: pytest.FixtureRequest, all_finished: dict[str, Trained]) -> Trained:
    """One of the trainings."""
    return all_finished[request.param]


def _finished(folder: Path, base: Path, photos: Path, use_dora: bool) -> Trained:
    """A training with an alpha other than its rank, on attentions and convolutions."""
    config = configuration(
        base,
        photos,
        use_dora=use_dora,
        alpha=2.0,
        target_unet_modules=TARGETS,
        learning_rate=1e-2,
    )
    train(config, folder)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
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
    answers = (folder / "predicted.safetensors", folder / "merged.safetensors")
    return Trained(base, folder / "outputs", unet, *answers)


def test_diffusers_predicts_what_the_trained_model_predicts(
    finished: Trained, given: dict[str, torch.Tensor]
) -> None:
    with torch.no_grad():
        expected = finished.unet(
            given["latents"],
            given["timesteps"],
            given["text"],
            added_cond_kwargs={"text_embeds": given["pooled"], "time_ids": given["time_ids"]},
        ).sample

    found = load_file(finished.predicted)

    assert float((found["before"] - expected).abs().max()) > 1e-3
    torch.testing.assert_close(found["after"], expected, atol=1e-5, rtol=0)


def test_lycoris_merges_the_kohya_file_into_the_trained_weights(finished: Trained) -> None:
    trained = dict(adapters.EffectiveWeights(finished.unet))
    base = load_file(finished.base / "unet" / "diffusion_pytorch_model.safetensors")

    found = load_file(finished.merged)

    assert len(trained) >= len(TARGETS)
    assert found.keys() == trained.keys()
    for path, expected in trained.items():
        change = torch.linalg.vector_norm(expected - base[f"{path}.weight"])
        difference = torch.linalg.vector_norm(found[path] - expected)
        assert change > 1e-3 * torch.linalg.vector_norm(expected)
        assert difference < 1e-4 * change, path


def _pooled_width(config: dict[str, Any]) -> int:
    """Width of the pooled text: what the size conditioning leaves of its layer's input."""
    return config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
