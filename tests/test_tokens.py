"""New tokens: their names in captions, their vectors beside a frozen table, and pooling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from trainer import base_model
from trainer.base_model import Precision
from trainer.config import ModelConfig
from trainer.errors import InputError
from trainer.families import family_names, load_family
from trainer.families.base import Family, token_encoders
from trainer.tokens import (
    NewTokens,
    TokenNames,
    add_new_tokens,
    pool_at_end_of_text,
    retract,
)

FULL = Precision(*[torch.float32] * 4)
TOK = TokenNames(("TOK",), 2)
CAPTION = "a photo of TOK"


@pytest.fixture(params=[name for name in family_names() if token_encoders(load_family(name))])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"{request.param}_folder")
    return path


@pytest.fixture
def family(folder: Path) -> Family:
    return base_model.load(base_model.locate(ModelConfig(model_url=str(folder))), FULL)


@pytest.fixture
def tokenizer(sd15_folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(sd15_folder / "tokenizer")


@pytest.fixture
def encoder(sd15_folder: Path) -> CLIPTextModel:
    return CLIPTextModel.from_pretrained(sd15_folder / "text_encoder").requires_grad_(False)


def add(encoder: Any, tokenizer: Any, names: TokenNames = TOK, *, seed: int = 0) -> NewTokens:
    return add_new_tokens(encoder, tokenizer, names, seed=seed, component="text_encoder")


def add_to_all(family: Family, names: TokenNames = TOK) -> dict[str, NewTokens]:
    return {
        name: add_new_tokens(
            family.pipeline.components[name],
            family.pipeline.components[name.replace("text_encoder", "tokenizer")],
            names,
            seed=0,
            component=name,
        )
        for name in family.text_encoder_names
    }


def ids_of(tokenizer: Any, caption: str) -> torch.Tensor:
    ids: torch.Tensor = tokenizer(caption, padding="max_length", return_tensors="pt").input_ids
    return ids


# ---------------------------------------------------------------- names


def test_the_vectors_of_an_identifier_follow_one_another_without_spaces() -> None:
    names = TokenNames(("TOK", "CAT"), 2)

    assert names.tokens_of("CAT") == ("<s2>", "<s3>")
    assert names.all_tokens() == ("<s0>", "<s1>", "<s2>", "<s3>")
    assert names.replaced("a TOK beside a CAT, TOK's") == "a <s0><s1> beside a <s2><s3>, <s0><s1>'s"


@pytest.mark.parametrize("identifiers", [("TOK", "TOK1"), ("TOK1", "TOK")])
def test_an_identifier_that_begins_another_is_not_taken_for_it(
    identifiers: tuple[str, str],
) -> None:
    names = TokenNames(identifiers, 2)
    one, other = ("".join(names.tokens_of(name)) for name in ("TOK", "TOK1"))

    assert names.replaced("TOK1 and TOK") == f"{other} and {one}"


def test_of_identifiers_at_one_place_the_longest_is_taken() -> None:
    names = TokenNames(("my dog", "my dog Rex"), 1)

    assert names.replaced("my dog Rex, my dog") == "<s1>, <s0>"


@pytest.mark.parametrize("caption", ["TOKYO", "a TOK_2", "tok", "TOKTOK", "STOK", ""])
def test_an_identifier_inside_another_word_stays(caption: str) -> None:
    assert TOK.replaced(caption) == caption
    assert not TOK.occurs_in(caption)


def test_an_identifier_is_text_and_no_expression() -> None:
    names = TokenNames(("T.K", "C++"), 1)

    assert names.replaced("TOK, T.K and C++ too") == "TOK, <s0> and <s1> too"
    assert names.occurs_in("C++")


def test_a_caption_becomes_one_token_per_vector(tokenizer: CLIPTokenizer) -> None:
    names = TokenNames(("TOK", "TOK1"), 2)
    tokenizer.add_tokens(list(names.all_tokens()))

    words = tokenizer.convert_ids_to_tokens(tokenizer(names.replaced("a TOK1, TOK")).input_ids)

    new = ["<s2>", "<s3>", ",</w>", "<s0>", "<s1>"]
    assert words == ["<|startoftext|>", "a</w>", *new, "<|endoftext|>"]


# ---------------------------------------------------------------- rows beside the table


def test_new_tokens_get_the_ids_after_the_table(encoder: Any, tokenizer: Any) -> None:
    size = len(encoder.get_input_embeddings().weight)

    new = add(encoder, tokenizer, TokenNames(("A", "B"), 3))

    ids = tokenizer.convert_tokens_to_ids(["<s0>", "<s5>"])
    assert (size, ids) == (514, [514, 519])
    assert encoder.get_input_embeddings() is new
    assert torch.equal(new(torch.tensor([[514, 519, 7]]))[0, :2], new.rows[[0, 5]])


@pytest.mark.parametrize("spare", [10, 1])
def test_a_table_with_rows_to_spare_gives_way_to_the_new_rows(
    encoder: Any, tokenizer: Any, spare: int
) -> None:
    encoder.resize_token_embeddings(514 + spare, mean_resizing=False)
    table = encoder.get_input_embeddings().weight.clone()

    new = add(encoder, tokenizer)

    found = new(ids_of(tokenizer, TOK.replaced("a TOK")))[0]
    assert torch.equal(found[2:4], new.rows)
    assert torch.equal(found[1], table[tokenizer.convert_tokens_to_ids("a</w>")])
    assert torch.equal(new.weight, table)


def test_a_token_that_the_vocabulary_has_is_refused_and_nothing_is_added(
    encoder: Any, tokenizer: Any
) -> None:
    tokenizer.add_tokens(["<s1>"])

    with pytest.raises(InputError, match="`<s1>`") as refusal:
        add(encoder, tokenizer)

    assert refusal.value.problems[0].field == "token_abstraction"
    assert len(tokenizer) == 515
    assert isinstance(encoder.get_input_embeddings(), torch.nn.Embedding)


def test_the_deviation_is_that_of_the_table_before_anything_is_added(
    encoder: Any, tokenizer: Any
) -> None:
    numbers = encoder.get_input_embeddings().weight.double().flatten().tolist()
    mean = math.fsum(numbers) / len(numbers)
    expected = math.sqrt(math.fsum((x - mean) ** 2 for x in numbers) / (len(numbers) - 1))

    assert add(encoder, tokenizer).deviation == pytest.approx(expected, rel=1e-5)


def test_first_values_are_normal_with_the_deviation_of_the_table(
    encoder: Any, tokenizer: Any
) -> None:
    new = add(encoder, tokenizer, TokenNames(("TOK",), 75))

    # 75 × 32 draws: the deviation is within 5 % (3.5 standard errors), the mean near 0.
    rows = new.rows.detach()
    assert float(rows.std()) == pytest.approx(new.deviation, rel=0.05)
    assert abs(float(rows.mean())) < new.deviation * 0.08


def test_first_values_depend_on_seed_encoder_and_row_only(sd15_folder: Path) -> None:
    def rows(vectors: int, seed: int, component: str) -> torch.Tensor:
        encoder = CLIPTextModel.from_pretrained(sd15_folder / "text_encoder")
        tokenizer = CLIPTokenizer.from_pretrained(sd15_folder / "tokenizer")
        names = TokenNames(("TOK",), vectors)
        new = add_new_tokens(encoder, tokenizer, names, seed=seed, component=component)
        return new.rows.detach()

    first = rows(2, 0, "text_encoder")
    assert torch.equal(rows(3, 0, "text_encoder")[:2], first)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(rows(2, 1, "text_encoder"), first)
    assert not torch.equal(rows(2, 0, "text_encoder_2"), first)


def test_the_layer_answers_as_the_table_where_dtype_and_device_are_asked_for(
    encoder: Any, tokenizer: Any
) -> None:
    encoder.to(torch.bfloat16)
    table = encoder.get_input_embeddings()

    new = add(encoder, tokenizer)

    assert new.weight is table.weight
    assert new.embedding_dim == 32
    assert encoder.dtype == torch.bfloat16
    assert encoder.device == torch.device("cpu")
    assert new.rows.dtype == torch.float32


class Shapes(TorchDispatchMode):
    """Writes down the shape of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.made.add(tuple(tensor.shape))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_rows_get_a_gradient_and_none_of_the_tables_size_is_made(
    encoder: Any, tokenizer: Any, dtype: torch.dtype
) -> None:
    new = add(encoder.to(dtype), tokenizer)
    table = new.weight.clone()

    with Shapes() as shapes:
        states = encoder(ids_of(tokenizer, TOK.replaced(CAPTION))).last_hidden_state
        states.float().square().mean().backward()

    assert states.dtype == dtype
    assert new.rows.grad is not None
    assert new.rows.grad.dtype == torch.float32
    assert bool((new.rows.grad.abs().sum(1) > 0).all())
    assert (2, 32) in shapes.made
    assert not any(514 in shape for shape in shapes.made)
    assert not new.weight.requires_grad
    assert new.weight.grad is None
    assert torch.equal(new.weight, table)


