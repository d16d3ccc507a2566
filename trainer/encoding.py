"""Captions as conditioning and pictures as latents.

Each caption is encoded once for all its uses in a batch, and for good once no text encoder and no
new token learns any more; a picture is encoded by itself, so that its latents do not depend on
what else is in the data set. What encoders that do not learn make is kept on disk for the next
training, which reads no encoder that it has no work for. Encoders that have done their work are
given up.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, TypeVar

import torch

from trainer.config import TokenConfig
from trainer.data.dataset import Batch, Dataset, View
from trainer.encoded import Shelf, Tensors
from trainer.errors import NonFiniteError
from trainer.events import Event, NoteEvent, StageEvent
from trainer.families.base import (
    Conditioning,
    Family,
    LatentDistribution,
    adapted_encoders,
    token_encoders,
)
from trainer.names import tokenizer_name
from trainer.processes import ALONE, Processes
from trainer.resident import Pictures, Rows, StepInputs, Where, flat_geometry
from trainer.rules.ordinary import is_ordinary
from trainer.tokens import TokenNames
from trainer.transfers import moved

Item = TypeVar("Item")

# What stands for a caption in a template.
_MARK = "caption"
# Characters of a caption that a message shows.
_SHOWN = 40


class Text:
    """The conditioning of captions, computed in each step while it may change, else kept.

    Args:
        family: with its text encoders.
        captions: every caption that a step may ask for, as the user wrote it.
        names: of the new tokens in them, if there are any.
        device: of the text encoders while they are needed.
        autocast: makes the context that sets the number formats of encoding.
        processes: those that share the encoding of what is kept.
        shelf: what the encoders, in which nothing learns, made in earlier trainings. None: they
            do learn, and are needed from the start.
        lends: give an only caption that is kept as one row, as often as the batch has examples
            (stride 0). Layers that know it compute it once; others copy it, each for itself.
    """

    def __init__(
        self,
        family: Family,
        captions: Sequence[str],
        names: TokenNames | None,
        device: torch.device,
        *,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        processes: Processes = ALONE,
        shelf: Shelf | None = None,
        lends: bool = False,
    ) -> None:
        self._family = family
        self._captions = tuple(dict.fromkeys(captions))
        self._names = names
        self._device = device
        self._autocast = autocast
        self._processes = processes
        self._shelf = shelf
        self._lends = lends and len(self._captions) == 1
        self._kept: Rows | None = None
        if shelf is None:
            self._move_encoders()

    def add(self, texts: Sequence[str]) -> None:
        """Takes in further texts, which are asked for between steps, before any are kept."""
        assert self._kept is None
        self._captions = tuple(dict.fromkeys((*self._captions, *texts)))

    @property
    def is_live(self) -> bool:
        """Whether captions are still encoded in each step."""
        return self._kept is None

    def of(self, captions: Sequence[str]) -> Conditioning:
        """The conditioning of a batch, in the order of its captions; differentiable while live."""
        if self._kept is not None:
            return self.at(torch.tensor(self.rows_of(captions)))
        unique = list(dict.fromkeys(captions))
        rows = moved(torch.tensor([unique.index(caption) for caption in captions]), self._device)
        with self._autocast():
            conditioning = self._encode(unique)
        return {name: states.index_select(0, rows) for name, states in conditioning.items()}

    def keep(self) -> Generator[Event, None, None]:
        """Encodes every caption once and for all, and gives up the text encoders.

        Raises:
            NonFiniteError: a text encoder overflows.
        """
        kept = yield from _kept(
            "encode captions",
            self._captions,
            self._encode_to_keep,
            ingredients=str,
            shelf=self._shelf,
            processes=self._processes,
            prepare=self._move_encoders,
        )
        rows = [kept[caption] for caption in self._captions]
        columns = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        self._kept = Rows(columns, self._device)
        self._places = {caption: row for row, caption in enumerate(self._captions)}
        # Trained ones are held elsewhere, and read again when the result is written.
        trained = {*adapted_encoders(self._family), *token_encoders(self._family)}
        for name in trained - self._family.unread.models.keys():
            self._family.pipeline.components[name].to("cpu")
        self._family.pipeline.register_modules(**dict.fromkeys(self._family.text_encoder_names))

    @property
    def resident(self) -> bool:
        """Whether all conditioning is kept, and on the device."""
        return self._kept is not None and self._kept.resident

    def rows_of(self, captions: Sequence[str]) -> list[int]:
        """The rows of captions among those that are kept."""
        return [self._places[caption] for caption in captions]

    def at(self, rows: torch.Tensor) -> Conditioning:
        """The conditioning that is kept in these rows, see `Rows.at`."""
        assert self._kept is not None
        if not self._lends:
            return self._kept.at(rows)
        only = self._kept.at(rows[:1])
        return {name: row.expand(len(rows), *row.shape[1:]) for name, row in only.items()}

    def _encode_to_keep(self, caption: str) -> Conditioning:
        with torch.no_grad(), self._autocast():
            conditioning = self._encode([caption])
        if not all(bool(states.isfinite().all()) for states in conditioning.values()):
            raise NonFiniteError(
                f"a text encoder gives no finite states for `{_start_of(caption)}`",
                "set mixed_precision: bf16 or no",
            )
        return {name: states.cpu() for name, states in conditioning.items()}

    def _encode(self, captions: Sequence[str]) -> Conditioning:
        names = self._names
        return self._family.encode_text([names.replaced(c) if names else c for c in captions])

    def _move_encoders(self) -> None:
        self._family.unread.have(*self._family.text_encoder_names)
        for name in self._family.text_encoder_names:
            self._family.pipeline.components[name].to(self._device)


class Encodings:
    """What captions and pictures are to the denoiser: the one place that a step's inputs come from.

    Args:
        family: with its VAE where pictures are encoded in each step.
        text: the conditioning of the captions.
        pictures: encoded pictures, or nothing where they are encoded in each step.
        device: where inputs are needed.
    """

    def __init__(
        self, family: Family, text: Text, pictures: Pictures | None, device: torch.device
    ) -> None:
        self._family = family
        self.text = text
        self.pictures = pictures
        self._device = device

    @property
    def resident(self) -> bool:
        """Whether all inputs lie on the device, so that a step only says where."""
        return self.text.resident and self.pictures is not None and self.pictures.resident

    def inputs(self, batch: Batch) -> StepInputs:
        """What a forward pass of a batch is given; differentiable while the text is live."""
        if self.pictures is not None and not self.text.is_live:
            return self.at(self.where(batch))
        shown = self._encoded(batch) if self.pictures is None else self._read(batch)
        text = self.text.of(batch.captions)
        return StepInputs.of(shown, text, moved(batch.weights, self._device))

    def shown(self, batch: Batch) -> StepInputs | Where:
        """A batch's inputs, or where they lie, if all of them are kept."""
        if self.pictures is not None and not self.text.is_live:
            return self.where(batch)
        return self.inputs(batch)

    def latents_shape(self, shown: StepInputs | Where) -> torch.Size:
        """The shape (C, h, w) of one example's latents."""
        if isinstance(shown, StepInputs):
            return shown.mean.shape[1:]
        assert self.pictures is not None
        return self.pictures.latents_shape(shown.size)

    def where(self, batch: Batch) -> Where:
        """Where the inputs of a batch lie, pictures and text being kept."""
        assert self.pictures is not None
        rows = [self.pictures.rows_of(batch.views), self.text.rows_of(batch.captions)]
        places, shares = torch.tensor(rows), batch.weights
        if self.resident:
            places = moved(places, self._device)
        return Where(batch.size, places, moved(shares, self._device))

    def at(self, where: Where) -> StepInputs:
        """The inputs that lie there; where all are resident, by nothing but work of the device."""
        assert self.pictures is not None
        pictures, captions = where.rows
        shown = self.pictures.at(where.size, pictures)
        return StepInputs.of(shown, self.text.at(captions), where.shares)

    def _read(self, batch: Batch) -> Tensors:
        assert self.pictures is not None
        rows = torch.tensor(self.pictures.rows_of(batch.views))
        return self.pictures.at(batch.size, rows)

    def _encoded(self, batch: Batch) -> Tensors:
        assert batch.pixels is not None
        latents = encode(self._family, moved(batch.pixels, self._device))
        facts = {"is_class": batch.is_class, **flat_geometry(batch.geometry)}
        if batch.masks is not None:
            facts["mask"] = batch.masks
        on_device = {name: moved(fact, self._device) for name, fact in facts.items()}
        return {"mean": latents.mean, "std": latents.std, **on_device}


