"""Writes docs/file-names.md: what layers are called in kohya files, by family.

python scripts/make_file_names.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer import families
from trainer.names import KohyaNames

PAGE = Path(__file__).parent.parent / "docs" / "file-names.md"

_HEAD = """# Names of layers in adapter files

A diffusers file names a layer by its component and path: `transformer.x_embedder.lora_A.weight`.
A kohya file has a prefix and the path with `_` for every dot; where the table has an entry, the
path is that of the original implementation. `*` is the number of a block. Made by
`scripts/make_file_names.py` from the tables of `trainer/families/`.

Layers that are one in the file are joined row by row, in the order given, which is exact for LoRA,
DoRA and LoHa; `4 x` is a part with four rows for each input. A Kronecker product (LoKr) cannot be
joined: its layers keep their diffusers names behind the prefix for such layers. Where halves change
places, the original has the second half of the rows first.

For FLUX.2 [klein] the transformer alone is adapted; its text encoder, a Qwen3 of whose inner layers
three are told to the transformer, stays as it is, and no program knows names for it. Its latents
are packed, each 2 x 2 square into the channels of one token, and then normalised channel by channel
with the running statistics of the VAE's batch norm, in place of a scaling factor.
"""


def page() -> str:
    """The whole page as Markdown."""
    tables = {name: families.load_family(name).kohya for name in families.family_names()}
    return "\n".join([_HEAD, *(line for each in tables.items() for line in _section(*each))])


def _section(family: str, names: KohyaNames) -> Iterator[str]:
    yield from (f"## {family}", "", "| component | prefix |", "|---|---|")
    yield f"| `{names.denoiser}` | `{names.denoiser_prefix}_` |"
    if names.unfused_prefix:
        yield f"| `{names.denoiser}`, layers of LoKr | `{names.unfused_prefix}_` |"
    for component, prefix in names.text_encoder_prefixes.items():
        yield f"| `{component}` | `{prefix}_` |"
    for component, key in names.embedding_keys.items():
        yield f"| `{component}`, vectors of new tokens | `{key}` |"
    yield ""
    rows = [*_fused(names), *_renamed(names)]
    if rows:
        yield from ("| in diffusers | in the file |", "|---|---|", *rows, "")
    else:
        yield from ("All layers keep their diffusers paths.", "")


def _fused(names: KohyaNames) -> Iterator[str]:
    for theirs, parts in names.fusions.items():
        ours = [
            f"{share} x `{path}`" if share > 1 else f"`{path}`" for path, share in parts.items()
        ]
        yield f"| {', '.join(ours)} | `{theirs.replace('.', '_')}` |"


def _renamed(names: KohyaNames) -> Iterator[str]:
    for ours, theirs in names.layers.items():
        swapped = ", halves change places" if ours in names.swapped_halves else ""
        yield f"| `{ours}`{swapped} | `{theirs.replace('.', '_')}` |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
