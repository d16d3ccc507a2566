"""Writes into docs/outputs.md how files are loaded, in the words of the model card: make_loading.py

Which program reads which form of adapter, and the card's own sections for one training.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from trainer.export.card_loading import (
    CardFile,
    listed,
    loading_sections,
    programs_of,
    readers_of_plain,
)
from trainer.export.facts import TrainingFacts
from trainer.export.state import AdapterState, Algorithm
from trainer.families import family_names, load_family
from trainer.names import KohyaNames

PAGE = Path(__file__).parent.parent / "docs" / "outputs.md"
BEGIN = "<!-- loading: made by scripts/make_loading.py -->"
END = "<!-- end of loading -->"
FORMS: dict[str, tuple[Algorithm, bool]] = {
    "LoRA": ("lora", False),
    "DoRA": ("lora", True),
    "LoKr": ("lokr", False),
    "LoHa": ("loha", False),
}
# The training that the sections are of.
FAMILY = "sdxl"
FACTS = TrainingFacts(
    output_name="me",
    base_model="stabilityai/stable-diffusion-xl-base-1.0",
    tokens={"TOK": ("<s0>", "<s1>")},
    token_prompts=("a photograph of <s0><s1>",),
    settings={"ti_pooling": "diffusers"},
)
FILES = (
    CardFile("diffusers_lora", "pytorch_lora_weights.safetensors"),
    CardFile("kohya_lora", "me.safetensors"),
    CardFile("embeddings", "me_emb.safetensors"),
    CardFile("token_embedding", "me_TOK.safetensors"),
)


def text() -> str:
    """Table and sections."""
    family = load_family(FAMILY)
    sections = loading_sections(
        FACTS, FILES, family.pipeline_class.__name__, family.kohya, _state("lora", False)
    )
    return "\n\n".join(["\n".join(_table()), INTRODUCTION, *map(_inner, sections)])


INTRODUCTION = (
    "For a LoRA with new words on SDXL, called `me`, the card says this; for another training its "
    "own says what differs:"
)


def page_with_loading(page: str) -> str:
    """The page as it should be now.

    Raises:
        ValueError: the page has no place for it.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"`{BEGIN}` and `{END}` must stand on the page")
    return f"{before}{BEGIN}\n\n{text()}\n\n{END}{after}"


def _table() -> Iterator[str]:
    yield from ("| family | form | diffusers | the kohya file is read by |", "|---|---|---|---|")
    for name in family_names():
        names = load_family(name).kohya
        for form, (algorithm, use_dora) in FORMS.items():
            reads = algorithm in names.diffusers_reads
            way = "`load_lora_weights`" if reads else "PEFT, by the card's lines"
            readers = _readers(names, _state(algorithm, use_dora))
            yield f"| `{name}` | {form} | {way} | {readers} |"


def _readers(names: KohyaNames, state: AdapterState) -> str:
    plain = readers_of_plain(names, state)
    others = [program for program in programs_of(names, state) if program not in plain]
    apart = f"; `NAME_comfyui.safetensors`: {listed(others)}" if others else ""
    return listed([*plain, "LyCORIS"]) + apart


def _state(algorithm: Algorithm, use_dora: bool) -> AdapterState:
    return AdapterState(algorithm=algorithm, use_dora=use_dora, components={}, strengths={})


def _inner(section: str) -> str:
    """A section of the card one level further in, its code tagged with what it needs."""
    section = re.sub(r"^## ", "### ", section, flags=re.MULTILINE)
    return section.replace("```python", "<!-- needs: network, minutes -->\n```python")


if __name__ == "__main__":
    PAGE.write_text(page_with_loading(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