def test_a_gradient_of_the_tables_size_would_be_noticed(encoder: Any, tokenizer: Any) -> None:
    encoder.get_input_embeddings().requires_grad_(True)

    with Shapes() as shapes:
        encoder(ids_of(tokenizer, CAPTION)).last_hidden_state.square().mean().backward()

    assert (514, 32) in shapes.made


def test_a_caption_with_one_of_two_identifiers_teaches_only_its_rows(
    encoder: Any, tokenizer: Any
) -> None:
    names = TokenNames(("CAT", "TOK"), 2)
    new = add(encoder, tokenizer, names)

    encoder(ids_of(tokenizer, names.replaced("a TOK"))).last_hidden_state.square().sum().backward()

    assert new.rows.grad is not None
    assert not new.rows.grad[:2].any()
    assert bool((new.rows.grad[2:].abs().sum(1) > 0).all())


# ---------------------------------------------------------------- through the family


def test_the_familys_encoding_gives_gradients_to_all_rows_and_to_nothing_else(
    family: Family,
) -> None:
    new = add_to_all(family)

    text = family.encode_text([TOK.replaced(CAPTION)])
    torch.stack([states.square().mean() for states in text.values()]).sum().backward()

    modules = {
        n: c for n, c in family.pipeline.components.items() if isinstance(c, torch.nn.Module)
    }
    learning = {
        f"{component}.{name}"
        for component, module in modules.items()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    assert len(learning) == len(new) == len(family.text_encoder_names)
    for tokens in new.values():
        assert tokens.rows.grad is not None
        assert bool((tokens.rows.grad.abs().sum(1) > 0).all())


def test_captions_without_identifiers_are_encoded_bit_for_bit_as_before(family: Family) -> None:
    captions = ["a photo of TOKYO", "", "an astronaut, smiling"]
    before = family.encode_text(captions)

    add_to_all(family)

    after = family.encode_text([TOK.replaced(caption) for caption in captions])
    assert all(torch.equal(after[name], states) for name, states in before.items())


def test_diffusers_loads_the_rows_and_encodes_what_we_encode(family: Family, folder: Path) -> None:
    names = TokenNames(("TOK", "CAT"), 2)
    new = add_to_all(family, names)
    caption = names.replaced("a photo of TOK and a CAT")
    ours = family.encode_text([caption])
    fresh = base_model.load(base_model.locate(ModelConfig(model_url=str(folder))), FULL)

    for component, tokens in new.items():
        fresh.pipeline.load_textual_inversion(
            tokens.rows.detach().clone(),
            token=list(names.all_tokens()),
            text_encoder=fresh.pipeline.components[component],
            tokenizer=fresh.pipeline.components[component.replace("text_encoder", "tokenizer")],
        )

    theirs = fresh.encode_text([caption])
    assert theirs.keys() == ours.keys()
    for name, states in ours.items():
        torch.testing.assert_close(theirs[name], states, atol=1e-6, rtol=0)
    plain = fresh.encode_text(["a photo of TOK and a CAT"])["prompt_embeds"]
    assert not torch.allclose(plain, ours["prompt_embeds"], atol=1e-2)


# ---------------------------------------------------------------- retraction


def tokens_with(rows: torch.Tensor, deviation: float) -> NewTokens:
    table = torch.nn.Embedding(10, rows.shape[1])
    return NewTokens(table, rows, first_id=10, deviation=deviation)


def test_retraction_pulls_the_joint_deviation_by_its_exponent() -> None:
    # Numbers 1, 3, 5, 7: mean 4, unbiased variance (9 + 1 + 1 + 9) / 3.
    rows = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    tokens = tokens_with(rows, 0.5)

    retract(tokens, 0.1)

    expected = rows * (0.5 / math.sqrt(20 / 3)) ** 0.1
    torch.testing.assert_close(tokens.rows.detach(), expected)
    assert tokens.rows.requires_grad
    assert tokens.rows.grad_fn is None


def test_a_whole_retraction_ends_at_the_tables_deviation_and_pushes_outwards_too() -> None:
    for scale in (0.01, 100.0):
        tokens = tokens_with(scale * torch.randn(3, 8, generator=torch.Generator()), 0.5)

        retract(tokens, 1.0)

        assert float(tokens.rows.detach().std()) == pytest.approx(0.5, rel=1e-5)


def test_a_retraction_of_zero_touches_no_bit() -> None:
    rows = torch.randn(3, 8, generator=torch.Generator())
    tokens = tokens_with(rows, 0.5)
    before = rows.clone()

    retract(tokens, 0.0)

    assert torch.equal(tokens.rows, before)


@pytest.mark.parametrize("rows", [torch.zeros(2, 3), torch.full((1, 1), 0.25), torch.ones(2, 2)])
def test_rows_without_a_deviation_stay_as_they_are(rows: torch.Tensor) -> None:
    tokens = tokens_with(rows, 0.5)
    before = rows.clone()

    retract(tokens, 0.1)

    assert torch.equal(tokens.rows, before)


# ---------------------------------------------------------------- pooling


@contextmanager
def pooling(folder: Path, component: str, kind: Any, **config: int) -> Iterator[tuple[Any, Any]]:
    """An encoder, its configuration changed, and its tokenizer; both with new tokens."""
    encoder = kind.from_pretrained(folder / component, **config)
    name = component.replace("text_encoder", "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / name)
    with torch.no_grad():
        yield encoder, tokenizer


KINDS = [("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)]


def pooled_at(encoder: Any, ids: torch.Tensor) -> int:
    """The position whose last hidden state is the pooled vector."""
    output = encoder(ids, output_hidden_states=True)
    states = output.last_hidden_state[0]
    if isinstance(encoder, CLIPTextModelWithProjection):
        pooled, states = output.text_embeds[0], encoder.text_projection(states)
    else:
        pooled = output.pooler_output[0]
    (found,) = [n for n, row in enumerate(states) if torch.allclose(row, pooled, atol=1e-6)]
    return found


@pytest.mark.parametrize(("component", "kind"), KINDS)
def test_an_old_checkpoint_pools_at_the_last_new_token_until_told_otherwise(
    sdxl_folder: Path, component: str, kind: Any
) -> None:
    with pooling(sdxl_folder, component, kind, eos_token_id=2) as (encoder, tokenizer):
        add(encoder, tokenizer)
        # Begin mark, "a", "in", with one token per letter, and the new tokens at 2 and 3.
        ids = ids_of(tokenizer, TOK.replaced("a TOK in"))
        assert ids[0, 3] == 515
        assert ids[0, 6] == tokenizer.eos_token_id
        assert pooled_at(encoder, ids) == 3

        pool_at_end_of_text(encoder, tokenizer)

        assert pooled_at(encoder, ids) == 6


@pytest.mark.parametrize(("component", "kind"), KINDS)
def test_captions_without_new_tokens_are_pooled_alike_either_way(
    sdxl_folder: Path, component: str, kind: Any
) -> None:
    with pooling(sdxl_folder, component, kind, eos_token_id=2) as (encoder, tokenizer):
        add(encoder, tokenizer)
        ids = ids_of(tokenizer, "a cat")
        before = encoder(ids)[0 if component.endswith("2") else 1]

        pool_at_end_of_text(encoder, tokenizer)

        assert torch.equal(encoder(ids)[0 if component.endswith("2") else 1], before)


@pytest.mark.parametrize(("component", "kind"), KINDS)
def test_where_to_pool_is_kept_with_the_encoder(
    sdxl_folder: Path, tmp_path: Path, component: str, kind: Any
) -> None:
    with pooling(sdxl_folder, component, kind, eos_token_id=2) as (encoder, tokenizer):
        pool_at_end_of_text(encoder, tokenizer)
        encoder.save_pretrained(tmp_path)

        again = kind.from_pretrained(tmp_path)
        again_tokenizer = CLIPTokenizer.from_pretrained(
            sdxl_folder / component.replace("text_encoder", "tokenizer")
        )
        add(again, again_tokenizer)
        assert pooled_at(again, ids_of(again_tokenizer, TOK.replaced("a TOK in"))) == 6


@pytest.mark.parametrize(("component", "kind"), KINDS)
def test_a_newer_checkpoint_pools_at_the_end_of_text_by_itself(
    sdxl_folder: Path, component: str, kind: Any
) -> None:
    with pooling(sdxl_folder, component, kind) as (encoder, tokenizer):
        add(encoder, tokenizer)

        assert pooled_at(encoder, ids_of(tokenizer, TOK.replaced("a TOK"))) == 4
