"""Captions for pictures without one, by a model: asked once, kept in the prepared folder.

The model is loaded when it is first asked and given up after the last caption: one that answered
before stays where it is. How models are run, and what they are asked, is not known here.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from trainer.data.picture_set import PictureSet
from trainer.data.prepared import Index, Prepared, sha256_of
from trainer.data.store import Store, key_of
from trainer.durable import disk_errors, write_text
from trainer.events import Event, NoteEvent, StageEvent
from trainer.images import captioner, pretrained
from trainer.images.caption_words import finished, instruction
from trainer.images.captioner import Captioner, Unavailable
from trainer.images.findings import Remark
from trainer.sources.captions import listed

# All captions of the set, in the form that `captions_file_url` takes: to be corrected and given.
CAPTIONS = "captions.jsonl"

_USELESS = "got no usable caption; it has the instance prompt"


def check(wanted: PictureSet) -> None:
    """Refuses a captioner that cannot be had, without loading it.

    Raises:
        InputError: the user named it, and it cannot.
    """
    if wanted.of_class or wanted.data.skip_caption_generation:
        return
    # What `auto` cannot have is told where captions are missing.
    with suppress(Unavailable):
        captioner.identity_of(_choice(wanted))


def captioned(
    index: Index,
    folder: Path,
    wanted: PictureSet,
    earlier: Index,
    store: Store,
    *,
    settled: bool,
) -> Generator[Event, None, Index]:
    """The pictures with captions for those that have none, where captions are wanted.

    Where no captioner can be had, they keep the instance prompt, and a note says so.

    Args:
        index: the prepared pictures.
        folder: where they lie.
        wanted: what is wanted of them.
        earlier: what an earlier call left in the folder.
        store: what captioners wrote before.
        settled: pictures that no captioner could be had for keep the instance prompt.

    Raises:
        InputError: the captioner that the user named cannot be used.
        OutOfMemoryError: it does not fit into memory.
    """
    if wanted.of_class or wanted.data.skip_caption_generation:
        return _published(index, folder, earlier)
    without = [p for p in index.pictures if p.caption_origin == "instance_prompt"]
    work = _Captioning(folder, wanted, store, earlier, settled)
    done = {p.name: known for p in without if (known := work.known(p)) is not None}
    missing = [picture for picture in without if picture.name not in done]
    yield from (StageEvent("caption", n, len(without)) for n in range(1, len(done) + 1))
    try:
        with work.captioner_given_up():
            for picture in missing:
                done[picture.name] = work.captioned(picture)
                yield StageEvent("caption", len(done), len(without))
    except Unavailable as error:
        left = [picture for picture in without if picture.name not in done]
        done |= {picture.name: work.given_up(picture) for picture in left}
        names = listed([picture.name for picture in left])
        message = f"{error}: the instance prompt goes with {names}"
        yield NoteEvent("yielded", "skip_caption_generation", message)
    for picture in done.values():
        if picture.caption_origin == "instance_prompt" and not picture.lacks_captioner:
            yield NoteEvent("warning", "images_data_url", f"`{picture.name}` {_USELESS}")
    pictures = tuple(done.get(picture.name, picture) for picture in index.pictures)
    captions = _published(index.model_copy(update={"pictures": pictures}), folder, earlier)
    if captions.captions_sha256 != _sha256_of(folder / CAPTIONS):
        message = f"`{CAPTIONS}` was changed and is kept; to train with it, give it here"
        yield NoteEvent("warning", "captions_file_url", message)
    return captions


@dataclass
class _Captioning:
    """The work on one set of pictures; arguments as for `captioned`."""

    folder: Path
    wanted: PictureSet
    store: Store
    earlier: Index
    settled: bool
    _captioner: Captioner | None = None

    @contextmanager
    def captioner_given_up(self) -> Iterator[None]:
        """Gives the model's memory back at the end."""
        try:
            yield
        finally:
            if self._captioner is not None:
                self._captioner.close()

    def known(self, picture: Prepared) -> Prepared | None:
        """The picture as an earlier call captioned it, or found that it cannot be."""
        before = self._before.get(self._request(picture))
        if before is None or (before.lacks_captioner and not self.settled):
            return None
        if before.lacks_captioner:
            return self.given_up(picture)
        text = before.caption if before.caption_origin == "generated" else None
        return self._with(picture, text)

    def captioned(self, picture: Prepared) -> Prepared:
        """The picture with a caption, or with a remark that there is no usable one.

        Raises:
            Unavailable: no captioner can be had.
        """
        assert self.wanted.trigger is not None
        text = finished(
            self._raw(picture),
            mode=self.wanted.caption.caption_mode,
            trigger=self.wanted.trigger,
            class_word=self.wanted.class_word,
        )
        return self._with(picture, text)

    def given_up(self, picture: Prepared) -> Prepared:
        """The picture with the instance prompt, for want of a captioner."""
        update = {"captioned_by": self._request(picture), "lacks_captioner": True}
        return picture.model_copy(update=update)

    def _with(self, picture: Prepared, text: str | None) -> Prepared:
        update: dict[str, Any] = {"captioned_by": self._request(picture)}
        if text is None:
            update["remarks"] = (*picture.remarks, Remark.warning(_USELESS))
        else:
            update |= {"caption": text, "caption_origin": "generated"}
        return picture.model_copy(update=update)

    def _request(self, picture: Prepared) -> str:
        """Digest of all that a caption is asked for with."""
        wishes = {
            "picture": picture.file_sha256,
            "trigger": self.wanted.trigger,
            "class_word": self.wanted.class_word,
            "captioner": self.wanted.caption.captioner,
            "mode": self.wanted.caption.caption_mode,
        }
        return key_of("caption", wishes)

    @cached_property
    def _before(self) -> Mapping[str, Prepared]:
        return {p.captioned_by: p for p in self.earlier.pictures if p.captioned_by}

    def _raw(self, picture: Prepared) -> str:
        """What the captioner writes about a picture, now or before."""
        asked = instruction(self.wanted.caption.caption_mode)
        made_of = {"picture": picture.file_sha256, "model": self._identity, "asked": asked}
        key = key_of("raw caption", made_of)
        known = self.store.get(key)
        if known is not None:
            return known.decode()
        if self._captioner is None:
            self._captioner = captioner.load(self._choice)
        with Image.open(self.folder / picture.file) as image:
            raw = self._captioner.caption(image.convert("RGB"), asked)
        self.store.put(key, raw.encode())
        return raw

    @cached_property
    def _choice(self) -> captioner.Choice:
        return _choice(self.wanted)

    @cached_property
    def _identity(self) -> str:
        return captioner.identity_of(self._choice)


def _choice(wanted: PictureSet) -> captioner.Choice:
    return captioner.choose(
        wanted.caption,
        free_bytes=pretrained.free_bytes(),
        has_torchvision=pretrained.has_torchvision(),
        has_bitsandbytes=pretrained.has_bitsandbytes(),
    )


def _published(index: Index, folder: Path, earlier: Index) -> Index:
    """The index with the captions file beside it; one that the user changed is kept as it is."""
    path = folder / CAPTIONS
    content = ""
    if any(picture.caption_origin == "generated" for picture in index.pictures):
        rows = [{"file_name": p.name, "text": p.caption} for p in index.pictures]
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    wanted = sha256_of(content.encode()) if content else ""
    there = _sha256_of(path)
    if there in ("", earlier.captions_sha256) and there != wanted:
        if content:
            write_text(path, content)
        else:
            with disk_errors(path):
                path.unlink()
    return index.model_copy(update={"captions_sha256": wanted})


def _sha256_of(path: Path) -> str:
    """Digest of a file, empty where there is none."""
    return sha256_of(path.read_bytes()) if path.is_file() else ""
