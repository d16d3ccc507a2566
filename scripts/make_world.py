"""Makes a small base model that has really learnt to draw what it is told, in diffusers layout.

SDXL's structure at about 6 million parameters, or FLUX.1's: a VAE of 8 px per latent, text encoders
and a denoiser, trained on captioned pictures of figures (see world_pictures.py) with tokenizers of
its own. Everything is drawn from one seed. It takes less than an hour on two cores. At the end its
pictures are looked at: how many show the colour, the shape and the background that was asked for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
import world_flux
import world_sdxl
from diffusers import DiffusionPipeline
from PIL import Image
from world_pictures import SCENES, SIDE, Scene, anything, draw, look
from world_training import TRIED, Plan, Structure, encoded, fidelity, train_vae

STRUCTURES: Mapping[str, Structure] = {
    "sdxl": world_sdxl.STRUCTURE,
    "flux": world_flux.STRUCTURE,
}

# Of the parts that a picture of a prompt must have, how many of them at least.
ASKED = {"colour": 0.95, "shape": 0.90, "background": 0.95}
CHECKED, GUIDANCE, SAMPLING_STEPS = 100, 2.0, 20


def sampled(
    pipeline: DiffusionPipeline, prompts: Sequence[str], *, seed: int, **options: Any
) -> torch.Tensor:
    """Pictures (prompts, 3, 64, 64) from 0 to 1.

    Args:
        options: of the pipeline's call, beside those of every picture.
    """
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        list(prompts),
        height=SIDE,
        width=SIDE,
        guidance_scale=GUIDANCE,
        num_inference_steps=SAMPLING_STEPS,
        generator=[torch.Generator().manual_seed(seed + n) for n in range(len(prompts))],
        output_type="pt",
        **options,
    )
    pictures: torch.Tensor = made.images.float()
    return pictures


def check(
    pipeline: DiffusionPipeline, scenes: Sequence[Scene], *, seed: int, **options: Any
) -> tuple[dict[str, float], torch.Tensor]:
    """Of each thing that was asked for, the share of pictures that show it; and the pictures.

    Args:
        options: as for `sampled`.
    """
    pictures = sampled(pipeline, [scene.caption for scene in scenes], seed=seed, **options)
    answers = [look(picture).agrees(scene) for picture, scene in zip(pictures, scenes, strict=True)]
    return {name: sum(a[name] for a in answers) / len(answers) for name in answers[0]}, pictures


def sheet(pictures: torch.Tensor, columns: int = 10, enlarged: int = 2) -> Image.Image:
    """Pictures side by side."""
    rows = -(-len(pictures) // columns)
    filled = torch.ones(rows * columns, 3, SIDE, SIDE)
    filled[: len(pictures)] = pictures
    tiles = filled.view(rows, columns, 3, SIDE, SIDE).permute(0, 3, 1, 4, 2)
    whole = (tiles.reshape(rows * SIDE, columns * SIDE, 3) * 255).round().byte()
    image = Image.fromarray(whole.numpy())
    return image.resize((image.width * enlarged, image.height * enlarged), Image.Resampling.NEAREST)


def make_world(folder: Path, structure: Structure, plan: Plan, *, seed: int) -> DiffusionPipeline:
    """Trains all parts and writes them in fp16."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    parts = structure.new_parts(folder)
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            print(f"{name}: {sum(p.numel() for p in part.parameters()):,} parameters")
    train_vae(parts["vae"], plan, generator)
    print(
        f"VAE: {fidelity(parts['vae'], draw(SCENES[::7], generator)):.1f} dB of the world, "
        f"{fidelity(parts['vae'], anything(60, generator)):.1f} dB of anything"
    )
    scenes, latents = encoded(parts["vae"], plan, generator)
    parts |= structure.train_denoiser(parts, scenes, latents, plan, generator)
    pipeline = structure.pipeline_of(parts)
    pipeline.to(torch.float16).save_pretrained(folder)
    return pipeline.to(torch.float32)


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--family", default="sdxl", type=click.Choice(tuple(STRUCTURES)), help="Structure.")
@click.option("--seed", default=0, help="Of everything that is drawn.")
@click.option("--pictures", type=click.Path(path_type=Path), help="PNG of what was looked at.")
@click.option("--small", is_flag=True, help="A few steps, to try the script itself.")
def main(folder: Path, family: str, seed: int, pictures: Path | None, *, small: bool) -> None:
    """Makes the model, looks at what it draws and says how much is as asked."""
    plan = TRIED if small else Plan()
    started = time.perf_counter()
    pipeline = make_world(folder, STRUCTURES[family], plan, seed=seed)
    print(f"made in {(time.perf_counter() - started) / 60:.0f} minutes")
    scenes = SCENES[:: len(SCENES) // (4 if small else CHECKED)]
    shares, drawn = check(pipeline, scenes, seed=seed)
    for name, share in shares.items():
        print(
            f"{name}: {share:.1%} as asked"
            + (f", at least {ASKED[name]:.0%}" if name in ASKED else "")
        )
    if pictures:
        sheet(drawn).save(pictures)
    if not small and any(shares[name] < least for name, least in ASKED.items()):
        raise click.ClickException("the model does not draw what it is told")


if __name__ == "__main__":
    main()