def tokenizer_of(family: Family, text_encoder: str) -> Any:
    """The tokenizer beside a text encoder."""
    return family.pipeline.components[tokenizer_name(text_encoder)]


def cut_captions(
    family: Family, captions: Sequence[str], names: TokenNames | None, instance_prompt: str
) -> list[NoteEvent]:
    """What the user should know of captions longer than a tokenizer's limit: they are cut there."""
    ends = {caption: cut_off(family, caption, names) for caption in captions}
    return [_cut_caption(c, rest, instance_prompt) for c, rest in ends.items() if rest]


def cut_off(family: Family, caption: str, names: TokenNames | None) -> str:
    """The end of a caption that no text encoder of the family sees, or nothing."""
    ends: list[str] = []
    text = names.replaced(caption) if names else caption
    for text_encoder in family.text_encoder_names:
        tokenizer = tokenizer_of(family, text_encoder)
        tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        is_told = text_encoder == family.checkpoints.language_model
        length = family.max_sequence_length if is_told else tokenizer.model_max_length
        room = length - tokenizer.num_special_tokens_to_add() - _tokens_before(tokenizer)
        ends.append(tokenizer.decode(tokens[room:]).strip())
    return min(ends, key=len)


def _tokens_before(tokenizer: Any) -> int:
    """Tokens with which the template of a language model begins, in front of every caption."""
    if tokenizer.chat_template is None:
        return 0
    marked = tokenizer.apply_chat_template(
        [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
    )
    before, _, _ = marked.partition(_MARK)
    return len(tokenizer(before, add_special_tokens=False).input_ids)


def _cut_caption(caption: str, rest: str, instance_prompt: str) -> NoteEvent:
    field = "instance_prompt" if caption == instance_prompt else "captions_file_url"
    start = _start_of(caption)
    message = f"the caption `{start}` is too long for the text encoder, which never sees: `{rest}`"
    return NoteEvent("warning", field, message)


def _start_of(caption: str) -> str:
    """As much of a caption as a message shows."""
    return caption if len(caption) <= _SHOWN else f"{caption[:_SHOWN].rstrip()} …"


def common_identifiers(family: Family, identifiers: Sequence[str]) -> list[NoteEvent]:
    """Warnings of identifiers that a tokenizer of the family has as one of its common tokens.

    For identifiers that get no new tokens. The default one is nobody's choice, and everyday words
    are warned of without a tokenizer.
    """
    default = TokenConfig().token_abstraction
    chosen = [name for name in identifiers if name not in default and not is_ordinary(name)]
    tokenizers = [tokenizer_of(family, name) for name in family.text_encoder_names]
    return [
        NoteEvent("warning", "token_abstraction", _COMMON.format(name))
        for name in dict.fromkeys(chosen)
        if any(_is_common(name, tokenizer) for tokenizer in tokenizers)
    ]


_COMMON = (
    "`{}` is a common word to the text encoder: what it means already mixes with the subject; "
    "a made-up word such as `SIDAI` is safer"
)


def _is_common(word: str, tokenizer: Any) -> bool:
    """Whether a word is one token in the commoner half of a tokenizer's vocabulary.

    Tokenizers number their tokens from the commonest on. A rare one, such as `sks`, is what
    DreamBooth recommends as an identifier (Ruiz et al. 2023, section 3.2).
    """
    tokens = tokenizer(word, add_special_tokens=False).input_ids
    return len(tokens) == 1 and tokens[0] < len(tokenizer) / 2


def encode_pictures(
    family: Family,
    dataset: Dataset,
    device: torch.device,
    processes: Processes = ALONE,
    shelf: Shelf | None = None,
    *,
    keeps_vae: bool = False,
) -> Generator[Event, None, Pictures]:
    """Encodes every picture, and its mirror image where flips are drawn; gives up the VAE.

    Args:
        processes: those that share the work.
        shelf: what the VAE made of pictures in earlier trainings.
        keeps_vae: let it wait in the processor's memory instead.

    Raises:
        NonFiniteError: the VAE overflows on a picture.
    """

    def encoded_view(view: View) -> Tensors:
        pixels = dataset.pixels_of(*view)[None].to(device)
        latents = _checked(encode(family, pixels), dataset.examples[view[0]].name)
        return {"mean": latents.mean.cpu(), "std": latents.std.cpu()}

    def prepare() -> None:
        family.unread.have("vae")
        family.pipeline.vae.to(device)

    kept = yield from _kept(
        "encode pictures",
        dataset.all_views(),
        encoded_view,
        ingredients=lambda view: dataset.ingredients_of(*view),
        shelf=shelf,
        processes=processes,
        prepare=prepare,
    )
    if keeps_vae:
        family.unread.have("vae")
        family.pipeline.vae.to("cpu")
    else:
        family.pipeline.register_modules(vae=None)
    latents = {view: LatentDistribution(**tensors) for view, tensors in kept.items()}
    return Pictures(latents, dataset, device)


def _kept(
    stage: str,
    items: Sequence[Item],
    encode_one: Callable[[Item], Tensors],
    *,
    ingredients: Callable[[Item], Any],
    shelf: Shelf | None,
    processes: Processes,
    prepare: Callable[[], Any],
) -> Generator[Event, None, dict[Item, Tensors]]:
    """The encodings of all items: those on the shelf are read, the others made and put there.

    Args:
        ingredients: what of an item decides its encoding, as JSON can hold it.
        prepare: is called once before any is made.
    """
    kept: dict[Item, Tensors] = {}
    ingredients = cache(ingredients)

    def read(items: Sequence[Item]) -> dict[Item, Tensors]:
        found = {item: shelf.get(ingredients(item)) for item in items} if shelf is not None else {}
        return {item: tensors for item, tensors in found.items() if tensors is not None}

    # The main process reads and writes for all: others may have another cache folder.
    for _, found in processes.shared([items], read):
        for item, tensors in found.items():
            kept[item] = tensors
            yield StageEvent(stage, len(kept), len(items))
    missing = [item for item in items if item not in kept]
    if not missing:
        return kept
    prepare()
    keeping = shelf if processes.is_main else None
    for item, tensors in processes.shared(missing, encode_one):
        kept[item] = tensors
        if keeping is not None:
            keeping.put(ingredients(item), tensors)
        yield StageEvent(stage, len(kept), len(items))
    if keeping is not None:
        keeping.prune()
    return kept


def encode(family: Family, pixels: torch.Tensor) -> LatentDistribution:
    """The family's latents of pixels (B, 3, H, W) in [-1, 1], on the VAE's device."""
    with torch.no_grad():
        return family.encode_image(pixels)


def _checked(latents: LatentDistribution, name: str) -> LatentDistribution:
    """The latents of a picture of this name.

    Raises:
        NonFiniteError: the VAE overflows.
    """
    if not bool((latents.mean.isfinite() & latents.std.isfinite()).all()):
        raise NonFiniteError(
            f"the VAE gives no finite latents for `{name}`",
            "set upscale_vae_32bit: true, or give a vae_url made for half precision",
        )
    return latents
