"""Makes a small base model that has really learnt to draw what it is told, in diffusers layout.

SDXL's structure at about 6 million parameters: a VAE of 8 px per latent, two CLIP text encoders and
a UNet, trained on captioned pictures of figures (see world_pictures.py) with its own tokenizer.
Everything is drawn from one seed. It takes less than an hour on two cores. At the end its pictures
are looked at: how many show the colour, the shape and the background that was asked for.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from make_tiny_models import NOISE_SCHEDULE
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.nn.functional import l1_loss, mse_loss
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)
from world_pictures import SCENES, SIDE, Scene, anything, draw, look

# Of the parts that a picture of a prompt must have, how many of them at least.
ASKED = {"colour": 0.95, "shape": 0.90, "background": 0.95}
CHECKED, GUIDANCE, SAMPLING_STEPS = 100, 3.0, 20

LEARNING = ("unet", "text_encoder", "text_encoder_2")
# Pixels of a side of the parts that a VAE learns from, and the share of its steps that they last.
PART, WHOLE_FROM = 32, 0.6

# Of the running mean of weights that is kept in the end.
DECAY = 0.998

# Words that are no word of the world, for new things to be called by.
OTHER_WORDS = "a picture of the figure thing style striped two half photo in with and TOK sks"


@dataclass(frozen=True)
class Plan:
    """How much is trained.

    Args:
        vae_steps: of `vae_batch` parts of pictures.
        vae_copies: pictures of each scene that the VAE learns from, beside as many of anything.
        vae_rate: its highest learning rate.
        steps: of `batch` latents, of UNet and text encoders together.
        copies: pictures of each scene that latents are made of.
        rate: the highest learning rate of UNet and text encoders.
        dropped: share of captions that are left out, for guidance.
    """

    vae_steps: int = 3600
    vae_batch: int = 32
    steps: int = 3000
    batch: int = 48
    copies: int = 40
    vae_copies: int = 10
    vae_rate: float = 3e-3
    rate: float = 1.5e-3
    dropped: float = 0.1


TRIED = Plan(vae_steps=4, vae_batch=4, steps=4, batch=8, copies=1, vae_copies=1)


def make_tokenizer(folder: Path, pad_token: str) -> CLIPTokenizer:
    """A CLIP tokenizer for which each word of the world is one token; others are spelt."""
    words = sorted({word for scene in SCENES for text in scene.captions for word in text.split()})
    corpus = [*words, *OTHER_WORDS.lower().split()]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
    )
    tokenizer.train_from_iterator(corpus * 2, trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in learnt["merges"]]
    made = ["".join(merge.split()) for merge in merges]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    vocabulary += [word for word in made if word not in vocabulary]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    numbered = {word: number for number, word in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(numbered))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{m}\n" for m in merges))
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        model_max_length=77,
        pad_token=pad_token,
    )


def new_vae() -> AutoencoderKL:
    """The VAE, with random weights."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 24, 64, 128),
        layers_per_block=1,
        latent_channels=4,
        # Groups of one channel would take away how light a picture is.
        norm_num_groups=2,
        sample_size=SIDE,
    )


