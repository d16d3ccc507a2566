"""Encodings on disk: when they are read, when they are made again, and that both are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from grid import grid_examples, plan_of
from tiny import compose, configuration, losses, never

from trainer import base_model, encoded, encoding
from trainer.base_model import Precision
from trainer.config import DataConfig, ModelConfig
from trainer.data.dataset import Dataset
from trainer.data.store import Store
from trainer.encoded import Shelf, shelf_of_captions, shelf_of_pictures
from trainer.encoding import Text, encode_pictures
from trainer.events import Event
from trainer.families.base import Family
from trainer.job import RunFolder
from trainer.processes import ALONE, Processes
from trainer.resident import Pictures

CPU = torch.device("cpu")
FULL = Precision(*[torch.float32] * 4)
CAPTIONS = ("a TOK", "a man")
TENSORS = {"mean": torch.arange(4.0), "std": torch.ones(2, dtype=torch.bfloat16)}
# What a shelf's key would be lost on, one change each.
CHANGES: dict[str, tuple[Callable[[Any], object], set[str]]] = {
    "a weight of the VAE": (
        lambda p: p.vae.quant_conv.weight.data.add_(1),
        {"picture"},
    ),
    "the scale of latents": (
        lambda p: p.vae.register_to_config(scaling_factor=0.5),
        {"picture"},
    ),
    "a weight of a text encoder": (
        lambda p: p.text_encoder.get_input_embeddings().weight.data.add_(1),
        {"caption"},
    ),
    "a word of the tokenizer": (lambda p: p.tokenizer.add_tokens(["<new>"]), {"caption"}),
    "a weight of the denoiser": (lambda p: p.unet.conv_in.weight.data.add_(1), set()),
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def family(sd15_folder: Path) -> Family:
    return base_model.load(base_model.locate(ModelConfig(model_url=str(sd15_folder))), FULL)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What encoders were asked to do, in words."""
    done: list[str] = []
    encode, encode_caption = encoding.encode, Text._encode_to_keep

    def picture(family: Family, pixels: torch.Tensor) -> Any:
        done.append("picture")
        return encode(family, pixels)

    def caption(self: Text, caption: str) -> Any:
        done.append(caption)
        return encode_caption(self, caption)

    monkeypatch.setattr(encoding, "encode", picture)
    monkeypatch.setattr(Text, "_encode_to_keep", caption)
    return done


def dataset_of(folder: Path, **options: object) -> Dataset:
    examples = grid_examples(folder, 2, height=80, width=100)
    return Dataset(examples, plan_of(2), DataConfig(**options), with_pixels=False)


def value_of(stage: Iterator[Event]) -> Any:
    while True:
        try:
            next(stage)
        except StopIteration as end:
            return end.value


def pictures_of(
    family: Family, folder: Path, processes: Processes = ALONE, **options: object
) -> Pictures:
    shelf = shelf_of_pictures(family, CPU)
    return value_of(encode_pictures(family, dataset_of(folder, **options), CPU, processes, shelf))


def text_of(family: Family, captions: Sequence[str] = CAPTIONS) -> Text:
    shelf = shelf_of_captions(family, CPU)
    text = Text(family, captions, None, CPU, shelf=shelf)
    list(text.keep())
    return text


def test_a_second_training_encodes_nothing_and_learns_the_same_to_the_bit(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path, work: list[str]
) -> None:
    config = configuration(
        sd15_folder,
        photo_folder,
        random_flip=True,
        resolution_width=64,
        resolution_height=64,
        target_unet_modules=["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"],
        max_train_steps=2,
    )
    learnt, encodings, contents, unread = [], [], [], []
    for run in ("first", "second"):
        training, events = compose(config, tmp_path / run)
        events += training.steps(RunFolder(tmp_path / run), never)
        learnt.append(training.trainables.tensors()["unet"])
        encodings.append(len(work))
        contents.append(training.base_contents)
        unread.append(set(training.family.unread.models))
        assert len(losses(events)) == 2

    # Five photographs and their mirror images, two captions.
    assert encodings == [12, 12]
    assert unread == [set(), {"text_encoder", "vae"}]
    assert contents[0] == contents[1]
    first, second = learnt
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_encoders_stay_where_they_are_when_nothing_is_to_be_encoded(
    family: Family, sd15_folder: Path, tmp_path: Path
) -> None:
    pictures_of(family, tmp_path / "one")
    text_of(family)
    again = base_model.load(base_model.locate(ModelConfig(model_url=str(sd15_folder))), FULL)

    def moves(*_: Any) -> None:
        raise AssertionError("is moved")

    shelves = shelf_of_pictures(again, CPU), shelf_of_captions(again, CPU)
    again.pipeline.vae.to = moves
    text = Text(again, CAPTIONS, None, torch.device("meta"), shelf=shelves[1])

    value_of(encode_pictures(again, dataset_of(tmp_path / "two"), CPU, ALONE, shelves[0]))
    value_of(text.keep())
    assert not text.is_live


@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_an_encoding_is_part_of_its_key_and_nothing_else(
    family: Family, change: str
) -> None:
    make, lost = CHANGES[change]
    shelf_of_pictures(family, CPU).put("view", TENSORS)
    shelf_of_captions(family, CPU).put("words", TENSORS)

    make(family.pipeline)

    found = {
        "picture": shelf_of_pictures(family, CPU).get("view"),
        "caption": shelf_of_captions(family, CPU).get("words"),
    }
    assert {kind for kind, tensors in found.items() if tensors is None} == lost


