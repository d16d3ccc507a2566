"""The new tokens' vectors as user interfaces and diffusers read them.

One file holds the tokens of all identifiers, for diffusers. User interfaces insert every row of
a file where its name stands in a prompt, so each identifier has a file of its own too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from trainer import tensorfile
from trainer.export.facts import TrainingFacts
from trainer.job import Role
from trainer.names import KohyaNames

TOKENS_KEY = "tokens"

# Text encoder to new token to its vector (width,).
TokenRows = dict[str, dict[str, Tensor]]


def write_embeddings(
    path: Path,
    rows: Mapping[str, Tensor],
    names: KohyaNames,
    metadata: Mapping[str, str],
) -> None:
    """Writes one file with a tensor of token vectors for each text encoder, in fp32.

    Vectors are absolute, as they stand in the token table.

    Args:
        path: the file.
        rows: text encoder to its vectors (n, width), in the order of the tokens.
        names: the family's table; says the key of each text encoder.
        metadata: strings of the header; see `embedding_metadata`.

    Raises:
        ValueError: a text encoder that has no key in such files.
    """
    unknown = sorted(rows.keys() - names.embedding_keys.keys())
    if unknown:
        raise ValueError(f"embedding files have no key for {', '.join(unknown)}")
    tensors = {
        names.embedding_keys[component]: tensor.detach().to("cpu", torch.float32)
        for component, tensor in rows.items()
    }
    tensorfile.write(path, tensors, metadata)


def embedding_metadata(
    facts: TrainingFacts, names: KohyaNames, identifiers: tuple[str, ...]
) -> dict[str, str]:
    """The header of an embedding file: which token each row is, and what it was trained on.

    Args:
        identifiers: those whose tokens the file has, in the order of the rows.
    """
    tokens = [token for identifier in identifiers for token in facts.tokens[identifier]]
    header = {
        "format": "pt",
        TOKENS_KEY: json.dumps(tokens),
        "identifiers": json.dumps({name: list(facts.tokens[name]) for name in identifiers}),
        "ss_base_model_version": names.base_model_version,
        "ss_output_name": facts.output_name,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{names.architecture}/textual-inversion",
        "modelspec.implementation": names.implementation,
        "modelspec.title": facts.output_name,
    }
    optional = {"ss_sd_model_name": facts.base_model, "ti_pooling": _pooling(facts)}
    return header | {key: value for key, value in optional.items() if value}


def write_token_files(
    folder: Path, rows: Mapping[str, Tensor], names: KohyaNames, facts: TrainingFacts
) -> Iterator[tuple[Role, Path, TokenRows]]:
    """Writes the file of all tokens, then one file for each identifier.

    The files are `<output name>_emb` and `<output name>_<identifier>`.

    Args:
        folder: where to.
        rows: text encoder to the vectors (n, width) of all tokens of `facts.tokens`, in order.
        names: the family's table.
        facts: what was trained; its tokens name the rows.

    Yields:
        Role and place of each file as it is written, and what it must be found to hold.

    Raises:
        ValueError: there are more or fewer rows than tokens.
    """
    ids = {token: row for row, token in enumerate(sum(facts.tokens.values(), ()))}
    if any(len(tensor) != len(ids) for tensor in rows.values()):
        shapes = {component: tuple(tensor.shape) for component, tensor in rows.items()}
        raise ValueError(f"{len(ids)} tokens for rows of shapes {shapes}")
    stems = {_combined_stem(facts): tuple(facts.tokens)}
    for identifier, stem in token_file_stems(facts).items():
        stems[stem] = (identifier,)
    for number, (stem, identifiers) in enumerate(stems.items()):
        tokens = [token for identifier in identifiers for token in facts.tokens[identifier]]
        chosen = {
            component: tensor[[ids[token] for token in tokens]]
            for component, tensor in rows.items()
        }
        path = folder / f"{stem}.safetensors"
        write_embeddings(path, chosen, names, embedding_metadata(facts, names, identifiers))
        yield "token_embedding" if number else "embeddings", path, token_rows(chosen, tokens)


def token_rows(rows: Mapping[str, Tensor], tokens: list[str]) -> TokenRows:
    """Vectors (n, width) by text encoder and token, fp32 on the CPU, as verification wants them."""
    return {
        component: dict(zip(tokens, tensor.detach().to("cpu", torch.float32), strict=True))
        for component, tensor in rows.items()
    }


def token_file_stems(facts: TrainingFacts) -> dict[str, str]:
    """Identifier to the name of its file without the ending, which is what a prompt names.

    Characters that a file name or a prompt's syntax may not have become underscores; where that
    makes two names equal, capitals aside, the later ones are numbered.
    """
    stems: dict[str, str] = {}
    taken = {_combined_stem(facts).lower(), *_taken(facts)}
    for identifier in facts.tokens:
        plain = f"{facts.output_name}_" + re.sub(r"[^\w-]", "_", identifier)
        stem, number = plain, 2
        while stem.lower() in taken:
            stem, number = f"{plain}_{number}", number + 1
        stems[identifier] = stem
        taken.add(stem.lower())
    return stems


def _taken(facts: TrainingFacts) -> list[str]:
    """Names of adapter files beside these."""
    return [facts.output_name.lower(), f"{facts.output_name}_comfyui".lower()]


def _combined_stem(facts: TrainingFacts) -> str:
    return f"{facts.output_name}_emb"


def _pooling(facts: TrainingFacts) -> str:
    return str(facts.settings.get("ti_pooling") or "")
