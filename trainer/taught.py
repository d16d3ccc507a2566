"""New tokens of finished runs, put beside the words of a loaded base model and taken off again.

Each identifier of a run stands for tokens of its own; the tokens of several runs are numbered on.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel

from trainer.errors import InputError
from trainer.export.embeddings import TOKENS_KEY
from trainer.export.read import read_tensors
from trainer.families.base import Family
from trainer.names import KohyaNames, tokenizer_name
from trainer.sections.subjects import words
from trainer.tokens import NewTokens, pool_at_end_of_text

_IDENTIFIERS_KEY = "identifiers"


@dataclass(frozen=True)
class TokenFile:
    """The vectors that a run learnt.

    Args:
        run: what it is called in messages.
        path: of the file of all its tokens.
        pools_at_end: whether it learnt with CLIP's pooled vector taken at the end of the text.
    """

    run: str
    path: Path
    pools_at_end: bool


@dataclass(frozen=True)
class Taught:
    """Words that stand for new tokens.

    Args:
        tokens: identifier to its tokens, in their order.
    """

    tokens: Mapping[str, tuple[str, ...]]

    def replaced(self, prompt: str) -> str:
        """A prompt with tokens where identifiers stood, as captions had them in training."""
        if not self.tokens:
            return prompt
        return words(tuple(self.tokens)).sub(lambda found: "".join(self.tokens[found[0]]), prompt)


@dataclass
class _Vocabulary:
    """What all runs together add.

    Args:
        tokens: identifier to its tokens.
        rows: text encoder to token to its vector.
        run_of: identifier to the run that has it.
        pooled: text encoders that pool at the end of the text.
    """

    tokens: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rows: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    run_of: dict[str, str] = field(default_factory=dict)
    pooled: set[str] = field(default_factory=set)


def teach(family: Family, files: Sequence[TokenFile], stack: ExitStack) -> Taught:
    """Adds the tokens of all files to tokenizers and text encoders.

    Args:
        family: loaded.
        files: those of the runs.
        stack: is told how to take everything off again.

    Raises:
        InputError: two runs have the same identifier, the base model has the tokens already, or
            a file is none of this family's.
    """
    vocabulary = _Vocabulary()
    for file in files:
        _add(vocabulary, file, family.kohya)
    for component, rows in vocabulary.rows.items():
        _extend(family.pipeline, component, rows, stack)
        if component in vocabulary.pooled:
            _pool_at_end(family.pipeline, component, stack)
    return Taught(vocabulary.tokens)


def _add(vocabulary: _Vocabulary, file: TokenFile, names: KohyaNames) -> None:
    tensors, header = read_tensors(file.path)
    encoders = {key: encoder for encoder, key in names.embedding_keys.items()}
    strange = sorted(tensors.keys() - encoders.keys())
    if strange:
        message = f"run `{file.run}` has vectors `{strange[0]}`, which no text encoder here takes"
        raise InputError.of("trained", message, "give the base model that it was trained on")
    order: list[str] = json.loads(header[TOKENS_KEY])
    number = sum(map(len, vocabulary.tokens.values()))
    new_name = {token: f"<s{number + place}>" for place, token in enumerate(order)}
    for identifier, tokens in json.loads(header[_IDENTIFIERS_KEY]).items():
        if identifier in vocabulary.tokens:
            runs = f"`{vocabulary.run_of[identifier]}` and `{file.run}`"
            message = f"`{identifier}` stands for new tokens in both runs {runs}"
            hint = "give one of them, or train one with another token_abstraction"
            raise InputError.of("trained", message, hint)
        vocabulary.tokens[identifier] = tuple(new_name[token] for token in tokens)
        vocabulary.run_of[identifier] = file.run
    for key, rows in tensors.items():
        named = zip((new_name[token] for token in order), rows, strict=True)
        vocabulary.rows.setdefault(encoders[key], {}).update(named)
        if file.pools_at_end:
            vocabulary.pooled.add(encoders[key])


def _extend(pipeline: Any, component: str, rows: Mapping[str, Tensor], stack: ExitStack) -> None:
    """One text encoder and a copy of its tokenizer with further tokens."""
    encoder, name = pipeline.components[component], tokenizer_name(component)
    original = pipeline.components[name]
    taken = sorted(original.get_vocab().keys() & rows.keys())
    if taken:
        message = f"the new token `{taken[0]}` is in the vocabulary of {component} already"
        hint = "give a base model whose tokenizers have no tokens of an earlier training"
        raise InputError.of("model_url", message, hint)
    tokenizer = copy.deepcopy(original)
    tokenizer.add_tokens(list(rows))
    first_id = tokenizer.convert_tokens_to_ids(next(iter(rows)))
    table = encoder.get_input_embeddings()
    vectors = torch.stack(list(rows.values()))
    stack.callback(encoder.set_input_embeddings, table)
    encoder.set_input_embeddings(NewTokens(table, vectors, first_id=first_id, deviation=0.0))
    stack.callback(pipeline.register_modules, **{name: original})
    pipeline.register_modules(**{name: tokenizer})


def _pool_at_end(pipeline: Any, component: str, stack: ExitStack) -> None:
    encoder = pipeline.components[component]
    for model in encoder.modules():
        if isinstance(model, CLIPTextModel):
            stack.callback(setattr, model, "eos_token_id", model.eos_token_id)
            stack.callback(setattr, model.config, "eos_token_id", model.config.eos_token_id)
    pool_at_end_of_text(encoder, pipeline.components[tokenizer_name(component)])
