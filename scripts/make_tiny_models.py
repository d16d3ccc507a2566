#!/usr/bin/env python3
"""Makes tiny models with random weights and the true structure of their families.

Base models, and models that look at pictures: CLIPSeg, and a LLaVA that says the same of each.
Layer names, block layout, conditioning and file layout are those of the real checkpoints; only
widths are small, so that a training runs in seconds on a processor. Nothing is downloaded.

Usage: make_tiny_models.py sd15|sdxl|flux|flux2|clipseg|llava FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import logging

NOISE_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}

# What a LLaVA says of every picture: from then on all that is written can be checked. No word may
# stand in it twice.
SENTENCE = "one white cup of coffee stands on the brown table."

# The prompt of llava-hf/llava-1.5-7b-hf, cut down to one user and one picture.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# The prompt of Qwen3 with `enable_thinking=False`, cut down to what pipelines ask of it.
QWEN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' "
    "+ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
SPECIAL_WORDS = ("<pad>", "<s>", "</s>", "<unk>")
ENGLISH = (
    *("a", "the", "of", "in", "on", "with", "man", "woman", "cat", "cup", "red", "green"),
    *("blue", "photo", "table", "smiles", "sits", ",", "."),
)

# Of pictures as models that look at them see them.
VISION_SIDE = 64
# What weights in 4 bits are cut to blocks of.
VISION_WIDTH = 64


def make_tokenizer(folder: Path, pad_token: str) -> CLIPTokenizer:
    """A byte-level CLIP tokenizer without merges: every character is a token of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = _byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    if pad_token not in vocabulary:
        raise ValueError(f"pad token {pad_token!r} is not in the vocabulary")
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        model_max_length=77,
        pad_token=pad_token,
    )


def make_sd15(folder: Path, *, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """A tiny Stable Diffusion 1.5 in diffusers layout: 64 px, 8 px per latent."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(folder / "tokenizer", "<|endoftext|>")
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=2,
        down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    pipeline = StableDiffusionPipeline(
        vae=_make_vae(scaling_factor=0.18215),
        text_encoder=CLIPTextModel(_text_config(tokenizer, hidden_size=32)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(
            **NOISE_SCHEDULE, skip_prk_steps=True, prediction_type=prediction_type
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def make_sdxl(folder: Path, *, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """A tiny SDXL in diffusers layout: two text encoders, time ids, 64 px, 8 px per latent."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(folder / "tokenizer", "<|endoftext|>")
    tokenizer_2 = make_tokenizer(folder / "tokenizer_2", "!")
    projection = 32
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32 + 48,
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + projection,
        norm_num_groups=8,
    )
    second = _text_config(tokenizer_2, hidden_size=48, projection_dim=projection, act="gelu")
    pipeline = StableDiffusionXLPipeline(
        vae=_make_vae(scaling_factor=0.13025),
        text_encoder=CLIPTextModel(_text_config(tokenizer, hidden_size=32)),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**NOISE_SCHEDULE, prediction_type=prediction_type),
        force_zeros_for_empty_prompt=True,
    )
    pipeline.save_pretrained(folder)
    return folder


def make_flux(folder: Path, *, guidance_embeds: bool = True, seed: int = 0) -> Path:
    """A tiny FLUX.1 in diffusers layout: CLIP and T5, 64 px, 8 px per latent, 16 per token.

    Args:
        guidance_embeds: as in FLUX.1 [dev]; false as in [schnell], whose noise is not shifted.
    """
    torch.manual_seed(seed)
    clip, t5 = make_tokenizer(folder / "tokenizer", "<|endoftext|>"), _t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    text_config = T5Config(
        vocab_size=len(t5),
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        # T5 takes its last words for padding: what pads is what the tokenizer pads with.
        pad_token_id=t5.pad_token_id,
    )
    pipeline = FluxPipeline(
        vae=_make_vae(scaling_factor=0.3611, shift_factor=0.1159, latent_channels=16),
        text_encoder=CLIPTextModel(_text_config(clip, hidden_size=24)),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(text_config),
        tokenizer_2=t5,
        transformer=transformer,
        scheduler=flow_scheduler(use_dynamic_shifting=guidance_embeds),
    )
    pipeline.save_pretrained(folder)
    return folder


def make_flux2(folder: Path, *, seed: int = 0) -> Path:
    """A tiny FLUX.2 [klein] base in diffusers layout: Qwen3, 64 px, 8 px per latent, 16 per token.

    The pipeline takes the text after 9, 18 and 27 layers, so that many have to be there.
    """
    torch.manual_seed(seed)
    tokenizer = _chat_tokenizer()
    width = 16
    text_config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformer = Flux2Transformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * width,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        sample_size=64,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
    )
    # The statistics of what a trained VAE says of pictures: no channel has mean 0 and variance 1.
    vae.bn.running_mean.normal_(std=0.1)
    vae.bn.running_var.uniform_(0.5, 2.0)
    pipeline = Flux2KleinPipeline(
        vae=vae,
        text_encoder=Qwen3ForCausalLM(text_config),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=flow_scheduler(use_dynamic_shifting=True),
    )
    pipeline.save_pretrained(folder)
    return folder


