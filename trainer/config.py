"""One configuration for one training: the sections together, and how they came about.

The hyperparameters themselves are declared in `trainer.sections`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict
from pydantic.fields import FieldInfo

from trainer.fields import Names, Section, as_tuple
from trainer.sections.data import Concept, DataConfig, MaskConfig
from trainer.sections.learning import AdapterConfig, LossConfig, PriorConfig, TokenConfig
from trainer.sections.model import ModelConfig
from trainer.sections.preparing import CaptionConfig, FaceConfig
from trainer.sections.running import OptimConfig, OutputConfig, RunConfig
from trainer.sections.subjects import subjects_of
from trainer.sections.watching import SampleConfig

__all__ = [
    "AdapterConfig",
    "CaptionConfig",
    "Concept",
    "DataConfig",
    "FaceConfig",
    "LEAVES",
    "Leaf",
    "LossConfig",
    "MaskConfig",
    "ModelConfig",
    "Names",
    "Note",
    "OptimConfig",
    "OutputConfig",
    "PriorConfig",
    "Resolution",
    "RunConfig",
    "SECTIONS",
    "SampleConfig",
    "Section",
    "TokenConfig",
    "TrainingConfig",
]


class Note(Section):
    """Something the configuration did not take as it was given, with its reason.

    Args:
        kind: `yielded`: a default gave way to an explicit value or to the checkpoint;
            `ignored`: the option has no effect here; `warning`: it acts, but look twice.
        field: the leaf concerned, or one inside it: `concepts[1].class_prompt`.
        message: what was done and why, as one sentence without its period.
    """

    kind: Literal["yielded", "ignored", "warning"]
    field: str
    message: str


class Resolution(Section):
    """How the values came about: kept in the written configuration, ignored by the arithmetic.

    Args:
        explicit: the leaves that somebody set on purpose.
        notes: what yielded, is ignored or deserves a warning.
    """

    explicit: Names = ()
    notes: Annotated[tuple[Note, ...], BeforeValidator(as_tuple)] = ()

    @property
    def ignored_options(self) -> dict[str, str]:
        """Every option without an effect in this configuration, with the reason."""
        return {note.field: note.message for note in self.notes if note.kind == "ignored"}


class TrainingConfig(Section):
    """One training, wholly described."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    caption: CaptionConfig = CaptionConfig()
    face: FaceConfig = FaceConfig()
    mask: MaskConfig = MaskConfig()
    token: TokenConfig = TokenConfig()
    adapter: AdapterConfig = AdapterConfig()
    prior: PriorConfig = PriorConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()
    sample: SampleConfig = SampleConfig()
    output: OutputConfig = OutputConfig()
    resolved: Resolution = Resolution()

    def leaf(self, name: str) -> Any:
        """The value of one hyperparameter by its flat name.

        Raises:
            KeyError: there is no such leaf.
        """
        return getattr(getattr(self, LEAVES[name].section), name)

    def subjects(self) -> tuple[Concept, ...]:
        """Every concept with all its options; pictures without concepts are one concept."""
        return subjects_of({name: self.leaf(name) for name in LEAVES})

    def preview_prompts(self) -> tuple[str, ...]:
        """The prompts that pictures are made of on the way: none where none are asked for."""
        if self.sample.validation_prompts or self.sample.sample_steps is None:
            return self.sample.validation_prompts
        instance_prompts = (subject.instance_prompt for subject in self.subjects())
        return tuple(dict.fromkeys(prompt for prompt in instance_prompts if prompt))

    def with_leaf(self, name: str, value: Any, note: Note | None = None) -> TrainingConfig:
        """A copy in which one leaf has another value, and a note says so."""
        section = LEAVES[name].section
        changed = getattr(self, section).model_copy(update={name: value})
        copy = self.model_copy(update={section: changed})
        return copy.with_notes(note) if note else copy

    def with_notes(self, *notes: Note) -> TrainingConfig:
        """A copy that carries further notes; what is noted already is not noted twice."""
        joined = tuple(dict.fromkeys((*self.resolved.notes, *notes)))
        resolved = self.resolved.model_copy(update={"notes": joined})
        return self.model_copy(update={"resolved": resolved})

    def is_explicit(self, name: str) -> bool:
        """Whether somebody set this leaf on purpose."""
        return name in self.resolved.explicit

    def values(self) -> dict[str, Any]:
        """All leaves, flat, as JSON can hold them."""
        nested = self.model_dump(mode="json", exclude={"resolved"})
        return {name: value for section in nested.values() for name, value in section.items()}

    def result_values(self) -> dict[str, Any]:
        """The leaves that decide what is computed: two runs with equal ones must agree."""
        return {name: value for name, value in self.values().items() if LEAVES[name].changes_result}

    def fingerprint(self) -> str:
        """sha256 of everything that decides what is computed."""
        text = json.dumps(self.result_values(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class Leaf(Section):
    """Where a hyperparameter lives and how it is declared."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    name: str
    section: str
    info: FieldInfo

    @property
    def changes_result(self) -> bool:
        """False for leaves that only change how a run is watched or stored."""
        extra = self.info.json_schema_extra
        return not (isinstance(extra, dict) and extra.get("changes_result") is False)


def _all_leaves() -> Iterator[Leaf]:
    for section, field in TrainingConfig.model_fields.items():
        if section == "resolved":
            continue
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, Section)
        for name, info in field.annotation.model_fields.items():
            yield Leaf(name=name, section=section, info=info)


LEAVES: Mapping[str, Leaf] = {leaf.name: leaf for leaf in _all_leaves()}
SECTIONS: tuple[str, ...] = tuple(
    name for name in TrainingConfig.model_fields if name != "resolved"
)