def new_text_encoders(
    tokenizers: Sequence[CLIPTokenizer],
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Both text encoders, with random weights."""
    first, second = tokenizers
    return (
        CLIPTextModel(_text_config(first, width=64, act="quick_gelu")),
        CLIPTextModelWithProjection(_text_config(second, width=96, act="gelu")),
    )


def _text_config(tokenizer: CLIPTokenizer, *, width: int, act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=96,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_unet() -> UNet2DConditionModel:
    """The UNet, with random weights."""
    return UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(64, 64, 96),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64 + 96,
        attention_head_dim=(4, 4, 6),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + 96,
        norm_num_groups=16,
    )


def steps_with(
    learning: torch.nn.Module, averaged: torch.nn.Module, count: int, rate: float
) -> Iterator[Callable[[torch.Tensor], None]]:
    """Gives, for each step, what takes it: a function of the loss.

    The learning rate warms up over a twentieth and ends at nothing along a cosine.

    Args:
        learning: trained.
        averaged: a copy of it, which gets the running mean of its weights.
        count: of steps.
        rate: the highest learning rate.
    """
    parameters, means = list(learning.parameters()), list(averaged.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    warm = max(1, count // 20)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (1 + math.cos(math.pi * step / count)) / 2)
    )
    losses: list[float] = []
    started = time.perf_counter()

    def take(loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(means, parameters, 1 - DECAY)
        losses.append(loss.item())

    for step in range(1, count + 1):
        yield take
        if step % max(1, count // 20) == 0:
            mean = statistics.mean(losses[-100:])
            left = (time.perf_counter() - started) / step * (count - step)
            name = type(learning).__name__
            print(f"{name} {step}/{count}: {mean:.4f}, {left:.0f} s left", flush=True)


@contextmanager
def in_half() -> Iterator[None]:
    """Products in bf16, where a processor has it; else nothing changes."""
    with torch.autocast(
        "cpu", torch.bfloat16, enabled=torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        yield


def train_vae(vae: AutoencoderKL, plan: Plan, generator: torch.Generator) -> None:
    """Teaches a VAE pictures of the world and as many of more than that.

    Parts of pictures come first: they cost less, and most of a picture is of one colour.
    """
    vae.train()
    # Little noise in the latents at first, or nothing is learnt of where things are.
    vae.quant_conv.bias.data[vae.config.latent_channels :] = -8.0
    known = draw([scene for scene in SCENES for _ in range(plan.vae_copies)], generator)
    pool = torch.cat([known, anything(len(known), generator)]) * 2 - 1
    averaged = copy.deepcopy(vae)
    for step, take in enumerate(steps_with(vae, averaged, plan.vae_steps, plan.vae_rate)):
        whole = step >= WHOLE_FROM * plan.vae_steps
        count = plan.vae_batch // (SIDE // PART) ** 2 if whole else plan.vae_batch
        pictures = pool[torch.randint(len(pool), (count,), generator=generator)]
        if not whole:
            pictures = parts_of(pictures, generator)
        with in_half():
            latents = vae.encode(pictures).latent_dist
            noise = torch.randn(latents.mean.shape, generator=generator)
            decoded = vae.decode(latents.mean + latents.std * noise).sample.float()
        weight = 1e-6 * latents.kl().mean()
        take(l1_loss(decoded, pictures) + mse_loss(decoded, pictures) + weight)
    vae.load_state_dict(averaged.state_dict())
    vae.eval().requires_grad_(False)


def parts_of(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Of each picture a square of `PART` pixels, anywhere."""
    corners = torch.randint(SIDE - PART + 1, (len(pictures), 2), generator=generator).tolist()
    return torch.stack(
        [
            picture[:, top : top + PART, left : left + PART]
            for picture, (top, left) in zip(pictures, corners, strict=True)
        ]
    )


@torch.no_grad()
def encoded(
    vae: AutoencoderKL, plan: Plan, generator: torch.Generator
) -> tuple[list[Scene], torch.Tensor]:
    """Scenes, each as often as there are pictures of it, and their latents of variance 1."""
    scenes = [scene for scene in SCENES for _ in range(plan.copies)]
    latents = []
    for start in range(0, len(scenes), 200):
        pictures = draw(scenes[start : start + 200], generator) * 2 - 1
        latents.append(vae.encode(pictures).latent_dist.mean)
    found = torch.cat(latents)
    vae.register_to_config(scaling_factor=round(1 / found.std().item(), 5))
    return scenes, found * vae.config.scaling_factor


@torch.no_grad()
def fidelity(vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    """How alike pictures are that the VAE gives back, in dB of the ratio of peak to noise."""
    back = vae(pictures * 2 - 1).sample / 2 + 0.5
    return -10 * math.log10(mse_loss(back.clamp(0, 1), pictures).item())


def train_denoiser(
    parts: Mapping[str, Any],
    scenes: Sequence[Scene],
    latents: torch.Tensor,
    plan: Plan,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Teaches UNet and text encoders together what captions mean.

    Returns:
        The same parts with their weights averaged over the last steps.
    """
    learning = torch.nn.ModuleDict({name: parts[name] for name in LEARNING})
    averaged = copy.deepcopy(learning)
    noises = EulerDiscreteScheduler(**NOISE_SCHEDULE)
    kept = noises.alphas_cumprod
    tokens = _tokens(parts, [caption for scene in SCENES for caption in scene.captions])
    ways, of_scene = len(SCENES[0].captions), {scene: n for n, scene in enumerate(SCENES)}
    numbers = torch.tensor([of_scene[scene] for scene in scenes])
    for take in steps_with(learning, averaged, plan.steps, plan.rate):
        chosen = torch.randint(len(latents), (plan.batch,), generator=generator)
        way = torch.randint(ways, (plan.batch,), generator=generator)
        captions = [ids[numbers[chosen] * ways + way] for ids in tokens]
        told = torch.rand(plan.batch, generator=generator) >= plan.dropped
        timesteps = torch.randint(1000, (plan.batch,), generator=generator)
        noise = torch.randn(latents[chosen].shape, generator=generator)
        signal = kept[timesteps].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * latents[chosen] + (1 - signal).sqrt() * noise
        states, pooled = _told(learning, captions, told)
        times = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * plan.batch)
        added = {"text_embeds": pooled, "time_ids": times}
        predicted = learning["unet"](
            noisy, timesteps, states, added_cond_kwargs=added, return_dict=False
        )[0]
        take(mse_loss(predicted, noise))
    return dict(averaged.items())


def _tokens(parts: Mapping[str, Any], captions: Sequence[str]) -> list[torch.Tensor]:
    """Of both tokenizers, (captions, 77)."""
    return [
        parts[name](
            list(captions), padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        for name in ("tokenizer", "tokenizer_2")
    ]


def _told(
    parts: Mapping[str, Any], tokens: Sequence[torch.Tensor], told: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """States and summary of captions as SDXL's pipeline makes them; zeros where nothing is told."""
    first = parts["text_encoder"](tokens[0], output_hidden_states=True)
    second = parts["text_encoder_2"](tokens[1], output_hidden_states=True)
    states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    return states * told[:, None, None], second.text_embeds * told[:, None]


def pipeline_of(parts: Mapping[str, Any]) -> StableDiffusionXLPipeline:
    """All parts together, as diffusers has them."""
    return StableDiffusionXLPipeline(
        **parts,
        scheduler=EulerDiscreteScheduler(**NOISE_SCHEDULE),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def sampled(
    pipeline: StableDiffusionXLPipeline, prompts: Sequence[str], *, seed: int
) -> torch.Tensor:
    """Pictures (prompts, 3, 64, 64) from 0 to 1."""
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        list(prompts),
        height=SIDE,
        width=SIDE,
        guidance_scale=GUIDANCE,
        num_inference_steps=SAMPLING_STEPS,
        generator=[torch.Generator().manual_seed(seed + n) for n in range(len(prompts))],
        output_type="pt",
    )
    pictures: torch.Tensor = made.images.float()
    return pictures


def check(
    pipeline: StableDiffusionXLPipeline, scenes: Sequence[Scene], *, seed: int
) -> tuple[dict[str, float], torch.Tensor]:
    """Of each thing that was asked for, the share of pictures that show it; and the pictures."""
    pictures = sampled(pipeline, [scene.caption for scene in scenes], seed=seed)
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


def make_world(folder: Path, plan: Plan, *, seed: int) -> StableDiffusionXLPipeline:
    """Trains all parts and writes them in fp16."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, Any] = {
        "tokenizer": make_tokenizer(folder / "tokenizer", "<|endoftext|>"),
        "tokenizer_2": make_tokenizer(folder / "tokenizer_2", "!"),
    }
    encoders = new_text_encoders(list(parts.values()))
    parts |= {"text_encoder": encoders[0], "text_encoder_2": encoders[1]}
    parts |= {"vae": new_vae(), "unet": new_unet()}
    for name in ("vae", "unet", "text_encoder", "text_encoder_2"):
        print(f"{name}: {sum(p.numel() for p in parts[name].parameters()):,} parameters")
    train_vae(parts["vae"], plan, generator)
    print(
        f"VAE: {fidelity(parts['vae'], draw(SCENES[::7], generator)):.1f} dB of the world, "
        f"{fidelity(parts['vae'], anything(60, generator)):.1f} dB of anything"
    )
    scenes, latents = encoded(parts["vae"], plan, generator)
    parts |= train_denoiser(parts, scenes, latents, plan, generator)
    pipeline = pipeline_of(parts)
    pipeline.to(torch.float16).save_pretrained(folder)
    return pipeline.to(torch.float32)


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--seed", default=0, help="Of everything that is drawn.")
@click.option("--pictures", type=click.Path(path_type=Path), help="PNG of what was looked at.")
@click.option("--small", is_flag=True, help="A few steps, to try the script itself.")
def main(folder: Path, seed: int, pictures: Path | None, *, small: bool) -> None:
    """Makes the model, looks at what it draws and says how much is as asked."""
    plan = TRIED if small else Plan()
    started = time.perf_counter()
    pipeline = make_world(folder, plan, seed=seed)
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
