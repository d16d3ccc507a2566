"""From a finished training to verified files: which files there are, in which order.

Part of the engine's room: it joins the trained weights with the exporters and names no family.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer import base_model, loss
from trainer.artifacts import Artifacts
from trainer.base_model import BaseModel, Precision
from trainer.config import TrainingConfig
from trainer.config_files import write_config
from trainer.data.debug import TrainedExample, trained_examples
from trainer.durable import discard, fresh_folder, put_back, replace_folder, write_text
from trainer.errors import VerificationError
from trainer.events import Event, FileEvent, NoteEvent
from trainer.export.archive import write_archive
from trainer.export.card import model_card
from trainer.export.card_loading import CardFile
from trainer.export.debug import SeenExample, dataset_entries, mask_entries
from trainer.export.extraction import Extraction
from trainer.export.facts import TrainingFacts, public_name
from trainer.export.plot import write_loss_plot
from trainer.export.verify import Check, WrittenFile, nothing_learnt, verify, write_report
from trainer.families.base import adapted_encoders, token_encoders
from trainer.job import Role, RunFolder
from trainer.tokens import TokenNames, token_names
from trainer.training import Training

# Examples that the debug archives show at least, and one whole epoch if it has more: the rest of
# a long run shows the same pictures again.
DEBUG_EXAMPLES = 256
# Below the run folder: has its `outputs` until all of them are written and verified.
_STAGING = ".tmp-delivery"


def deliver(
    config: TrainingConfig,
    base: BaseModel,
    precision: Precision,
    training: Training,
    folder: RunFolder,
) -> Generator[Event, None, None]:
    """Writes every result file and reads it back, and only then replaces those of an earlier run.

    Raises:
        DiskError: a file cannot be written; those of an earlier run stay.
        VerificationError: a reader does not get the trained model from a file.
    """
    put_back(folder.outputs)
    staging = RunFolder(fresh_folder(folder.root / _STAGING))
    try:
        checks = yield from _delivered(config, base, precision, training, staging)
        replace_folder(staging.outputs, folder.outputs)
    finally:
        discard(staging.root)
    failed = [check for check in checks if check.status == "failed"]
    if failed:
        raise VerificationError(
            "; ".join(f"`{check.path}` read by {check.reader}: {check.reason}" for check in failed),
            "do not use these files; please report this with outputs/verify.json",
        )


def _delivered(
    config: TrainingConfig,
    base: BaseModel,
    precision: Precision,
    training: Training,
    folder: RunFolder,
) -> Generator[Event, None, list[Check]]:
    """Writes every result file and tells what the readers found."""
    outputs = fresh_folder(folder.outputs)
    facts = _facts(config, training)
    fresh = _fresh_pipeline(config, base, precision)
    artifacts = Artifacts(training.trainables, base, facts, config.adapter, config.output, outputs)
    files: list[WrittenFile] = []
    state = artifacts.state()
    extraction: Extraction | None = None
    if state is not None:
        adapter_files = artifacts.adapter_files(state, _unquantised(config, base, fresh))
        yield from _collected(adapter_files, files, folder)
    else:
        yield from _collected(artifacts.full_files(), files, folder)
    if state is None and config.output.extract_rank is not None:
        extraction = yield from _extracted(artifacts, fresh, files, folder)
    yield from _collected(artifacts.token_files(), files, folder)
    yield from _records(config, training, folder)
    masked = any(example.mask_path for example in training.dataset.examples)
    checks = yield from _verified(files, fresh, base, folder, masked=masked)
    card = model_card(
        facts,
        [CardFile(file.role, file.path.relative_to(outputs).as_posix()) for file in files],
        checks,
        pipeline_class=base.family.pipeline_class.__name__,
        names=base.family.kohya,
        state=state,
        extraction=extraction,
    )
    write_text(outputs / "README.md", card)
    yield _written(folder, "model_card", outputs / "README.md")
    return checks


def _unquantised(
    config: TrainingConfig, base: BaseModel, fresh: Callable[[], Any]
) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of a denoiser that was trained on as quantised; loaders map them into memory."""
    if config.model.quantization == "none":
        return {}
    denoiser = base.family.denoiser_name
    return {denoiser: fresh().components[denoiser].state_dict()}


def _extracted(
    artifacts: Artifacts, fresh: Callable[[], Any], files: list[WrittenFile], folder: RunFolder
) -> Generator[Event, None, Extraction]:
    """A LoRA beside fully trained weights, and how much of them it holds."""
    pipeline = fresh()
    original = {name: pipeline.components[name].state_dict() for name in artifacts.components}
    extraction = yield from artifacts.extraction(original)
    yield from _collected(artifacts.extracted_files(extraction, original), files, folder)
    if not extraction.layers:
        message = "nothing changed that a LoRA can hold, so no LoRA was written"
        yield NoteEvent("warning", "extract_rank", message)
        return extraction
    message = (
        f"the extracted LoRA of rank {extraction.rank} leaves out {extraction.residual:.1%} of the "
        f"change of its layers (norm); {extraction.left_out_share:.1%} of the whole squared change "
        "lies in parameters that no LoRA holds; outputs/extraction.json has each layer"
    )
    yield NoteEvent("warning", "extract_rank", message)
    return extraction