def test_captions_of_another_length_have_a_key_of_their_own(flux_folder: Path) -> None:
    base = base_model.locate(ModelConfig(model_url=str(flux_folder)))
    family = base_model.load(base, FULL, without=("transformer", "vae"))
    shelf_of_captions(family, CPU).put("words", TENSORS)
    assert shelf_of_captions(family, CPU).get("words") is not None

    family.max_sequence_length = 64

    assert shelf_of_captions(family, CPU).get("words") is None


def test_the_same_weights_in_another_number_format_have_a_key_of_their_own(
    family: Family,
) -> None:
    family.pipeline.vae.to(torch.bfloat16)
    shelf_of_pictures(family, CPU).put("view", TENSORS)

    family.pipeline.vae.to(torch.float32)

    assert shelf_of_pictures(family, CPU).get("view") is None


def test_arithmetic_that_changes_the_last_bits_is_part_of_the_key(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf_of_pictures(family, CPU).put("view", TENSORS)

    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)

    assert shelf_of_pictures(family, CPU).get("view") is None


def test_a_picture_shown_otherwise_is_encoded_anew(
    family: Family, sd15_folder: Path, tmp_path: Path, work: list[str]
) -> None:
    pictures_of(family, tmp_path / "pictures")
    work.clear()
    for options, made in (({}, 0), ({"random_flip": True}, 2), ({"random_rotation_end": 3}, 2)):
        turned = {"random_rotation_start": 3} if "random_rotation_end" in options else {}
        again = base_model.load(base_model.locate(ModelConfig(model_url=str(sd15_folder))), FULL)
        pictures_of(again, tmp_path / "pictures", **options, **turned)
        assert len(work) == made
        work.clear()


def test_an_encoding_is_the_same_to_the_bit_after_reading(tmp_path: Path) -> None:
    shelf = Shelf(Store(tmp_path / "store"), "picture", {})

    shelf.put([1, "a"], TENSORS)

    found = shelf.get([1, "a"])
    assert found is not None
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("content", [b"", b"no tensors"])
def test_an_entry_that_holds_no_tensors_is_as_none(tmp_path: Path, content: bytes) -> None:
    store = Store(tmp_path / "store")
    shelf = Shelf(store, "picture", {})

    store.put(shelf._key("view"), content)

    assert shelf.get("view") is None


def test_damaged_encodings_are_made_again(
    family: Family, sd15_folder: Path, tmp_path: Path, home: Path, work: list[str]
) -> None:
    first = pictures_of(family, tmp_path / "pictures")
    entries = [path for path in home.rglob("encodings/*/*") if path.is_file()]
    assert len(entries) == 2
    for path in entries:
        path.write_bytes(path.read_bytes()[:-1])
    again = base_model.load(base_model.locate(ModelConfig(model_url=str(sd15_folder))), FULL)

    second = pictures_of(again, tmp_path / "pictures")

    assert work == ["picture"] * 4
    rows = torch.arange(2)
    for name, tensor in first.at((64, 64), rows).items():
        assert torch.equal(tensor, second.at((64, 64), rows)[name])


def test_a_cache_folder_that_cannot_be_written_costs_time_only(
    family: Family, tmp_path: Path, home: Path
) -> None:
    home.write_text("no folder")

    assert pictures_of(family, tmp_path / "pictures").rows_of([(1, False)]) == [1]


@pytest.mark.parametrize(
    "leaves",
    [
        {"train_text_encoder_ti": True, "instance_prompt": "a TOK"},
        {"train_text_encoder": True, "train_text_encoder_frac": 0.5},
    ],
)
def test_captions_of_encoders_that_learn_are_not_kept(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path, home: Path, leaves: dict[str, Any]
) -> None:
    config = configuration(
        sd15_folder,
        photo_folder,
        resolution_width=64,
        resolution_height=64,
        cache_latents=False,
        target_unet_modules=["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"],
        **leaves,
    )
    training, _ = compose(config, tmp_path / "run")

    assert not training.family.unread.models
    list(training.text.keep())

    assert not training.text.is_live
    assert not (home / "tok-trainer" / "encodings").exists()


class OneOfTwo(Processes):
    """One of two processes, which does what the other would do too."""

    def __init__(self, index: int) -> None:
        super().__init__(index, 2)
        self.asked: list[Sequence[Any]] = []

    def shared(self, items: Sequence[Any], work: Callable[[Any], Any]) -> Iterator[tuple[Any, Any]]:
        self.asked.append(items)
        return super().shared(items, work)


@pytest.mark.parametrize("index", [0, 1])
def test_the_main_process_reads_and_writes_for_all_and_they_share_what_is_lacking(
    family: Family, sd15_folder: Path, tmp_path: Path, home: Path, index: int
) -> None:
    pictures_of(family, tmp_path / "pictures")
    next(path for path in home.rglob("encodings/*/*") if path.is_file()).unlink()
    again = base_model.load(base_model.locate(ModelConfig(model_url=str(sd15_folder))), FULL)
    processes = OneOfTwo(index)

    pictures_of(again, tmp_path / "pictures", processes)

    reading, making = processes.asked
    assert reading == [((0, False), (1, False))]
    assert len(making) == 1
    assert len([path for path in home.rglob("encodings/*/*") if path.is_file()]) == 2 - index


def test_all_encodings_together_are_kept_within_a_limit(
    family: Family, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled = encoded.store_of_encodings()
    for number in range(200):
        filled.put(f"{number:064d}", bytes(1000))
    # So much that what is put beside them, some kB, is not looked through for its own sake.
    monkeypatch.setattr(encoded, "MAX_BYTES", 200_000)

    pictures_of(family, tmp_path / "pictures")

    entries = [path for path in home.rglob("encodings/*/*") if path.is_file()]
    assert 190_000 < sum(path.stat().st_size for path in entries) <= 200_000
