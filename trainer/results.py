"""From a finished training to verified files: what the exporters write, in which order.

Part of the engine's room: it joins the trained weights with the exporters and names no family.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from trainer import base_model
from trainer.adapters import EffectiveWeights
from trainer.base_model import BaseModel, Precision
from trainer.config import TrainingConfig
from trainer.config_files import write_config
from trainer.durable import fresh_folder, write_text
from trainer.errors import VerificationError
from trainer.events import Event, FileEvent, NoteEvent
from trainer.export.card import CardFile, model_card
from trainer.export.diffusers import FILE_NAME, write_diffusers, write_peft_folders
from trainer.export.facts import TrainingFacts, public_name
from trainer.export.full import write_denoiser
from trainer.export.kohya import DoraConvention, write_kohya
from trainer.export.plot import write_loss_plot
from trainer.export.state import AdapterState
from trainer.export.verify import TrainedWeights, nothing_learnt, verify, write_report
from trainer.job import Role, RunFolder
from trainer.training import Training

_SAVED_AS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_CONVENTIONS: Mapping[str, tuple[DoraConvention, ...]] = {
    "paper": ("paper",),
    "comfyui": ("comfyui",),
    "both": ("paper", "comfyui"),
}


def deliver(
    config: TrainingConfig,
    base: BaseModel,
    precision: Precision,
    training: Training,
    folder: RunFolder,
) -> Generator[Event, None, None]:
    """Writes every result file and reads it back.

    Raises:
        VerificationError: a reader does not get the trained model from a file.
    """
    outputs = fresh_folder(folder.outputs)
    state = _adapter_state(config, base, training)
    facts = _facts(config, training)
    weights: list[tuple[Role, Path]] = []
    written = (
        _full_files(config, base, training, outputs)
        if state is None
        else _adapter_files(config, base, training, state, facts, outputs)
    )
    for role, path in written:
        weights.append((role, path))
        yield _written(folder, role, path)
    write_text(outputs / "config.yaml", write_config(config))
    yield _written(folder, "config", outputs / "config.yaml")
    losses = list(enumerate(training.losses, start=1))
    write_loss_plot(outputs / "loss.png", losses, config.output.output_name)
    yield _written(folder, "loss_plot", outputs / "loss.png")
    fresh = _fresh_pipeline(config, base, precision)
    trained = _trained(config, base, training)
    checks = yield from verify(folder.root, weights, trained, fresh, base.family.kohya)
    if nothing_learnt(checks):
        yield NoteEvent(
            "warning",
            "learning_rate",
            "nothing was learnt: every trained layer equals that of the base model; look at "
            "learning_rate, lr_warmup_steps and max_train_steps",
        )
    write_report(outputs / "verify.json", checks)
    yield _written(folder, "verification", outputs / "verify.json")
    card_files = [CardFile(role, path.relative_to(outputs).as_posix()) for role, path in weights]
    card = model_card(
        facts,
        card_files,
        checks,
        pipeline_class=base.family.pipeline_class.__name__,
        state=state,
    )
    write_text(outputs / "README.md", card)
    yield _written(folder, "model_card", outputs / "README.md")
    failed = [check for check in checks if check.status == "failed"]
    if failed:
        raise VerificationError(
            "; ".join(f"`{check.path}` read by {check.reader}: {check.reason}" for check in failed),
            "do not use these files; please report this with outputs/verify.json",
        )


def _adapter_files(
    config: TrainingConfig,
    base: BaseModel,
    training: Training,
    state: AdapterState,
    facts: TrainingFacts,
    outputs: Path,
) -> Iterator[tuple[Role, Path]]:
    dtype = _SAVED_AS[config.output.save_dtype]
    path = outputs / FILE_NAME
    write_diffusers(path, state, dtype)
    yield "diffusers_lora", path
    if state.algorithm != "lora":
        for path in write_peft_folders(outputs / "peft", state, dtype):
            yield "peft_folder", path
    effective = EffectiveWeights(training.denoiser)
    wanted = _CONVENTIONS[config.output.kohya_dora] if state.use_dora else ("paper",)
    for convention in wanted:
        suffix = "" if convention == "paper" else f"_{convention}"
        path = outputs / f"{config.output.output_name}{suffix}.safetensors"
        write_kohya(
            path,
            state,
            base.family.kohya,
            facts,
            dtype,
            convention=convention,
            base_weight=lambda component, layer: effective.base(layer),
        )
        yield "kohya_lora" if convention == "paper" else "kohya_lora_comfyui", path


def _full_files(
    config: TrainingConfig,
    base: BaseModel,
    training: Training,
    outputs: Path,
) -> Iterator[tuple[Role, Path]]:
    for path in write_denoiser(
        outputs / base.family.denoiser_name,
        training.trained_tensors(),
        dict(training.denoiser.config),
        _SAVED_AS[config.output.save_dtype],
    ):
        yield "denoiser_weights", path


def _adapter_state(
    config: TrainingConfig, base: BaseModel, training: Training
) -> AdapterState | None:
    adapter = config.adapter
    if not adapter.use_lora:
        return None
    return AdapterState(
        algorithm=adapter.lora_type,
        use_dora=adapter.use_dora,
        rank=adapter.rank,
        alpha=adapter.scale * adapter.rank,
        components={base.family.denoiser_name: training.trained_tensors()},
    )


def _trained(config: TrainingConfig, base: BaseModel, training: Training) -> TrainedWeights:
    if config.adapter.use_lora:
        return {base.family.denoiser_name: EffectiveWeights(training.denoiser)}
    return {base.family.denoiser_name: _WholeWeights(training.trained_tensors())}


class _WholeWeights(Mapping[str, torch.Tensor]):
    """Trained tensors in 32 bits on the processor, one at a time."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name].float().cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _fresh_pipeline(
    config: TrainingConfig, base: BaseModel, precision: Precision
) -> Callable[[], Any]:
    """Makes base models without the parts that no result file touches.

    The denoiser is in 32 bits; text encoders stay where an adapter file could reach them.
    """
    denoiser = base.family.denoiser_name
    kept = {denoiser, *(base.family.text_encoder_names if config.adapter.use_lora else ())}

    def make() -> Any:
        pipeline = base_model.load(base, precision).pipeline
        for name, component in pipeline.components.items():
            if name not in kept and isinstance(component, torch.nn.Module):
                pipeline.register_modules(**{name: None})
        pipeline.components[denoiser].float()
        return pipeline

    return make


def _facts(config: TrainingConfig, training: Training) -> TrainingFacts:
    width, height = config.data.resolution_width, config.data.resolution_height
    assert width is not None
    assert height is not None
    ignored = config.resolved.ignored_options
    return TrainingFacts(
        output_name=config.output.output_name,
        base_model=public_name(config.model.model_url),
        instance_prompt=config.data.instance_prompt,
        num_images=len(training.dataset.examples),
        width=width,
        height=height,
        captions=Counter(example.caption for example in training.dataset.examples),
        settings={name: value for name, value in config.values().items() if name not in ignored},
    )


def _written(folder: RunFolder, role: Role, path: Path) -> FileEvent:
    return FileEvent(role, path.relative_to(folder.root).as_posix())