def _records(config: TrainingConfig, training: Training, folder: RunFolder) -> Iterator[Event]:
    """What tells of the training beside its weights."""
    # How many processes read pictures changes no byte of the result: not this one either.
    explicit = tuple(name for name in config.resolved.explicit if name != "num_workers")
    resolved = config.resolved.model_copy(update={"explicit": explicit})
    told = config.with_leaf("num_workers", 0).model_copy(update={"resolved": resolved})
    write_text(folder.outputs / "config.yaml", write_config(told, with_contents=False))
    yield _written(folder, "config", folder.outputs / "config.yaml")
    losses = list(enumerate(training.losses, start=1))
    write_loss_plot(folder.outputs / "loss.png", losses, config.output.output_name)
    yield _written(folder, "loss_plot", folder.outputs / "loss.png")
    yield from _debug_archives(config, training, folder)


def _verified(
    files: list[WrittenFile],
    fresh: Callable[[], Any],
    base: BaseModel,
    folder: RunFolder,
    *,
    masked: bool,
) -> Generator[Event, None, list[Check]]:
    """What each reader found in each file, told and written down."""
    checks = yield from verify(folder.root, files, fresh, base.family.kohya)
    if nothing_learnt(checks):
        message = (
            "nothing was learnt: every trained layer equals that of the base model; look at "
            "learning_rate, lr_warmup_steps and max_train_steps"
        )
        if masked:
            message += ", and at whether the masks keep anything of the pictures"
        yield NoteEvent("warning", "learning_rate", message)
    write_report(folder.outputs / "verify.json", checks)
    yield _written(folder, "verification", folder.outputs / "verify.json")
    return checks


def _collected(
    writing: Iterator[WrittenFile], files: list[WrittenFile], folder: RunFolder
) -> Iterator[Event]:
    for file in writing:
        files.append(file)
        yield _written(folder, file.role, file.path)


def _debug_archives(
    config: TrainingConfig, training: Training, folder: RunFolder
) -> Iterator[Event]:
    """What the first steps were shown, made again from their numbers."""
    output, plan = config.output, training.dataset.plan
    if not output.debug_dataset and not output.debug_loss_masks:
        return
    enough = max(plan.steps_per_epoch, math.ceil(DEBUG_EXAMPLES / plan.examples_per_step))
    steps = range(min(enough, training.total_steps))
    container, outputs = output.data_archive_format, folder.outputs
    names = token_names(config.token)
    if output.debug_dataset:
        examples = trained_examples(training.dataset, steps)
        entries = dataset_entries(_seen(example, names) for example in examples)
        path = write_archive(outputs / "debug_dataset", entries, container)
        yield _written(folder, "debug_dataset", path)
    if output.debug_loss_masks:
        side = training.family.pipeline.vae_scale_factor
        examples = trained_examples(training.dataset, steps)
        masks = mask_entries((_seen(e, names), _latent_weights(e, side)) for e in examples)
        path = write_archive(outputs / "debug_masks", masks, container)
        yield _written(folder, "debug_masks", path)


def _seen(example: TrainedExample, names: TokenNames | None) -> SeenExample:
    """An example for the archive: its caption also as the text encoders were given it."""
    encoded = names.replaced(example.caption) if names else example.caption
    return SeenExample(example.name, example.pixels, {**example.facts(), "encoded": encoded})


def _latent_weights(example: TrainedExample, side: int) -> NDArray[np.float32]:
    """The weights that the loss gave an example's latent pixels, each `side` pixels wide."""
    height, width = example.target_size
    given = np.ones((height, width), np.float32) if example.mask is None else example.mask
    mask = torch.from_numpy(given).view(1, 1, height, width)
    weights: NDArray[np.float32] = loss.latent_weights(mask, (height // side, width // side))[
        0, 0
    ].numpy()
    return weights


def _fresh_pipeline(
    config: TrainingConfig, base: BaseModel, precision: Precision
) -> Callable[[], Any]:
    """Makes base models without the parts that no result file touches.

    Text encoders are there where a file could reach them. Those that learnt are in 32 bits, and so
    are the tables that new vectors go into; readers widen everything else a layer at a time.
    """
    denoiser, adapter = base.family.denoiser_name, config.adapter
    reached = {denoiser}
    if adapter.use_lora or adapter.train_text_encoder:
        reached |= set(adapted_encoders(base.family))
    if config.token.train_text_encoder_ti:
        reached |= set(token_encoders(base.family))
    learnt = adapted_encoders(base.family) if adapter.train_text_encoder else ()
    taught = token_encoders(base.family) if config.token.train_text_encoder_ti else ()
    without = {"vae", *base.family.text_encoder_names} - reached

    def make() -> Any:
        pipeline = base_model.load(base, precision, without=without).pipeline
        for name in learnt:
            pipeline.components[name].float()
        for name in taught:
            pipeline.components[name].get_input_embeddings().float()
        return pipeline

    return make


def _facts(config: TrainingConfig, training: Training) -> TrainingFacts:
    width, height = config.data.resolution_width, config.data.resolution_height
    assert width is not None
    assert height is not None
    ignored = config.resolved.ignored_options
    # Each picture once, at whatever sizes it is trained.
    own = [example for example in training.dataset.trained if example.scale == 0]
    prompts = dict.fromkeys(subject.instance_prompt for subject in config.subjects())
    instance_prompts = tuple(prompt for prompt in prompts if prompt)
    names = token_names(config.token)
    return TrainingFacts(
        output_name=config.output.output_name,
        base_model=public_name(config.model.model_url),
        instance_prompts=instance_prompts,
        num_images=len(own),
        width=width,
        height=height,
        captions=Counter(example.caption for example in own),
        settings={name: value for name, value in config.values().items() if name not in ignored},
        tokens={} if names is None else {name: names.tokens_of(name) for name in names.identifiers},
        token_prompts=tuple(map(names.replaced, instance_prompts)) if names else (),
    )


def _written(folder: RunFolder, role: Role, path: Path) -> FileEvent:
    return FileEvent(role, path.relative_to(folder.root).as_posix())
