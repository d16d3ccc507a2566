"""The pictures and models that rows ask for by name, made when they are first asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import make_tiny_models
import numpy as np
import single_file
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from options import onlookers
from PIL import Image
from safetensors.torch import load_file
from skimage import data as photographs
from tiny_vision import tiny_llava

SIDE = 64
# Their longer sides let a window of the trained size move along one axis each.
SHAPES = {"landscape": (SIDE, 2 * SIDE), "portrait": (2 * SIDE, SIDE)}
BLUE = {"landscape": 100, "portrait": 200}
LIT = 16  # columns and rows that a given mask keeps, from the left and from the top
# Left and top of a drawn head, and its side; below it is a body as large.
HEADS = {"landscape": (24, 8), "portrait": (16, 64)}
HEAD = 24

# What is another one in each family: ends of the names of layers that rows adapt.
OWN: Mapping[str, Mapping[str, Any]] = {
    "layers": {
        "sd15": ["to_v", "conv1"],
        "sdxl": ["to_v", "conv1"],
        "flux": ["to_v", "proj_out"],
        "flux2": ["to_v", "attn.to_out"],
    },
    "other layers": {
        "sd15": ["to_q", "conv2"],
        "sdxl": ["to_q", "conv2"],
        "flux": ["to_q", "to_out.0"],
        "flux2": ["to_q", "to_qkv_mlp_proj"],
    },
}
# The denoiser among a pipeline's components.
DENOISERS = {"sd15": "unet", "sdxl": "unet", "flux": "transformer", "flux2": "transformer"}

SINGLE_FILES = {"sd15": single_file.write_sd15, "sdxl": single_file.write_sdxl}


def grid(name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Red is the column, green the row, blue the picture."""
    height, width = SHAPES[name]
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.arange(width)
    pixels[..., 1] = np.arange(height)[:, None]
    pixels[..., 2] = BLUE[name]
    return pixels


class World:
    """A family's places.

    Args:
        root: a folder of its own.
        family: its name.
        original: its tiny base model with all layers of the real one.
    """

    def __init__(self, root: Path, family: str, original: Path) -> None:
        self.root = root
        self.family = family
        self.original = original
        self._made: dict[str, Path | str] = {}

    @property
    def model(self) -> Path:
        """The base model that rows train unless they say otherwise."""
        return Path(self.path("model"))

    @property
    def denoiser(self) -> str:
        """The denoiser's name among the components of the pipeline."""
        return DENOISERS[self.family]

    def weights(self) -> dict[str, torch.Tensor]:
        """Those of the denoiser of the base model."""
        return load_file(self.model / self.denoiser / "diffusion_pytorch_model.safetensors")

    def path(self, name: str) -> Path | str:
        """A place by its name."""
        if name not in self._made:
            self._made[name] = _MAKERS[name](self, self.root / name)
        return self._made[name]

    def hub(self) -> Path:
        """The cache folder of a hub with two revisions of the base model."""
        return self.root / "hub cache"


def _pictures(world: World, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in SHAPES:
        Image.fromarray(grid(name)).save(folder / f"{name}.png")
    return folder


def _photographs(
    pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], count: int
) -> Callable[[World, Path], Path]:
    """Crops of a real photograph at the trained size."""

    def make(world: World, folder: Path) -> Path:
        folder.mkdir(parents=True)
        for number in range(count):
            corner = 60 * number
            crop = Image.fromarray(pixels[corner : corner + 200, corner : corner + 200])
            crop.resize((SIDE, SIDE)).save(folder / f"photo_{number}.png")
        return folder

    return make


def _masked(world: World, folder: Path) -> Path:
    _pictures(world, folder)
    (folder / "masks").mkdir()
    for name, (height, width) in SHAPES.items():
        mask = np.zeros((height, width), np.uint8)
        middle = (height - SIDE) // 2, (width - SIDE) // 2
        mask[: middle[0] + LIT, : middle[1] + LIT] = 255
        Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
    return folder


