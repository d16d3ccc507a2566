"""Tiny models that look at pictures: real classes, real processors, weights of no meaning.

Each is saved as the folder that transformers would download, in well under a second. Those with
`says` answer every picture by that sentence, whatever they are asked, so that what is written
from then on can be checked; no word may stand in it twice.
"""

from __future__ import annotations

from pathlib import Path

import torch
from make_tiny_models import (
    ENGLISH,
    SENTENCE,
    VISION_SIDE,
    VISION_WIDTH,
    llava_model,
    make_words,
    save,
    teach,
    width_for,
)
from make_tiny_models import make_clipseg as tiny_clipseg
from make_tiny_models import make_llava as tiny_llava
from transformers import (
    BartConfig,
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    CLIPConfig,
    CLIPModel,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    LlavaProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

__all__ = [
    "SENTENCE",
    "tiny_blip",
    "tiny_clip",
    "tiny_clipseg",
    "tiny_florence2",
    "tiny_joycaption",
    "tiny_llava",
    "tiny_qwen3_vl",
]

# The prompts of JoyCaption, which puts the picture in itself, and of Qwen-VL, cut down to one user
# and one picture.
_JOYCAPTION_TEMPLATE = (
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{% if message['role'] == 'user' %}<|reserved_special_token_70|>"
    "<|reserved_special_token_69|><|reserved_special_token_71|>{% endif %}"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_joycaption(folder: Path, *, says: str | None = SENTENCE) -> Path:
    """A LLaVA as JoyCaption is one: SigLIP's eyes, a Llama 3 prompt, a reserved token for them."""
    torch.manual_seed(0)
    image = "<|reserved_special_token_69|>"
    header = "<|end_header_id|>"
    more = ("<|start_header_id|>", header, "<|eot_id|>", image)
    more += ("<|reserved_special_token_70|>", "<|reserved_special_token_71|>")
    tokenizer = make_words(header, says, extra=more)
    vision = SiglipVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=VISION_SIDE,
        patch_size=16,
    )
    processor = LlavaProcessor(
        SiglipImageProcessorPil(size={"height": VISION_SIDE, "width": VISION_SIDE}),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="full",
        image_token=image,
        chat_template=_JOYCAPTION_TEMPLATE,
    )
    return save(folder, llava_model(tokenizer, vision, image, header, says, "full"), processor)


def tiny_qwen3_vl(folder: Path, *, says: str | None = SENTENCE) -> Path:
    """A Qwen3-VL; its own processor needs torchvision, so the parts of it are saved."""
    torch.manual_seed(0)
    marks = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer = make_words("assistant", says, extra=(*marks, "<|image_pad|>", "<|video_pad|>"))
    tokenizer.chat_template = _QWEN_TEMPLATE
    width = width_for(tokenizer)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
    }
    vision = {
        "depth": 2,
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 64,
        "num_heads": 4,
        "out_hidden_size": width,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    ids = dict(zip(_QWEN_IDS, tokenizer.convert_tokens_to_ids(list(_QWEN_TOKENS)), strict=True))
    model = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
    )
    teach(model, model.model.language_model, tokenizer, "assistant", says)
    pictures = Qwen2VLImageProcessorPil(
        patch_size=16, size={"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    )
    pictures.save_pretrained(folder)
    return save(folder, model, tokenizer)


def tiny_blip(folder: Path, *, seed: int = 1) -> Path:
    """A BLIP, which writes lower case and takes no instruction."""
    torch.manual_seed(seed)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *ENGLISH]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    shape = {"hidden_size": VISION_WIDTH, "intermediate_size": 64, "num_attention_heads": 4}
    text = {
        **shape,
        # The token that begins an answer lies behind the tokenizer's own words.
        "vocab_size": len(words) + 1,
        "num_hidden_layers": 2,
        "encoder_hidden_size": VISION_WIDTH,
        "max_position_embeddings": 128,
        "bos_token_id": len(words),
        "eos_token_id": words.index("[SEP]"),
        "sep_token_id": words.index("[SEP]"),
        "pad_token_id": words.index("[PAD]"),
    }
    vision = {**shape, "num_hidden_layers": 2, "image_size": VISION_SIDE, "initializer_range": 0.02}
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
    pictures = BlipImageProcessorPil(size={"height": VISION_SIDE, "width": VISION_SIDE})
    return save(folder, model, BlipProcessor(pictures, tokenizer))


def tiny_clip(folder: Path, *, seed: int = 0) -> Path:
    """A CLIP whose embeddings have 16 numbers."""
    torch.manual_seed(seed)
    shape = {"hidden_size": VISION_WIDTH, "intermediate_size": 64, "num_hidden_layers": 2}
    shape["num_attention_heads"] = 4
    vision = {**shape, "image_size": VISION_SIDE, "patch_size": 16}
    text = {**shape, "vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    side = {"height": VISION_SIDE, "width": VISION_SIDE}
    pictures = CLIPImageProcessorPil(size={"shortest_edge": VISION_SIDE}, crop_size=side)
    return save(folder, CLIPModel(config), pictures)


def tiny_florence2(folder: Path, *, seed: int = 0) -> Path:
    """A Florence-2, which takes tasks instead of instructions."""
    torch.manual_seed(seed)
    tokenizer = make_words(":", None, extra=("<image>",), named={"image_token": "<image>"})
    text = BartConfig(
        vocab_size=len(tokenizer),
        d_model=VISION_WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
    )
    vision = {
        "depths": [1, 1],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [16, VISION_WIDTH],
        "num_heads": [2, 4],
        "num_groups": [2, 4],
        "window_size": 4,
        "projection_dim": VISION_WIDTH,
        "max_temporal_embeddings": 4,
    }
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=image)
    # One token of the whole picture, and one of each place of the 8 x 8 that the eyes leave of it.
    pictures = CLIPImageProcessorPil(
        size={"height": VISION_SIDE, "width": VISION_SIDE},
        do_center_crop=False,
        image_seq_length=65,
    )
    model = Florence2ForConditionalGeneration(config)
    # As the published one answers: begun by the first token, and no three words twice.
    model.generation_config.update(forced_bos_token_id=1, no_repeat_ngram_size=3)
    return save(folder, model, Florence2Processor(pictures, tokenizer))


_QWEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_QWEN_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
