"""Files of new tokens' vectors: what they hold, who reads them, and how they can be spoilt."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checking import Change, rewrite, run_checks
from safetensors.torch import load_file
from torch import Tensor
from trained_adapters import SD15, TABLES, TrainedAdapter

from trainer.export.embeddings import (
    embedding_metadata,
    token_file_stems,
    write_embeddings,
    write_token_files,
)
from trainer.export.facts import TrainingFacts
from trainer.export.readers import metadata_of
from trainer.export.verify import Check, WrittenFile, nothing_learnt

TOKENS = {"TOK": ("<s0>", "<s1>"), "TOK1": ("<s2>", "<s3>")}
FACTS = TrainingFacts(
    output_name="astronaut",
    base_model="owner/base",
    tokens=TOKENS,
    settings={"ti_pooling": "eos"},
)
WIDTHS = {"sd15": {"text_encoder": 32}, "sdxl": {"text_encoder": 32, "text_encoder_2": 48}}


def vectors(family: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        component: 0.02 * torch.randn(4, width, generator=generator)
        for component, width in WIDTHS[family].items()
    }


def write_all(folder: Path, family: str) -> list[WrittenFile]:
    written = write_token_files(folder, vectors(family), TABLES[family], FACTS)
    return [WrittenFile(*each) for each in written]


def check(folder: Path, files: list[WrittenFile], adapter: TrainedAdapter) -> list[Check]:
    return run_checks(folder, files, adapter)[0]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_every_reader_gets_every_row_of_every_file(
    family: str, trained: Callable[..., TrainedAdapter], tmp_path: Path
) -> None:
    files = write_all(tmp_path, family)

    checks = check(tmp_path, files, trained(family))

    assert [(c.path, c.role) for c in checks[::2]] == [
        ("astronaut_emb.safetensors", "embeddings"),
        ("astronaut_TOK.safetensors", "token_embedding"),
        ("astronaut_TOK1.safetensors", "token_embedding"),
    ]
    assert [(c.reader, c.status) for c in checks] == [
        ("diffusers", "passed"),
        ("formula", "passed"),
    ] * 3
    assert all(c.largest_difference == 0 for c in checks)
    assert all(c.keys_matched == c.keys_total == len(WIDTHS[family]) for c in checks)
    # What the vectors were before training is not known here.
    assert not nothing_learnt(checks)


def test_the_combined_file_has_all_rows_and_each_identifiers_file_its_own(tmp_path: Path) -> None:
    rows = vectors("sdxl")

    write_all(tmp_path, "sdxl")

    combined, second = (
        load_file(tmp_path / f"astronaut_{name}.safetensors") for name in ("emb", "TOK1")
    )
    assert combined.keys() == second.keys() == {"clip_l", "clip_g"}
    assert torch.equal(combined["clip_l"], rows["text_encoder"])
    assert torch.equal(combined["clip_g"], rows["text_encoder_2"])
    assert torch.equal(second["clip_g"], rows["text_encoder_2"][2:])
    assert {tensor.dtype for tensor in combined.values()} == {torch.float32}


def test_a_family_of_one_text_encoder_has_one_tensor(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "a", {"text_encoder": torch.ones(2, 8).half()}, SD15, {})

    tensors = load_file(tmp_path / "a")

    assert {key: (t.shape, t.dtype) for key, t in tensors.items()} == {
        "clip_l": ((2, 8), torch.float32)
    }


def test_an_encoder_without_a_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="text_encoder_2"):
        write_embeddings(tmp_path / "a", {"text_encoder_2": torch.ones(2, 8)}, SD15, {})


def test_rows_that_do_not_fit_the_tokens_are_refused(tmp_path: Path) -> None:
    rows = {"text_encoder": torch.ones(3, 32)}

    with pytest.raises(ValueError, match="4 tokens"):
        list(write_token_files(tmp_path, rows, SD15, FACTS))


def test_the_header_names_tokens_base_model_and_pooling_and_no_time(tmp_path: Path) -> None:
    write_all(tmp_path, "sd15")

    header = metadata_of(tmp_path / "astronaut_TOK1.safetensors")

    assert json.loads(header["tokens"]) == ["<s2>", "<s3>"]
    assert json.loads(header["identifiers"]) == {"TOK1": ["<s2>", "<s3>"]}
    assert header["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    assert (header["ss_base_model_version"], header["ti_pooling"]) == ("sd_v1", "eos")
    assert not [key for key in header if "date" in key or "time" in key]


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_all(tmp_path / name, "sdxl")

    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


def test_file_names_can_stand_in_a_prompt_and_collide_with_no_other_file() -> None:
    names = ("TOK", "tok", "a b", "a/b", "emb", "comfyui")
    facts = replace(FACTS, tokens={name: ("<s0>",) for name in names})

    stems = token_file_stems(facts)

    assert list(stems.values()) == [
        "astronaut_TOK",
        "astronaut_tok_2",
        "astronaut_a_b",
        "astronaut_a_b_2",
        "astronaut_emb_2",
        "astronaut_comfyui_2",
    ]


def scaled(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    tensors |= {key: rows * 1.001 for key, rows in tensors.items()}


def with_a_missing_row(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    tensors |= {key: rows[:-1] for key, rows in tensors.items()}


def with_swapped_rows(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    tensors |= {key: rows.flip(0) for key, rows in tensors.items()}


def with_nan(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    tensors["clip_l"][0, 0] = float("nan")


def rekeyed(old: str, new: str) -> Change:
    def change(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
        tensors[new] = tensors.pop(old)

    return change


def with_swapped_keys(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    tensors["clip_l"], tensors["clip_g"] = tensors["clip_g"], tensors["clip_l"]


def without_the_second_encoder(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    del tensors["clip_g"]


def with_a_further_key(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    tensors["t5xxl"] = torch.ones(4, 8)


def with_swapped_tokens(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    header["tokens"] = json.dumps(json.loads(header["tokens"])[::-1])


def without_header(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    header.clear()


BROKEN: list[tuple[str, Change]] = [
    *((family, scaled) for family in WIDTHS),
    *((family, with_a_missing_row) for family in WIDTHS),
    *((family, with_swapped_rows) for family in WIDTHS),
    *((family, with_nan) for family in WIDTHS),
    *((family, without_header) for family in WIDTHS),
    *((family, with_swapped_tokens) for family in WIDTHS),
    ("sd15", rekeyed("clip_l", "emb_params")),
    ("sd15", rekeyed("clip_l", "clip_g")),
    ("sd15", with_a_further_key),
    ("sdxl", rekeyed("clip_g", "t5xxl")),
    ("sdxl", with_swapped_keys),
    ("sdxl", without_the_second_encoder),
    ("sdxl", with_a_further_key),
]


@pytest.mark.parametrize(("family", "change"), BROKEN)
@pytest.mark.parametrize("number", [0, 2], ids=["all tokens", "one identifier"])
def test_a_broken_file_fails_with_every_reader(
    number: int,
    family: str,
    change: Change,
    trained: Callable[..., TrainedAdapter],
    tmp_path: Path,
) -> None:
    file = write_all(tmp_path, family)[number]
    rewrite(file.path, change)

    checks = check(tmp_path, [file], trained(family))

    assert [c.status for c in checks] == ["failed", "failed"]
    assert all(c.reason for c in checks)


def test_a_token_that_the_base_model_knows_already_fails(
    trained: Callable[..., TrainedAdapter], tmp_path: Path
) -> None:
    # A letter of the base model's own vocabulary: loading would overwrite its row.
    known = replace(FACTS, tokens={"TOK": ("<s0>", "a</w>")})
    rows = {"text_encoder": torch.ones(2, 32)}
    path = tmp_path / "a.safetensors"
    write_embeddings(path, rows, SD15, embedding_metadata(known, SD15, ("TOK",)))
    holds = {"text_encoder": {"<s0>": torch.ones(32), "a</w>": torch.ones(32)}}

    checks = check(tmp_path, [WrittenFile("embeddings", path, holds)], trained("sd15"))

    assert ("diffusers", "failed") in {(c.reader, c.status) for c in checks}


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_prompt_with_the_tokens_reaches_the_rows(
    family: str, trained: Callable[..., TrainedAdapter], tmp_path: Path
) -> None:
    write_all(tmp_path, family)
    pipeline, rows = trained(family).fresh(), vectors(family)
    tensors = load_file(tmp_path / "astronaut_emb.safetensors")

    for component, key in TABLES[family].embedding_keys.items():
        encoder = pipeline.components[component]
        tokenizer = pipeline.components[component.replace("text_encoder", "tokenizer")]
        tokens = [token for each in TOKENS.values() for token in each]
        pipeline.load_textual_inversion(
            tensors[key], token=tokens, text_encoder=encoder, tokenizer=tokenizer
        )
        ids = tokenizer("x <s2><s3>", add_special_tokens=False).input_ids[-2:]
        found = encoder.get_input_embeddings().weight[ids]
        assert torch.equal(found, rows[component][2:])
