"""Configurations of other trainers, read as ours: kohya's sd-scripts, ai-toolkit, diffusers.

One module has the table of each program. Whatever stands in a file becomes an option, or is
listed with the reason why not; what the program would assume otherwise than this one is written
out. Source of names and defaults: the programs' own argument parsers and configuration classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.config import LEAVES, SECTIONS
from trainer.config_files import dump_yaml, parse_yaml
from trainer.errors import InputError
from trainer.importers import ai_toolkit, diffusers, kohya, reasons
from trainer.importers.desk import Desk, Left, Taken
from trainer.importers.documents import Document
from trainer.leaves import nearest, shown
from trainer.resolve import Layer, resolve


@dataclass(frozen=True)
class Program:
    """Another trainer.

    Args:
        title: what messages call it.
        speaks: whether a document is one of its own.
        read: makes the desk of an import from its documents.
        scripts: the scripts of its that are read from command lines.
        others: scripts with such names that are not, and why.
    """

    title: str
    speaks: Callable[[Document], bool]
    read: Callable[[Sequence[Document]], Desk]
    scripts: Sequence[str] = ()
    others: Mapping[str, str] = field(default_factory=dict)


PROGRAMS: Mapping[str, Program] = {
    "kohya": Program("kohya's sd-scripts", kohya.speaks, kohya.read, kohya.SCRIPTS, kohya.OTHERS),
    "ai-toolkit": Program("ai-toolkit", ai_toolkit.speaks, ai_toolkit.read),
    "diffusers": Program(
        "diffusers' training scripts",
        diffusers.speaks,
        diffusers.read,
        tuple(diffusers.SCRIPTS),
        diffusers.OTHERS,
    ),
}

# Those that `read_document` is to look for.
SCRIPTS = tuple(script for program in PROGRAMS.values() for script in program.scripts)


@dataclass(frozen=True)
class Imported:
    """A configuration that was another program's.

    Args:
        program: its name.
        files: what it was read from.
        values: option to value, in the order of our sections.
        taken: what was given there and became these.
        left: what was given there, or is assumed there, and has no counterpart.
        filled: what the program assumes otherwise than this one.
        remarks: what is still to be said, or to be known.
    """

    program: str
    files: tuple[str, ...]
    values: Mapping[str, Any]
    taken: tuple[Taken, ...]
    left: tuple[Left, ...]
    filled: tuple[Taken, ...]
    remarks: tuple[str, ...]

    @property
    def text(self) -> str:
        """The configuration as YAML, with what has no counterpart as comments."""
        title = PROGRAMS[self.program].title
        lines = [f"From {', '.join(self.files)}, a configuration of {title}."]
        lost = [entry for entry in self.left if entry.matters]
        if lost:
            lines += ["", "Without a counterpart here, so that this is another training:"]
            lines += [f"  {e.name}: {shown(e.value)} - {e.reason}" for e in lost]
        if self.remarks:
            lines += ["", *self.remarks]
        parts = [part for line in lines for part in line.splitlines() or [""]]
        comment = "".join(f"# {part}".rstrip() + "\n" for part in parts)
        nested = {
            section: {n: v for n, v in self.values.items() if LEAVES[n].section == section}
            for section in SECTIONS
        }
        return comment + dump_yaml({name: part for name, part in nested.items() if part})


def imported(documents: Sequence[Document], program: str | None = None) -> Imported:
    """The configuration that documents of another program mean.

    Args:
        program: whose they are. None: the one whose they are by themselves.

    Raises:
        InputError: no program has such documents, or they hold what it could not take.
    """
    _refuse_others(documents)
    name = program or _program_of(documents)
    if name not in PROGRAMS:
        message = f"got `{name}`; allowed: one of {', '.join(PROGRAMS)}"
        raise InputError.of("--from", message, nearest(name, PROGRAMS))
    desk = PROGRAMS[name].read(documents)
    desk.close()
    _refuse_wrong(desk)
    desk.remarks += [_unread_others(document) for document in documents if document.others]
    desk.remarks += [_unread_outer(document) for document in documents if document.outer]
    if "images_data_url" not in desk.values and "concepts" not in desk.values:
        desk.remarks.append("No pictures are named: give images_data_url.")
    found = Imported(
        name,
        tuple(document.name for document in documents),
        {leaf: desk.values[leaf] for leaf in LEAVES if leaf in desk.values},
        tuple(desk.taken),
        tuple(desk.left),
        tuple(desk.filled),
        tuple(desk.remarks),
    )
    _read_back(found)
    return found


def _read_back(found: Imported) -> None:
    """Raises where the written text would not mean what was read.

    Raises:
        InputError: a value cannot be written.
    """
    sections = parse_yaml(found.text, "the imported configuration") if found.values else {}
    written = {leaf: value for part in sections.values() for leaf, value in part.items()}
    for leaf, value in found.values.items():
        if json.dumps(written.pop(leaf, None)) != json.dumps(value):
            raise InputError.of(leaf, f"got {shown(value)}, which cannot be written as YAML")
    if written:
        raise InputError.of(next(iter(written)), "is in the text and was not read")


def _program_of(documents: Sequence[Document]) -> str:
    found = [
        name
        for name, program in PROGRAMS.items()
        if all(program.speaks(document) for document in documents)
    ]
    if len(found) == 1:
        return found[0]
    owners = [
        next((p.title for p in PROGRAMS.values() if p.speaks(document)), "")
        for document in documents
    ]
    if not found and all(owners):
        message = "are files of several programs: "
        message += "; ".join(f"{d.name} of {o}" for d, o in zip(documents, owners, strict=True))
        raise InputError.of("FILE", message, reasons.ONE_BY_ONE)
    for document in documents:
        if document.script and not found:
            raise _unread(document)
    names = ", ".join(document.name for document in documents)
    message = f"is no configuration of {', '.join(p.title for p in PROGRAMS.values())}"
    raise InputError.of(names, message, f"say whose it is: --from {'|'.join(PROGRAMS)}")


def _refuse_others(documents: Sequence[Document]) -> None:
    """Raises for a script that is known not to be read, although its name is near one that is.

    Raises:
        InputError: with what it trains.
    """
    for document in documents:
        for program in PROGRAMS.values():
            if document.script in program.others:
                message = f"runs `{document.script}`, which {program.others[document.script]}"
                hint = "docs/methods.md names the base models, docs/configuration.md what is read"
                raise InputError.of(document.name, message, hint)


def _unread(document: Document) -> InputError:
    """What is said of a command line that runs a script whose options are not read."""
    message = f"runs `{document.script}`, whose options are not read; read are {', '.join(SCRIPTS)}"
    return InputError.of(document.name, message, nearest(document.script, SCRIPTS))


def _unread_others(document: Document) -> str:
    """What is said of further commands in a file, of which one is read."""
    listed = [
        f"`{other.script}` in line {other.line}" if other.script else f"line {other.line}"
        for other in document.others
    ]
    return (
        f"One command of {document.name} is read, `{document.script}`; not read: "
        f"{', '.join(listed)}. Put each into a file of its own, with the variables that it uses, "
        "and import that."
    )


def _unread_outer(document: Document) -> str:
    """What is said of programs that start the one whose options are read."""
    return (
        f"{document.starter} is started by {' and '.join(document.outer)} there, whose options are "
        "not read: the processes that they start are not counted, see docs/processes.md."
    )


def _refuse_wrong(desk: Desk) -> None:
    """Raises what is wrong with the values, under the other program's names.

    What only the user can say, and a remark asks for, is taken as said.
    """
    said: dict[str, Any] = {"class_prompt": "a class"}
    if not desk.values.keys() & {"images_data_url", "concepts"}:
        said["images_data_url"] = "pictures"
    fields = {leaf: name for leaf, name in desk.sources.items() if name != leaf}
    layer = Layer("the imported configuration", desk.values, explicit=True, fields=fields)
    resolve([Layer("to be said", said, explicit=True), layer])
