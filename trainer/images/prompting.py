"""How captioners of each architecture are asked: their prompts, and what they are given to see.

Which captioner is taken, and what it answers, is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from jinja2 import TemplateError
from PIL import Image

from trainer.images import pretrained
from trainer.images.pretrained import Pretrained, Unusable

_LONGEST_SIDE = 1024
# JoyCaption was trained behind these words.
_SYSTEM = "You are a helpful image captioner."


@dataclass(frozen=True)
class Kind:
    """How models of one architecture are asked.

    Args:
        model_class: gives its class in transformers.
        processor_class: gives the class that puts picture and prompt together.
        prompt: what is asked, of the processor and the instruction; None: just the picture.
        follows_instructions: whether they write what they are asked; else all that they see.
        answer_follows_prompt: whether the prompt's tokens stand before the answer's.
    """

    model_class: Callable[[], Any]
    processor_class: Callable[[], Any]
    prompt: Callable[[Any, str], str | None]
    follows_instructions: bool = True
    answer_follows_prompt: bool = True


def processor_of(found: Pretrained, kind: Kind) -> Any:
    """What puts picture and prompt together for a model.

    Raises:
        Unusable: the model does not say how.
    """
    image_processor = pretrained.load_image_processor(found)
    tokenizer = pretrained.load_tokenizer(found)
    with pretrained.readable(found.url):
        processor_class = kind.processor_class()
        described, _ = processor_class.get_processor_dict(found.url, revision=found.revision)
        processor = processor_class.from_args_and_dict([image_processor, tokenizer], described)
    if processor.chat_template is None:
        processor.chat_template = tokenizer.chat_template
    return processor


def inputs_of(processor: Any, kind: Kind, image: Image.Image, instruction: str) -> Any:
    """What a model is given of a picture and an instruction, by name."""
    asked: dict[str, Any] = {"images": [_shrunk(image)], "return_tensors": "pt"}
    prompt = kind.prompt(processor, instruction)
    if prompt is not None:
        asked["text"] = [prompt]
        # A prompt that brings its own first token is given no second one.
        begin = processor.tokenizer.bos_token
        if begin and prompt.startswith(begin):
            asked["add_special_tokens"] = False
    return processor(**asked)


def _shrunk(image: Image.Image) -> Image.Image:
    picture = image.convert("RGB")
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    return picture


def _conversation(processor: Any, instruction: str) -> str:
    """The instruction and the place of the picture in the words that the checkpoint brings.

    Some templates put the picture in themselves and take plain words, as JoyCaption's does;
    most take a list of parts, one of which is the picture.
    """
    parts = [{"type": "image"}, {"type": "text", "text": instruction}]
    plain = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": instruction}]
    for messages in (plain, [{"role": "user", "content": parts}]):
        try:
            prompt: str = processor.apply_chat_template(messages, add_generation_prompt=True)
        except (TemplateError, TypeError):
            continue
        if prompt.count(processor.image_token) == 1 and instruction in prompt:
            return prompt
    raise ValueError("its chat template has no place for a picture and an instruction")


def _llava_conversation(processor: Any, instruction: str) -> str:
    """As `_conversation`; a checkpoint without a template is asked as LLaVA 1.5 was trained."""
    if processor.chat_template is None:
        return f"USER: {processor.image_token}\n{instruction} ASSISTANT:"
    return _conversation(processor, instruction)


def _without_videos(processor_class: Any) -> Any:
    """A processor that knows pictures only: the part for videos cannot be without torchvision."""

    def made(self: Any, image_processor: Any, tokenizer: Any, chat_template: Any = None) -> None:
        processor_class.__init__(self, image_processor, tokenizer, None, chat_template)

    return type(processor_class.__name__, (processor_class,), {"__init__": made})


# An architecture's name in transformers to how it is asked.
_KINDS: Mapping[str, Kind] = {
    "llava": Kind(
        lambda: transformers.LlavaForConditionalGeneration,
        lambda: transformers.LlavaProcessor,
        _llava_conversation,
    ),
    "qwen2_5_vl": Kind(
        lambda: transformers.Qwen2_5_VLForConditionalGeneration,
        lambda: _without_videos(transformers.Qwen2_5_VLProcessor),
        _conversation,
    ),
    "qwen3_vl": Kind(
        lambda: transformers.Qwen3VLForConditionalGeneration,
        lambda: _without_videos(transformers.Qwen3VLProcessor),
        _conversation,
    ),
    "blip": Kind(
        lambda: transformers.BlipForConditionalGeneration,
        lambda: transformers.BlipProcessor,
        lambda _processor, _instruction: None,
        follows_instructions=False,
        answer_follows_prompt=False,
    ),
    "florence2": Kind(
        lambda: transformers.Florence2ForConditionalGeneration,
        lambda: transformers.Florence2Processor,
        lambda _processor, _instruction: "<DETAILED_CAPTION>",
        follows_instructions=False,
        answer_follows_prompt=False,
    ),
}


def kind_of(found: Pretrained) -> Kind:
    """How a model is asked.

    Raises:
        Unusable: nobody knows how.
    """
    kind = _KINDS.get(found.model_type)
    if kind is None:
        allowed = ", ".join(f"`{name}`" for name in _KINDS)
        raise Unusable(f"`{found.url}` is a `{found.model_type}` model; allowed: {allowed}")
    return kind
