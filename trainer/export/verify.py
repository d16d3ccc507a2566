"""Every written file read back by independent readers and compared with the trained weights.

A file counts as right when each layer's weight equals the trained one up to a share of the
change that training made. A share of the weight itself would hide a wrong alpha, because an
adapter changes a weight by a few per cent at most.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trainer.durable import write_text
from trainer.events import Event, StageEvent, VerifyEvent
from trainer.export.embedding_readers import EMBEDDING_DIFFUSERS, EMBEDDING_INTERFACE
from trainer.export.formula import COMFYUI_FORMULA, FORMULA, PAPER_FORMULA
from trainer.export.layer_names import UnknownStructureError
from trainer.export.readers import (
    DIFFUSERS,
    DIFFUSERS_KOHYA,
    DIFFUSERS_LOKR,
    LYCORIS,
    PEFT,
    PEFT_FOLDER,
    Reader,
    Reading,
    keys_of,
    quiet,
)
from trainer.export.whole_readers import WHOLE_DENOISER, WHOLE_TEXT_ENCODER
from trainer.job import Role
from trainer.names import KohyaNames

CheckStatus = Literal["passed", "failed", "not checked"]

# Component to layer path to effective weight; parameter names instead of layer paths where a
# whole component was trained, new tokens where their vectors were. fp32 on the CPU; may compute
# its values on demand.
TrainedWeights = Mapping[str, Mapping[str, Tensor]]

# Largest error as a share of the trained change, by the coarsest format among the weights.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Rounding of fp32 arithmetic on the weight itself, allowed on top.
ARITHMETIC_NOISE = 1e-6

_READERS: Mapping[tuple[Role, str], tuple[Reader, ...]] = {
    ("diffusers_lora", "lora"): (DIFFUSERS, FORMULA),
    ("diffusers_lora", "lokr"): (DIFFUSERS_LOKR, FORMULA),
    ("diffusers_lora", "hada"): (PEFT, FORMULA),
    ("kohya_lora", "lora"): (DIFFUSERS_KOHYA, LYCORIS, PAPER_FORMULA),
    ("kohya_lora", "lokr"): (DIFFUSERS_KOHYA, LYCORIS, PAPER_FORMULA),
    ("kohya_lora", "hada"): (LYCORIS, PAPER_FORMULA),
    ("kohya_lora_comfyui", "lora"): (DIFFUSERS_KOHYA, LYCORIS, COMFYUI_FORMULA),
    ("peft_folder", "lora"): (PEFT_FOLDER,),
    ("peft_folder", "lokr"): (PEFT_FOLDER,),
    ("peft_folder", "hada"): (PEFT_FOLDER,),
    ("denoiser_weights", "plain"): (WHOLE_DENOISER,),
    ("text_encoder_weights", "plain"): (WHOLE_TEXT_ENCODER,),
    ("text_encoder_2_weights", "plain"): (WHOLE_TEXT_ENCODER,),
    ("embeddings", "plain"): (EMBEDDING_DIFFUSERS, EMBEDDING_INTERFACE),
    ("token_embedding", "plain"): (EMBEDDING_DIFFUSERS, EMBEDDING_INTERFACE),
}

# What loaders raise on files that they cannot read.
_LOADING_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)
_SHOWN_PROBLEMS = 3


@dataclass(frozen=True)
class WrittenFile:
    """A result file and what readers must find in it.

    Args:
        role: what the file is.
        path: where it lies.
        holds: the trained weights that it carries; nothing for a configuration.
    """

    role: Role
    path: Path
    holds: TrainedWeights = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """What one reader found in one file.

    Args:
        path: the file, relative to the run folder.
        role: what the file is.
        reader: who read it.
        status: `not checked` where the reader is missing or not made for such a file.
        keys_matched: tensors of the file that reached a trained layer.
        keys_total: tensors in the file; alphas are not counted.
        largest_difference: over the layers, the error relative to the trained weight.
        largest_change_difference: the same relative to the change that training made.
        largest_change: over the layers, the change that training made relative to the weight;
            0 where it is no more than rounding, None where new tokens had no weight before.
        tolerance: the largest share of the change that passes.
        reason: what is wrong, or why the reader does not apply.
    """

    path: str
    role: Role
    reader: str
    status: CheckStatus
    keys_matched: int = 0
    keys_total: int = 0
    largest_difference: float | None = None
    largest_change_difference: float | None = None
    largest_change: float | None = None
    tolerance: float | None = None
    reason: str = ""


@dataclass
class _Comparison:
    """Running result over the layers of one file."""

    reader: Reader
    dtype: torch.dtype
    keys: int = 0
    difference: float = 0.0
    change_difference: float = 0.0
    change: float = 0.0
    has_news: bool = False
    seen: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


def verify(
    root: Path,
    files: Sequence[WrittenFile],
    fresh_pipeline: Callable[[], Any],
    names: KohyaNames,
) -> Generator[Event, None, list[Check]]:
    """Reads back all result files for which a reader is known.

    Readers that leave a pipeline as it was share one; the others get a fresh one each, and whole
    components are loaded before it: at most one model is held beside the trained weights.

    Args:
        root: the run folder, to which paths in the report are relative.
        files: each file with what it should hold.
        fresh_pipeline: makes an untouched base model on the CPU, in the precision it was
            loaded in; a layer at a time is widened to 32 bits.
        names: prefixes of the family's kohya files.

    Returns:
        One check per file and reader, in the order of the files.
    """
    tasks = [(file, reader) for file in files for reader in _readers_of(file)]
    results: dict[int, Check] = {}
    pipelines = _Pipelines(fresh_pipeline, any(reader.changes_pipeline for _, reader in tasks))
    order = sorted(range(len(tasks)), key=lambda number: tasks[number][1].changes_pipeline)
    for done, number in enumerate(order):
        file, reader = tasks[number]
        yield StageEvent("verify", done, len(tasks))
        relative = file.path.relative_to(root).as_posix()
        found = _look(reader, file, pipelines, names)
        if isinstance(found, str):
            check = Check(relative, file.role, reader.name, "not checked", reason=found)
        else:
            check = _check(relative, file, reader, found, root)
        results[number] = check
        yield VerifyEvent(relative, reader.name, check.status, check.largest_difference)
    yield StageEvent("verify", len(tasks), len(tasks))
    return [results[number] for number in range(len(tasks))]


class _Pipelines:
    """The base models of a verification, of which at most one is alive.

    Args:
        make: makes an untouched one.
        watched: whether some reader will change its pipeline.
    """

    def __init__(self, make: Callable[[], Any], watched: bool) -> None:
        self._make, self._watched = make, watched
        self._current: Any = None
        self._fingerprints: dict[str, int] = {}

    def untouched(self) -> Any:
        """A base model as it was before any reading."""
        if self._current is None:
            self._current = self._make()
            if self._watched and not self._fingerprints:
                self._fingerprints = _fingerprints(self._current)
        return self._current

    def side_effects(self) -> list[str]:
        """Weights that reading changed: an adapter leaves them to its merging."""
        now, known = _fingerprints(self._current), self._fingerprints
        changed = [name for name in sorted(known) if now.get(name) != known[name]]
        return [f"`{name}` changed without an adapter" for name in changed]

    def drop(self) -> None:
        """Gives up a pipeline that has been read into."""
        self._current = None


def nothing_learnt(checks: Iterable[Check]) -> bool:
    """Whether files were read and every trained layer in them equals that of the base model."""
    changes = [check.largest_change for check in checks if check.status == "passed"]
    return bool(changes) and all(change == 0 for change in changes)


def write_report(path: Path, checks: Iterable[Check]) -> None:
    """Writes the checks as `verify.json`."""
    entries = [asdict(check) for check in checks]
    passed = all(check["status"] != "failed" for check in entries)
    report = {"passed": passed, "checks": entries}
    write_text(path, json.dumps(report, indent=2, sort_keys=True) + "\n")


def _readers_of(file: WrittenFile) -> tuple[Reader, ...]:
    if file.path.suffix != ".safetensors":
        return ()
    keys = keys_of(file.path)
    kinds = ("lokr", "hada", "lora")
    kind = next((kind for kind in kinds if any(f".{kind}_" in key for key in keys)), "plain")
    return _READERS.get((file.role, kind), ())


def _look(
    reader: Reader, file: WrittenFile, pipelines: _Pipelines, names: KohyaNames
) -> _Comparison | str:
    """What the reader found in the file, or why it does not apply."""
    refusal = reader.refuses(file.path, names)
    if refusal is not None:
        return refusal
    try:
        return _compare(reader, file, pipelines, names)
    except UnknownStructureError as error:
        return str(error)


def _compare(
    reader: Reader, file: WrittenFile, pipelines: _Pipelines, names: KohyaNames
) -> _Comparison:
    comparison = _Comparison(reader, _coarsest(file.path))
    with _recording_errors(comparison.problems):
        reader.loads(file.path)
    pipeline = pipelines.untouched()
    with _recording_errors(comparison.problems):
        for reading in reader.read(pipeline, file.path, names):
            _add(comparison, reading, file.holds)
    if reader.changes_pipeline:
        if not comparison.problems:
            comparison.problems += pipelines.side_effects()
        pipelines.drop()
    for component, layers in file.holds.items():
        wanted = [f"{component}.{layer}" for layer in layers]
        missing = [name for name in wanted if name not in comparison.seen]
        if missing:
            comparison.problems.append(
                f"{len(missing)} of {len(wanted)} layers missing, such as `{missing[0]}`"
            )
    return comparison


@contextmanager
def _recording_errors(problems: list[str]) -> Iterator[None]:
    """Keeps loaders quiet and turns what they raise into a problem of the file."""
    try:
        with quiet(), torch.no_grad():
            yield
    except _LOADING_ERRORS as error:
        problems.append(f"{type(error).__name__}: {error}".strip())


def _add(comparison: _Comparison, reading: Reading, holds: TrainedWeights) -> None:
    name, before = f"{reading.component}.{reading.path}", reading.before
    comparison.seen.add(name)
    comparison.has_news |= before is None
    target = holds.get(reading.component, {}).get(reading.path)
    if target is None and before is not None and _is_same(before, reading.after):
        # Rows of zeros, which a layer that was not trained has in one that it shares with others.
        comparison.keys += reading.keys
        return
    if target is None:
        comparison.problems.append(f"`{name}` is changed, but was not trained")
        return
    comparison.keys += reading.keys
    error, size = _norm(reading.after - target), _norm(target)
    # Of a new token, all is changed.
    change = size if before is None else _norm(target - before)
    is_exact = comparison.reader.reads_exactly
    allowed = TOLERANCES[comparison.dtype] * change + ARITHMETIC_NOISE * size
    missed = error
    if is_exact:
        missed = _norm(reading.after - target.to(comparison.dtype).float())
    if not missed <= allowed:
        comparison.problems.append(
            f"`{name}` is off by {error / max(change, 1e-30):.1e} of its change"
        )
    comparison.difference = _larger(comparison.difference, error / max(size, 1e-30))
    # Merging DoRA rounds weights even where nothing was learnt.
    if not change <= (0.0 if is_exact else ARITHMETIC_NOISE * size):
        comparison.change = _larger(comparison.change, change / max(size, 1e-30))
    if change > 0:
        comparison.change_difference = _larger(comparison.change_difference, error / change)


def _check(
    relative: str, file: WrittenFile, reader: Reader, comparison: _Comparison, root: Path
) -> Check:
    total = sum(not key.endswith(".alpha") for key in keys_of(file.path))
    problems = list(comparison.problems)
    if not problems and comparison.keys != total:
        problems.append(f"only {comparison.keys} of {total} tensors reached a layer")
    shown = "; ".join(problems[:_SHOWN_PROBLEMS]).replace(str(root), ".")
    more = (
        f"; and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
    )
    has_change = bool(comparison.seen) and not comparison.has_news
    return Check(
        relative,
        file.role,
        reader.name,
        "failed" if problems else "passed",
        keys_matched=comparison.keys,
        keys_total=total,
        largest_difference=_rounded(comparison.difference),
        largest_change_difference=_rounded(comparison.change_difference),
        largest_change=_rounded(comparison.change) if has_change else None,
        tolerance=TOLERANCES[comparison.dtype],
        reason=shown + more,
    )


def _coarsest(path: Path) -> torch.dtype:
    """The format of the file's weights: the one with the largest tolerance."""
    with safe_open(path, framework="pt") as file:
        found = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    return max((d for d in TOLERANCES if d in found), key=TOLERANCES.__getitem__)


def _fingerprints(pipeline: Any) -> dict[str, int]:
    """A checksum of every parameter, under its name without an adapter's wrapping."""
    return {
        f"{component}.{name.replace('base_layer.', '').removeprefix('base_model.model.')}": _crc(p)
        for component, model in pipeline.components.items()
        if isinstance(model, nn.Module)
        for name, p in model.named_parameters()
        if not any(mark in name for mark in (".lora_", ".lokr_", ".hada_"))
    }


def _crc(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)


def _is_same(before: Tensor, after: Tensor) -> bool:
    return _norm(after - before) <= ARITHMETIC_NOISE * _norm(before)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _larger(a: float, b: float) -> float:
    """The larger number, where NaN counts as the largest."""
    return b if not b <= a else a


def _rounded(value: float) -> float | None:
    """Two digits: what lies below them depends on the machine. None for NaN and infinity."""
    return float(f"{value:.1e}") if abs(value) < float("inf") else None
