"""The files of weights that a finished training leaves, each with what it must be found to hold.

Joins what was learnt with the exporters; `trainer.results` says which other files there are, and
has all of them read back. Part of the engine's room: names no family.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from trainer import base_model
from trainer.adapters import EffectiveWeights, adaptable_layers
from trainer.base_model import BaseModel
from trainer.config import AdapterConfig, OutputConfig
from trainer.events import Event
from trainer.export.diffusers import FILE_NAME, write_diffusers, write_peft_folders
from trainer.export.embeddings import write_token_files
from trainer.export.extraction import Extraction, extract, write_extraction_report
from trainer.export.facts import TrainingFacts
from trainer.export.full import write_denoiser, write_text_encoder
from trainer.export.kohya import DoraConvention, write_kohya
from trainer.export.state import AdapterState, Strength
from trainer.export.verify import WrittenFile
from trainer.job import Role
from trainer.trainables import Trainables

_SAVED_AS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_CONVENTIONS: Mapping[str, tuple[DoraConvention, ...]] = {
    "paper": ("paper",),
    "comfyui": ("comfyui",),
    "both": ("paper", "comfyui"),
}

# Component to parameter name to weight.
Weights = Mapping[str, Mapping[str, torch.Tensor]]
Files = Iterator[WrittenFile]


@dataclass(frozen=True)
class Artifacts:
    """What is written, and where.

    Args:
        trainables: what was learnt.
        base: the base model as it was found.
        facts: for headers and card.
        adapter: the form of what was learnt.
        output: names and number formats.
        folder: the result folder.
    """

    trainables: Trainables
    base: BaseModel
    facts: TrainingFacts
    adapter: AdapterConfig
    output: OutputConfig
    folder: Path

    @property
    def components(self) -> tuple[str, ...]:
        """The components that learnt by an adapter or wholly."""
        return tuple(self.trainables.modules)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the written weights."""
        return _SAVED_AS[self.output.save_dtype]

    def state(self) -> AdapterState | None:
        """The trained adapter in plain tensors, or nothing where all weights were trained."""
        if self.trainables.whole:
            return None
        tensors = self.trainables.weights()
        denoiser = self.base.family.denoiser_name
        text = self.adapter.for_text_encoders()
        return AdapterState(
            algorithm=self.adapter.lora_type,
            use_dora=self.adapter.use_dora,
            components=tensors,
            strengths={
                name: _strength(self.adapter if name == denoiser else text) for name in tensors
            },
        )

    def adapter_files(self, state: AdapterState, original: Weights) -> Files:
        """The adapter for each kind of program.

        Args:
            state: what was learnt.
            original: the weights of components that were quantised: programs put the adapter on
                these.
        """
        effective = {
            name: EffectiveWeights(module, original.get(name))
            for name, module in self.trainables.modules.items()
        }

        def base_weight(component: str, layer: str) -> torch.Tensor:
            return effective[component].base(layer)

        yield from self._lora_files(state, effective, base_weight)

    def full_files(self) -> Files:
        """A folder for each component whose weights were all trained."""
        for name, module in self.trainables.modules.items():
            folder, weights = self.folder / name, self.trainables.weights()[name]
            settings: Any = module.config
            if name == self.base.family.denoiser_name:
                written = write_denoiser(folder, weights, dict(settings), self.dtype)
                kind = "denoiser"
            else:
                written = write_text_encoder(folder, weights, settings.to_dict(), self.dtype)
                kind = name
            config, path = written
            yield WrittenFile(cast(Role, f"{kind}_config"), config)
            yield WrittenFile(cast(Role, f"{kind}_weights"), path, {name: WholeWeights(weights)})

    def extraction(self, original: Weights) -> Generator[Event, None, Extraction]:
        """A LoRA of the change from the original weights."""
        rank = self.output.extract_rank
        assert rank is not None
        layers = {
            name: adaptable_layers(base_model.skeleton(self.base, name)) for name in self.components
        }
        return (yield from extract(original, self.trainables.weights(), layers, rank=rank))

    def extracted_files(self, extraction: Extraction, original: Weights) -> Files:
        """The extracted LoRA for each kind of program, and what it does not hold."""
        if extraction.state.components:

            def base_weight(component: str, layer: str) -> torch.Tensor:
                return original[component][f"{layer}.weight"].float().cpu()

            yield from self._lora_files(
                extraction.state, extraction.effective(original), base_weight
            )
        path = self.folder / "extraction.json"
        write_extraction_report(path, extraction)
        yield WrittenFile("extraction_report", path)

    def token_files(self) -> Files:
        """The new tokens' vectors: all in one file, and a file for each identifier."""
        tokens = self.trainables.new_tokens
        if tokens:
            rows = {name: new.rows.detach() for name, new in tokens.items()}
            written = write_token_files(self.folder, rows, self.base.family.kohya, self.facts)
            for role, path, holds in written:
                yield WrittenFile(role, path, holds)

    def _lora_files(
        self,
        state: AdapterState,
        holds: Weights,
        base_weight: Callable[[str, str], torch.Tensor],
    ) -> Files:
        path = self.folder / FILE_NAME
        write_diffusers(path, state, self.dtype)
        yield WrittenFile("diffusers_lora", path, holds)
        if state.algorithm != "lora":
            for path in write_peft_folders(self.folder / "peft", state, self.dtype):
                component = path.parent.name
                yield WrittenFile("peft_folder", path, {component: holds[component]})
        wanted = _CONVENTIONS[self.output.kohya_dora] if state.use_dora else ("paper",)
        for convention in wanted:
            suffix = "" if convention == "paper" else f"_{convention}"
            path = self.folder / f"{self.output.output_name}{suffix}.safetensors"
            write_kohya(
                path,
                state,
                self.base.family.kohya,
                self.facts,
                self.dtype,
                convention=convention,
                base_weight=base_weight,
            )
            yield WrittenFile(_KOHYA_ROLES[convention], path, holds)


_KOHYA_ROLES: Mapping[DoraConvention, Role] = {
    "paper": "kohya_lora",
    "comfyui": "kohya_lora_comfyui",
}


class WholeWeights(Mapping[str, torch.Tensor]):
    """Trained tensors in 32 bits on the processor, one at a time."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name].float().cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _strength(adapter: AdapterConfig) -> Strength:
    return Strength(rank=adapter.rank, alpha=adapter.scale * adapter.rank)
