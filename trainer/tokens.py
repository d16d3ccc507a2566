"""Pivotal tuning's new tokens: their names in captions, and their vectors beside a frozen table.

The table of a CLIP text encoder is never changed, copied or given a gradient: the new vectors
are a parameter of their own, which the encoder's embedding layer looks up as if they were
further rows. Knows tokenizers and text encoders of transformers; knows no family, no optimizer
and no step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextModel

from trainer import randomness
from trainer.config import TokenConfig
from trainer.errors import InputError, Problem
from trainer.sections.subjects import words


@dataclass(frozen=True)
class TokenNames:
    """How identifiers in captions become new tokens: the i-th of n vectors is `<s{i*n}>…`.

    Args:
        identifiers: words such as `TOK`, each once.
        vectors: new tokens per identifier.
    """

    identifiers: tuple[str, ...]
    vectors: int

    def tokens_of(self, identifier: str) -> tuple[str, ...]:
        """The new tokens of one identifier, in their order.

        Raises:
            ValueError: it is none of the identifiers.
        """
        first = self.identifiers.index(identifier) * self.vectors
        return tuple(f"<s{number}>" for number in range(first, first + self.vectors))

    def all_tokens(self) -> tuple[str, ...]:
        """The new tokens of all identifiers, in the order of their vectors."""
        return tuple(token for name in self.identifiers for token in self.tokens_of(name))

    def replaced(self, caption: str) -> str:
        """A caption with new tokens, without spaces between them, where identifiers stood.

        What counts as an identifier in a text is said at `words`.
        """
        return words(self.identifiers).sub(lambda found: "".join(self.tokens_of(found[0])), caption)

    def occurs_in(self, caption: str) -> bool:
        """Whether a caption has an identifier, and so teaches the new tokens something."""
        return words(self.identifiers).search(caption) is not None


def token_names(token: TokenConfig) -> TokenNames | None:
    """The new tokens that a configuration asks for, if any are to be learnt."""
    if not token.train_text_encoder_ti:
        return None
    return TokenNames(token.token_abstraction, token.num_new_tokens_per_abstraction)


class NewTokens(nn.Module):
    """An embedding layer of a frozen table and new rows that learn.

    The rows stay 32-bit floats beside a table of half precision, as long as the encoder is not
    cast as a whole afterwards.

    Args:
        table: the encoder's own embedding; its weight is shared and frozen.
        rows: first values of the new vectors (n, width).
        first_id: the token id of the first row; the others follow it.
        deviation: standard deviation of all numbers in the table.
    """

    def __init__(
        self, table: nn.Embedding, rows: torch.Tensor, *, first_id: int, deviation: float
    ) -> None:
        super().__init__()
        self.table = table.requires_grad_(False)
        # A layer, not a parameter of this one: parameters come before layers, and transformers
        # takes an encoder's dtype from its first parameter, which has to be the table's.
        self.added = nn.Embedding.from_pretrained(
            rows.detach().to(table.weight.device, torch.float32, copy=True), freeze=False
        )
        self.first_id = first_id
        self.deviation = deviation

    @property
    def rows(self) -> nn.Parameter:
        """The new vectors (n, width), 32 bits; the only thing here that learns."""
        rows = self.added.weight
        assert isinstance(rows, nn.Parameter)
        return rows

    @property
    def weight(self) -> torch.Tensor:
        """The frozen table's weight, for those who ask an embedding for its dtype or device."""
        return self.table.weight

    @property
    def embedding_dim(self) -> int:
        """Numbers per vector."""
        return self.table.embedding_dim

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The vectors of token ids, (…) to (…, width), in the table's dtype."""
        places = input_ids - self.first_id
        is_new = (places >= 0) & (places < len(self.rows))
        known = self.table(input_ids.masked_fill(is_new, 0))
        new = self.added(places.clamp(0, len(self.rows) - 1)).to(known.dtype)
        return torch.where(is_new.unsqueeze(-1), new, known)