def make_clipseg(folder: Path, *, seed: int = 0) -> Path:
    """A CLIPSeg whose map of a picture is 352 x 352 like the real one's."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(folder, "<|endoftext|>")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    text: dict[str, Any] = {
        **shape,
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPSegConfig(
        text_config=text,
        vision_config={**shape, "num_hidden_layers": 4, "image_size": 32, "patch_size": 16},
        projection_dim=16,
        reduce_dim=8,
        extract_layers=[0, 1, 2],
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    pictures = ViTImageProcessorPil(
        size={"height": 352, "width": 352},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    return save(folder, CLIPSegForImageSegmentation(config), CLIPSegProcessor(pictures, tokenizer))


def make_llava(folder: Path, *, says: str | None = SENTENCE, template: bool = True) -> Path:
    """A LLaVA 1.5 that says the same of every picture.

    Args:
        says: the sentence; None: random words.
        template: bring a prompt, as its first checkpoints did not.
    """
    torch.manual_seed(0)
    tokenizer = make_words(":", says, extra=("<image>",))
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=VISION_SIDE,
        patch_size=16,
    )
    side = {"height": VISION_SIDE, "width": VISION_SIDE}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": VISION_SIDE}, crop_size=side),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE if template else None,
    )
    return save(folder, llava_model(tokenizer, vision, "<image>", ":", says, "default"), processor)


def save(folder: Path, model: PreTrainedModel, processor: Any) -> Path:
    """Saves quietly; a bar of progress for a hundred kilobytes tells nothing."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if shown:
        logging.enable_progress_bar()
    return folder


def make_words(
    start: str,
    says: str | None,
    *,
    extra: tuple[str, ...],
    named: dict[str, str] | None = None,
) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, with those of the sentence and the one before it."""
    said = says.replace(".", " .").replace(",", " ,").split() if says else []
    vocabulary = list(dict.fromkeys([*SPECIAL_WORDS, *extra, start, *ENGLISH, *said]))
    tokenizer = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary.index("<s>"))]
    )
    marks = [word for word in extra if word.startswith("<")]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=named or marks,
    )


def width_for(tokenizer: PreTrainedTokenizerFast) -> int:
    """A width in which every word can have a direction of its own."""
    return -(-len(tokenizer) // VISION_WIDTH) * VISION_WIDTH


def llava_model(
    tokenizer: PreTrainedTokenizerFast,
    vision: Any,
    image: str,
    start: str,
    says: str | None,
    strategy: Any,
) -> LlavaForConditionalGeneration:
    """A LLaVA with these eyes, that says the sentence after the word `start`."""
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width_for(tokenizer),
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(image),
        vision_feature_select_strategy=strategy,
    )
    model = LlavaForConditionalGeneration(config)
    teach(model, model.model.language_model, tokenizer, start, says)
    return model


@torch.no_grad()
def teach(
    model: PreTrainedModel,
    language: Any,
    tokenizer: PreTrainedTokenizerFast,
    start: str,
    says: str | None,
) -> None:
    """Gives weights that follow `start` by the sentence: each word's direction calls the next."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    if says is None:
        return
    said = tokenizer(says, add_special_tokens=False).input_ids
    assert len(set(said)) == len(said), "a word stands twice in the sentence"
    for layer in language.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    language.embed_tokens.weight.copy_(torch.eye(*language.embed_tokens.weight.shape))
    model.lm_head.weight.zero_()
    chain = [tokenizer.convert_tokens_to_ids(start), *said, tokenizer.eos_token_id]
    for word, following in zip(chain, chain[1:], strict=False):
        model.lm_head.weight[following, word] = 10.0


def flow_scheduler(*, use_dynamic_shifting: bool) -> FlowMatchEulerDiscreteScheduler:
    """FLUX's own, with its shift by the number of tokens or with none."""
    return FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        base_shift=0.5,
        max_image_seq_len=4096,
        max_shift=1.15,
        shift=3.0 if use_dynamic_shifting else 1.0,
        use_dynamic_shifting=use_dynamic_shifting,
    )


def _t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer whose pieces are single characters."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)]
    return T5TokenizerFast(
        vocab=[*pieces, *((letter, -2.0) for letter in letters)],
        extra_ids=0,
        model_max_length=512,
    )


def _chat_tokenizer() -> Qwen2TokenizerFast:
    """A byte-level Qwen tokenizer without merges, with the chat marks of Qwen3."""
    vocabulary = {letter: number for number, letter in enumerate(_byte_letters())}
    tokenizer = Qwen2TokenizerFast(
        vocab=vocabulary,
        merges=[],
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=131072,
        extra_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


def _make_vae(
    *, scaling_factor: float, shift_factor: float | None = None, latent_channels: int = 4
) -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
    )


def _text_config(
    tokenizer: CLIPTokenizer,
    *,
    hidden_size: int,
    projection_dim: int = 32,
    act: str = "quick_gelu",
) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 2,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=projection_dim,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _byte_letters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in its order (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]


MAKERS = {
    "sd15": make_sd15,
    "sdxl": make_sdxl,
    "flux": make_flux,
    "flux2": make_flux2,
    "clipseg": make_clipseg,
    "llava": make_llava,
}


def main() -> None:
    """Makes the model named on the command line."""
    if len(sys.argv) != 3 or sys.argv[1] not in MAKERS:
        sys.exit(__doc__)
    folder = MAKERS[sys.argv[1]](Path(sys.argv[2]))
    print(folder)


if __name__ == "__main__":
    main()
