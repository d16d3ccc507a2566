"""Finds the caption of every picture, and asks whether captions name what is to be learned.

Captions are in a file that the user names, in `metadata.jsonl` or text files among the pictures,
or in the name of a folder. A caption that the user wrote is never changed, unless the user wants
the trigger in front.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from trainer.config import DataConfig, Note, TokenConfig
from trainer.errors import InputError
from trainer.folder_names import kohya_folder
from trainer.locations import shown_location
from trainer.sections.subjects import words
from trainer.sources.archive import FIELD as PICTURES
from trainer.sources.archive import BadEntry, Entry, Source
from trainer.sources.caption_files import Table, listed, read_table, read_texts
from trainer.sources.location import MAX_CAPTIONS_BYTES, read_captions_file

__all__ = [
    "METADATA",
    "PLACEHOLDER",
    "Caption",
    "Origin",
    "find_captions",
    "listed",
]

Origin = Literal["file", "metadata", "txt", "folder", "generated", "instance_prompt"]

# The name of Hugging Face's imagefolder for a table of captions among the pictures.
METADATA = "metadata.jsonl"
# How other programs write the place of the trigger in a caption.
PLACEHOLDER = "[trigger]"

_OWN: frozenset[Origin] = frozenset(("file", "metadata", "txt", "folder"))


@dataclass(frozen=True)
class Caption:
    """A picture's caption and where it comes from."""

    text: str
    origin: Origin


def find_captions(
    source: Source,
    names: Sequence[str],
    data: DataConfig,
    *,
    trigger: str | None = None,
    identifiers: Sequence[str] = (),
    add_trigger: bool = False,
    captions_file: Path | None = None,
) -> tuple[dict[str, Caption], list[Note]]:
    """The caption of every picture, and what the user should know of them.

    A captions file goes before `metadata.jsonl`, that before a text file, that before kohya's
    folder name, and that before the instance prompt. An empty caption counts as none.

    Args:
        source: where the other files are looked for.
        names: the pictures' names in the source.
        data: the section that names the captions file, its column and the instance prompt.
        trigger: the word that captions should have. None: it is not asked for.
        identifiers: words that do as well.
        add_trigger: whether captions of the user's own without it get it in front.
        captions_file: where the content of a web address was written; required for one.

    Raises:
        InputError: a captions file is unusable.
    """
    folders = {name: kohya_folder(name) for name in names}
    found = {n: Caption(f.caption, "folder") for n, f in folders.items() if f is not None}
    texts, notes = read_texts(source, names)
    rows, notes_on_rows = _read_tables(source, names, data, captions_file)
    notes += notes_on_rows
    other = [name for name in texts if name in rows and rows[name].text.strip() != texts[name]]
    if other:
        message = (
            f"text files give these pictures other captions, which are not used: {listed(other)}"
        )
        notes.append(_warning(PICTURES, message))
    found |= {name: Caption(text, "txt") for name, text in texts.items()} | rows
    without = [name for name in names if name not in found]
    if without and found and data.skip_caption_generation:
        message = f"{len(without)} of {len(names)} pictures have no caption of their own and get "
        notes.append(_warning("instance_prompt", f"{message}this one: {listed(without)}"))
    prompt = Caption(data.instance_prompt, "instance_prompt")
    captions = {name: found.get(name, prompt) for name in names}
    if trigger is not None:
        asked = _Trigger(trigger, (trigger, *identifiers))
        captions, note = asked.put_into(captions) if add_trigger else asked.looked_for(captions)
        notes += note
    return captions, notes


def _warning(field: str, message: str) -> Note:
    return Note(kind="warning", field=field, message=message)