def refuse_taken(names: TokenNames, tokenizer: Any, *, component: str) -> None:
    """Refuses new tokens that a tokenizer has among its words.

    Raises:
        InputError: it has one of them.
    """
    known = tokenizer.get_vocab()
    taken = [token for token in names.all_tokens() if token in known]
    if taken:
        message = f"the new token `{taken[0]}` is in the vocabulary of {component} already"
        hint = "give a base model whose tokenizers have no tokens of an earlier training"
        raise InputError([Problem("token_abstraction", message, hint)])


def add_new_tokens(
    text_encoder: Any, tokenizer: Any, names: TokenNames, *, seed: int, component: str
) -> NewTokens:
    """Adds the tokens to a tokenizer, and their vectors to its text encoder.

    First values are normal with the deviation of the encoder's own table, taken before anything
    is added to it (diffusers' `TokenEmbeddingsHandler.initialize_new_tokens` takes it after).

    Args:
        text_encoder: a CLIP text model of transformers; its embedding layer is replaced.
        tokenizer: its tokenizer, changed in place.
        names: the tokens.
        seed: the run's seed.
        component: the encoder's name in the pipeline; encoders draw different first values.

    Raises:
        InputError: the tokenizer knows one of the tokens already.
    """
    refuse_taken(names, tokenizer, component=component)
    tokens = list(names.all_tokens())
    tokenizer.add_tokens(tokens)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    # The next free id is not always the table's size: tables with rows to spare, or a tokenizer
    # with fewer words, put it below. The new row then stands for an id that had no word.
    assert ids == list(range(ids[0], ids[0] + len(tokens))), ids
    table: nn.Embedding = text_encoder.get_input_embeddings()
    deviation = float(table.weight.detach().float().std())
    rows = torch.stack(
        [
            deviation * _normal(table.embedding_dim, seed, f"token {component}", row)
            for row in range(len(tokens))
        ]
    )
    new = NewTokens(table, rows, first_id=ids[0], deviation=deviation)
    text_encoder.set_input_embeddings(new)
    return new


@torch.no_grad()
def retract(tokens: NewTokens, exponent: float, allowed: torch.Tensor | None = None) -> None:
    """Pulls the deviation of the new vectors towards the table's, in place.

    rows ← rows · (deviation of the table / deviation of the rows) ** exponent, with one
    deviation over all rows together: identifiers share it, and a pull on one moves the others
    (diffusers' advanced SDXL script, `retract_embeddings`, exponent 0.1). Rows that are all
    equal have no deviation to pull and stay as they are.

    Args:
        tokens: changed in place.
        exponent: share of the way on a logarithmic scale, in [0, 1]; 0: nothing is touched.
        allowed: () bool on the device: where false, nothing is touched. None: true.
    """
    if exponent == 0 or tokens.rows.numel() < 2:
        return
    spread = tokens.rows.std()
    factor = (tokens.deviation / spread) ** exponent
    pulls = spread > 0 if allowed is None else allowed & (spread > 0)
    tokens.rows.mul_(torch.where(pulls, factor, 1.0))


def pool_at_end_of_text(text_encoder: Any, tokenizer: Any) -> None:
    """Makes a CLIP text model take its pooled vector at the first end mark of each text.

    A checkpoint whose configuration has `eos_token_id` 2, as all from before transformers 4.31
    have, wrongly, takes it at the largest id instead. That is the end mark in texts of its own
    words, but the last new token in texts that have one, since new ids are the largest.
    Changes the model and its configuration; texts without new tokens are pooled as before.

    Args:
        text_encoder: changed in place.
        tokenizer: what says which id the end mark has.
    """
    for model in _text_models(text_encoder):
        model.eos_token_id = tokenizer.eos_token_id
        # The same object as a projection's above it, and what `save_pretrained` writes.
        model.config.eos_token_id = tokenizer.eos_token_id


def _text_models(text_encoder: Any) -> list[Any]:
    """The model itself, or the one below a projection: where transformers does the pooling."""
    return [module for module in text_encoder.modules() if isinstance(module, CLIPTextModel)]


def _normal(size: int, seed: int, purpose: str, position: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(randomness.key(seed, purpose, position))
    return torch.randn(size, generator=generator)