def person(name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """A grid picture with somebody in it: a red square above a blue one."""
    pixels, (left, top) = grid(name), HEADS[name]
    pixels[top : top + HEAD, left : left + HEAD] = (255, 0, 0)
    pixels[top + HEAD : top + 2 * HEAD, left : left + HEAD] = (0, 0, 255)
    return pixels


def _people(world: World, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in SHAPES:
        Image.fromarray(person(name)).save(folder / f"{name}.png")
    return folder


def _captions(world: World, path: Path) -> Path:
    rows = [
        {"file_name": f"{name}.png", "text": f"{name} TOK", "long": f"TOK, {name}, at length"}
        for name in reversed(SHAPES)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def _captioned(world: World, folder: Path) -> Path:
    _pictures(world, folder)
    _captions(world, folder / "metadata.jsonl")
    return folder


def _nameless(world: World, path: Path) -> Path:
    rows = [{"file_name": f"{name}.png", "text": f"a {name}"} for name in SHAPES]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def _small(folder: Path, seed: int = 0) -> Path:
    """Gives a tiny base model a denoiser of fewer layers still, one of each kind."""
    if not (folder / "unet").is_dir():
        return _small_transformer(folder, seed)
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text())
    with_text = config["down_block_types"][1]
    first = config["down_block_types"][0] == "DownBlock2D"
    down = ("DownBlock2D", with_text) if first else (with_text, "DownBlock2D")
    config |= {
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": down,
        "up_block_types": tuple(name.replace("Down", "Up") for name in reversed(down)),
        "attention_head_dim": 2,
        "transformer_layers_per_block": 1,
    }
    torch.manual_seed(seed)
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    return folder


def _small_transformer(folder: Path, seed: int) -> Path:
    place = folder / "transformer"
    config = json.loads((place / "config.json").read_text())
    transformer_class = getattr(diffusers, config["_class_name"])
    torch.manual_seed(seed)
    config |= {"num_layers": 1, "num_single_layers": 2}
    transformer_class.from_config(config).save_pretrained(place)
    return folder


def _model(world: World, folder: Path) -> Path:
    return _small(Path(shutil.copytree(world.original, folder)))


def _other_model(world: World, folder: Path) -> Path:
    return _small(make_tiny_models.MAKERS[world.family](folder, seed=1), seed=1)


def _velocity_model(world: World, folder: Path) -> Path:
    make: Callable[..., Path] = make_tiny_models.MAKERS[world.family]
    return _small(make(folder, prediction_type="v_prediction"))


def _vae(world: World, folder: Path) -> Path:
    return Path(world.path("other model")) / "vae"


def _legacy_model(world: World, folder: Path) -> Path:
    """A checkpoint from before transformers 4.31: it gives a wrong id for the end of a text."""
    shutil.copytree(world.model, folder)
    for path in folder.glob("text_encoder*/config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 2}))
    return folder


def _two_variants(world: World, folder: Path) -> Path:
    """The base model, and the weights of the other one under the names of a variant."""
    shutil.copytree(world.model, folder)
    other = Path(world.path("other model"))
    for path in other.rglob("*.safetensors"):
        target = folder / path.relative_to(other)
        shutil.copy(path, target.with_suffix(".fp16.safetensors"))
    return folder


def _single_file(world: World, path: Path) -> Path:
    path = path.with_suffix(".safetensors")
    return SINGLE_FILES[world.family](DiffusionPipeline.from_pretrained(world.original), path)


def _doubled_latents(world: World, folder: Path) -> Path:
    """The base model's folder with a VAE configuration of twice the scale."""
    shutil.copytree(world.original, folder)
    path = folder / "vae" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"scaling_factor": 2 * config["scaling_factor"]}))
    return folder


def _hub_model(world: World, _: Path) -> str:
    repository = world.hub() / f"models--owner--{world.family}"
    (repository / "refs").mkdir(parents=True)
    sources = {"main": world.model, "other": Path(world.path("other model"))}
    for commit, (revision, source) in zip("ab", sources.items(), strict=True):
        shutil.copytree(source, repository / "snapshots" / (commit * 40))
        (repository / "refs" / revision).write_text(commit * 40)
    return f"owner/{world.family}"


_MAKERS: Mapping[str, Callable[[World, Path], Path | str]] = {
    "model": _model,
    "original model": lambda world, _: world.original,
    "pictures": _pictures,
    "astronaut": _photographs(photographs.astronaut(), 2),
    "class pictures": _photographs(photographs.cat(), 3),
    "other class pictures": _photographs(photographs.coffee(), 3),
    "masked pictures": _masked,
    "captions.jsonl": _captions,
    "captioned pictures": _captioned,
    "nameless.jsonl": _nameless,
    "people": _people,
    "squares": lambda world, _: onlookers.SQUARES,
    "clipseg": lambda world, folder: onlookers.clipseg(folder, seed=0),
    "other clipseg": lambda world, folder: onlookers.clipseg(folder, seed=1),
    "captioner": lambda world, folder: tiny_llava(folder, says=onlookers.SAYS),
    "other captioner": lambda world, folder: tiny_llava(folder, says=onlookers.ALSO_SAYS),
    "captioner of two minds": lambda world, folder: onlookers.captioner_of_two_minds(folder),
    "restorer": lambda world, path: onlookers.restorer(path),
    "other restorer": lambda world, path: onlookers.restorer(path),
    "other model": _other_model,
    "velocity model": _velocity_model,
    "vae": _vae,
    "legacy model": _legacy_model,
    "two variants": _two_variants,
    "single file": _single_file,
    "doubled latents": _doubled_latents,
    "hub model": _hub_model,
}
