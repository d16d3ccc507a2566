"""How diffusers and user interfaces read files of token vectors.

The header says which token a row belongs to; the tensors are read by the readers' own rules.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.export.readers import Reader, Reading, metadata_of
from trainer.names import KohyaNames, tokenizer_name


def _read_diffusers(pipeline: Any, path: Path, names: KohyaNames) -> Iterator[Reading]:
    """`load_textual_inversion` once for each text encoder, then the rows at the tokens' ids."""
    tensors, tokens = load_file(path), _tokens(path)
    for key, component in _components(tensors, names).items():
        encoder = pipeline.components[component]
        tokenizer = pipeline.components[tokenizer_name(component)]
        num_known = encoder.get_input_embeddings().num_embeddings
        # A list of one token is stored as a matrix with one row, which diffusers takes too.
        pipeline.load_textual_inversion(
            tensors[key], token=tokens, text_encoder=encoder, tokenizer=tokenizer
        )
        table = encoder.get_input_embeddings().weight.detach().float()
        ids = tokenizer.convert_tokens_to_ids(tokens)
        rows = table[ids].clone()
        # The table as it was, so that a change of another row shows as one of the base model.
        encoder.resize_token_embeddings(num_known)
        yield from _readings(component, tokens, rows)


def _read_interface(pipeline: Any, path: Path, names: KohyaNames) -> Iterator[Reading]:
    """All rows of the key that belongs to a text encoder, as ComfyUI, A1111 and Forge take them.

    ComfyUI reads for each encoder its own key: `clip_l`, with SDXL `clip_g` and with FLUX `t5xxl`
    beside it. A1111 and Forge take a file with one key for SD1.5 and one with exactly `clip_l` and
    `clip_g` for SDXL. Sources: comfy/sd1_clip.py (load_embed), comfy/text_encoders/flux.py,
    modules/textual_inversion/textual_inversion.py (create_embedding_from_data).
    """
    tensors, tokens = load_file(path), _tokens(path)
    both = set(names.embedding_keys.values())
    if len(tensors) > 1 and tensors.keys() != both:
        raise ValueError(f"keys {sorted(tensors)} are neither one nor {' and '.join(sorted(both))}")
    for key, component in _components(tensors, names).items():
        width = pipeline.components[component].get_input_embeddings().embedding_dim
        rows = tensors[key]
        if rows.ndim != 2 or rows.shape[1] != width or rows.dtype != torch.float32:
            raise ValueError(
                f"`{key}` is {rows.dtype} of shape {tuple(rows.shape)}, expected fp32 (n, {width})"
            )
        yield from _readings(component, tokens, rows)


def _tokens(path: Path) -> list[str]:
    tokens = json.loads(metadata_of(path).get("tokens", "null"))
    if not isinstance(tokens, list):
        raise ValueError("the header does not name the tokens")
    return tokens


def _components(tensors: Mapping[str, Tensor], names: KohyaNames) -> dict[str, str]:
    """Key of the file to the text encoder it is for."""
    components = {key: component for component, key in names.embedding_keys.items()}
    unknown = sorted(tensors.keys() - components.keys())
    if unknown:
        raise ValueError(f"`{unknown[0]}` is the key of no text encoder of this family")
    return {key: components[key] for key in sorted(tensors)}


def _readings(component: str, tokens: list[str], rows: Tensor) -> Iterator[Reading]:
    """One reading for each token; the tensor counts as one key, with the first of them."""
    for number, (token, row) in enumerate(zip(tokens, rows, strict=True)):
        yield Reading(component, token, None, row, int(number == 0))


EMBEDDING_DIFFUSERS = Reader(
    "diffusers", _read_diffusers, changes_pipeline=True, reads_exactly=True
)
EMBEDDING_INTERFACE = Reader("formula", _read_interface, reads_exactly=True)
