"""What requests may name: their locations become files of the server, or are refused.

A web address stays one and is fetched by the job, which reaches public hosts only. An upload is
known by its address. Content that stands in a request becomes a file. A path, and a model that is
neither on a hub nor on the owner's list, must lie in a folder that the owner has opened.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from trainer.config_files import stands_for_content
from trainer.errors import InputError, Problem
from trainer.known_models import known_models
from trainer.locations import content_of, is_data_uri, is_web_address, shown_location
from trainer.picture_lists import is_picture_list, listed_pictures, picture_list
from trainer.resolve import Layer
from trainer.server.files import FileStore
from trainer.server.hosts import plain_host

# Options that say where pictures and captions are, and where models are.
DATA = ("images_data_url", "captions_file_url", "class_images_url")
MODELS = ("model_url", "vae_url", "single_file_config", "clipseg_url", "captioner")
# Subjects, each with locations of its own.
CONCEPTS = "concepts"
PATHS = ("face_detector_path", "face_restorer_path")

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_FILES = re.compile(r"/files/([0-9a-f]{32})(/.*)?")
# Shorter content may stand in a configuration.
_LONG = 1024


@dataclass(frozen=True)
class Inputs:
    """Judges the locations of requests.

    Args:
        files: uploads.
        roots: folders that requests may name.
        own_hosts: names under which clients reach this server, see `hosts`.
    """

    files: FileStore
    roots: Sequence[Path]
    own_hosts: Collection[str]

    def admitted(self, layers: Sequence[Layer]) -> list[Layer]:
        """Layers whose locations a job may read; what it may not becomes a problem."""
        return [self._admitted(layer) for layer in layers]

    def _admitted(self, layer: Layer) -> Layer:
        values, problems, wrong = dict(layer.values), list(layer.problems), set(layer.wrong)
        judges: Mapping[str, Callable[[str, str], str]] = {
            **dict.fromkeys(DATA, self.data),
            **dict.fromkeys((*MODELS, *PATHS), self._model),
        }
        for leaf, judge in judges.items():
            try:
                if isinstance(values.get(leaf), str):
                    values[leaf] = judge(values[leaf], leaf)
            except InputError as error:
                problems += error.problems
                del values[leaf]
        try:
            if isinstance(values.get(CONCEPTS), list):
                values[CONCEPTS] = self._concepts(values[CONCEPTS])
        except InputError as error:
            problems += error.problems
            wrong.add(CONCEPTS)
            del values[CONCEPTS]
        return replace(layer, values=values, problems=problems, wrong=wrong)

    def _concepts(self, concepts: Sequence[Any]) -> list[Any]:
        """The same concepts, each with locations that a job may read.

        Raises:
            InputError: one may not be read.
        """
        judged = []
        for number, concept in enumerate(concepts):
            given = dict(concept) if isinstance(concept, dict) else concept
            for name in DATA if isinstance(given, dict) else ():
                if isinstance(given.get(name), str):
                    given[name] = self.data(given[name], f"{CONCEPTS}[{number}].{name}")
            judged.append(given)
        return judged

    def data(self, location: str, field: str) -> str:
        """Where a job reads what is at a location of pictures or captions, or at all of a list.

        Raises:
            InputError: it may not be read, or is damaged.
        """
        if is_picture_list(location):
            pictures = listed_pictures(location)
            return picture_list(
                [replace(p, location=self.data(p.location, field)) for p in pictures]
            )
        if is_web_address(location):
            return self._upload(location, field) or location
        if is_data_uri(location) or self._is_base64(location):
            if len(location) < _LONG:
                return location
            return str(self.files.keep(content_of(location, field), field))
        if self._lies_open(location):
            return location
        raise InputError.of(
            field,
            f"got `{shown_location(location)}`, which is no file that requests may name; allowed: "
            "an http(s) URL, a data: URI, base64, or an upload",
            "upload it first",
        )

    def _model(self, name: str, field: str) -> str:
        listed = {value for model in known_models().values() for value in model.options.values()}
        if _HUB_ID.fullmatch(name) or name in listed or self._lies_open(name):
            return name
        raise InputError.of(
            field,
            f"got `{shown_location(name)}`; allowed: a hub id, or a name on this server's list",
            "the owner of the server can put it into base_models.yaml",
        )

    def _upload(self, url: str, field: str) -> str | None:
        """The file behind an address of this server; nothing for any other address.

        An id that is known is enough, whatever the host: a client may reach this server by an
        address or a name that the server does not know of.
        """
        try:
            address = urlsplit(url)
        except ValueError:
            return None
        found = _FILES.fullmatch(unquote(address.path))
        file = self.files.find(found.group(1)) if found else None
        if found is None or (
            file is None and plain_host(address.hostname or "") not in self.own_hosts
        ):
            return None
        if file is None or file.is_expected or not file.path.is_file():
            problem = Problem(
                field, f"there is no upload `{shown_location(url)}`", "upload it anew"
            )
            raise InputError([problem])
        return str(file.path.resolve())

    def _is_base64(self, location: str) -> bool:
        sample = location[:_LONG].replace("\n", "").replace("\r", "")
        return len(location) > 200 and re.fullmatch(r"[A-Za-z0-9+/=]+", sample) is not None

    def _lies_open(self, location: str) -> bool:
        if stands_for_content(location):
            return False
        try:
            path = Path(location)
            return path.is_absolute() and any(
                path.resolve().is_relative_to(root.resolve()) for root in self.roots
            )
        except (OSError, ValueError):
            return False