def _read_tables(
    source: Source, names: Sequence[str], data: DataConfig, captions_file: Path | None
) -> tuple[dict[str, Caption], list[Note]]:
    """Captions in the captions file, or else in every `metadata.jsonl` among the pictures."""
    if data.captions_file_url is not None:
        table = Table(shown_location(data.captions_file_url), data.caption_column)
        content = read_captions_file(data.captions_file_url, captions_file)
        texts, notes = read_table(content, table, names)
        return {name: Caption(text, "file") for name, text in texts.items()}, notes
    tables = [e for e in source.entries() if PurePosixPath(e.name).name == METADATA]
    if not tables and data.caption_column != DataConfig().caption_column:
        message = f"there is no captions_file_url, and no `{METADATA}` among the pictures"
        return {}, [Note(kind="ignored", field="caption_column", message=message)]
    captions: dict[str, Caption] = {}
    notes = []
    # Of two that speak of one picture, the nearer one is right.
    for entry in sorted(tables, key=lambda entry: entry.name.count("/")):
        folder = entry.name.rpartition("/")[0]
        below = [name for name in names if not folder or name.startswith(f"{folder}/")]
        table = Table(entry.name, data.caption_column, folder)
        texts, notes_on_rows = read_table(_metadata(source, entry, table), table, below)
        captions |= {name: Caption(text, "metadata") for name, text in texts.items()}
        notes += notes_on_rows
    return captions, notes


def _metadata(source: Source, entry: Entry, table: Table) -> bytes:
    """The content of a `metadata.jsonl`.

    Raises:
        InputError: it is too large or damaged.
    """
    if entry.size > MAX_CAPTIONS_BYTES:
        message = f"`{entry.name}` is larger than {MAX_CAPTIONS_BYTES >> 20} MiB"
        raise InputError([table.problem(message, "keep the rows of the pictures alone")])
    try:
        return source.read(entry.name)
    except BadEntry as error:
        message = f"`{entry.name}` cannot be used: {error}"
        raise InputError([table.problem(message, "pack or save it again")]) from error


@dataclass(frozen=True)
class _Trigger:
    """The word that captions of the user's own should have.

    Args:
        word: the one to add.
        all_words: any of them will do.
    """

    word: str
    all_words: tuple[str, ...]

    def put_into(self, captions: Mapping[str, Caption]) -> tuple[dict[str, Caption], list[Note]]:
        """The captions with the word wherever it was missing, and to how many that was done."""
        own, lacking = self._own_and_lacking(captions)
        if not lacking:
            return dict(captions), []
        added = {n: replace(captions[n], text=self._added_to(captions[n].text)) for n in lacking}
        message = f"`{self.word}` is put into {len(lacking)} of {len(own)} captions that lack it: "
        return {**captions, **added}, [_warning("add_trigger", message + listed(lacking))]

    def looked_for(self, captions: Mapping[str, Caption]) -> tuple[dict[str, Caption], list[Note]]:
        """The captions as they are, and a warning where some lack a word that others have.

        Where none has it in any letter case, a name that somebody chose was surely meant; one
        that nobody chose is perhaps not wanted.
        """
        own, lacking = self._own_and_lacking(captions)
        loose = re.compile(words(self.all_words).pattern, re.IGNORECASE)
        is_meant = not self._is_nobodys_choice() or any(
            loose.search(caption.text) or PLACEHOLDER in caption.text
            for caption in captions.values()
        )
        if not lacking or not is_meant:
            return dict(captions), []
        texts = [captions[name].text for name in lacking]
        odd = {
            "in other letter case": sum(loose.search(text) is not None for text in texts),
            f"as `{PLACEHOLDER}`, which stands for nothing here": sum(
                PLACEHOLDER in text for text in texts
            ),
        }
        details = ", ".join(f"{count} have it {how}" for how, count in odd.items() if count)
        message = f"{len(lacking)} of {len(own)} captions do not have the word `{self.word}`"
        message += f" ({details})" if details else ""
        message += ", so their pictures do not teach it; write it into them, or set "
        message += f"`add_trigger: true`: {listed(lacking)}"
        return dict(captions), [_warning("token_abstraction", message)]

    def _own_and_lacking(self, captions: Mapping[str, Caption]) -> tuple[list[str], list[str]]:
        """The pictures with captions of the user's own, and those of them without any word."""
        own = [name for name, caption in captions.items() if caption.origin in _OWN]
        pattern = words(self.all_words)
        return own, [name for name in own if not pattern.search(captions[name].text)]

    def _added_to(self, text: str) -> str:
        if PLACEHOLDER in text:
            return text.replace(PLACEHOLDER, self.word)
        return f"{self.word}, {text}"

    def _is_nobodys_choice(self) -> bool:
        """Whether it is the default identifier, or one with a number after it."""
        default = TokenConfig().token_abstraction[0]
        return re.fullmatch(rf"{re.escape(default)}\d*", self.word) is not None
