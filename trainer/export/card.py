"""The model card: what was trained, how each file is loaded, and what was checked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from trainer.export.card_loading import (
    LIKE_COMFYUI,
    CardFile,
    interfaces,
    is_hub_id,
    listed,
    loading_sections,
    readers_of_plain,
    token_interfaces,
)
from trainer.export.extraction import Extraction
from trainer.export.facts import TrainingFacts
from trainer.export.state import AdapterState, Strength
from trainer.export.verify import Check, nothing_learnt
from trainer.job import MEANINGS
from trainer.names import ADAPTER_KINDS, KohyaNames

# Hyperparameters that a reader of the card wants to know; the rest is in the configuration.
_SHOWN_SETTINGS = (
    "max_train_steps",
    "batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "text_encoder_lr",
    "optimizer",
    "lr_scheduler",
    "lr_warmup_steps",
    "snr_gamma",
    "timestep_density",
    "timestep_shift",
    "guidance_scale",
    "max_sequence_length",
    "noise_offset",
    "caption_dropout",
    "mixed_precision",
    "save_dtype",
    "seed",
)

_KOHYA_TAGS = {"lora": (), "lokr": ("lycoris",), "loha": ("lycoris",)}


def model_card(
    facts: TrainingFacts,
    files: Sequence[CardFile],
    checks: Sequence[Check],
    *,
    pipeline_class: str,
    names: KohyaNames,
    state: AdapterState | None,
    extraction: Extraction | None = None,
    tags: Sequence[str] = (),
) -> str:
    """The card as Markdown with the hub's front-matter; equal input gives equal text.

    Args:
        facts: what was trained.
        files: the result files.
        checks: what verification found.
        pipeline_class: the diffusers class that loads the base model.
        names: the family's table; says the keys of the new tokens' vectors.
        state: the trained adapter, or None where all weights were trained.
        extraction: the LoRA that was made from fully trained weights, if any.
        tags: further tags for the hub, such as the family's.
    """
    sections = [
        _front_matter(facts, state, tags),
        f"# {facts.output_name}\n\n{_summary(facts, files, state)}",
        _settings(facts, state),
        "## Files\n\n"
        + "\n".join(f"- `{file.name}`: {_meaning(file, names, state)}" for file in files),
        *loading_sections(facts, files, pipeline_class, names, state),
    ]
    if extraction is not None:
        sections.append(_extraction(extraction, files))
    if state is not None and state.use_dora:
        sections.append(_DORA)
    if checks:
        sections.append(_verification(checks))
    return "\n\n".join(section for section in sections if section) + "\n"


def _meaning(file: CardFile, names: KohyaNames, state: AdapterState | None) -> str:
    return MEANINGS[file.role].format(
        programs=listed([*readers_of_plain(names, state), "LyCORIS"]),
        comfyui=listed([name for name in interfaces(names) if name in LIKE_COMFYUI]),
        interfaces=listed(token_interfaces(names)),
    )


_DORA = """## DoRA magnitudes

Programs disagree on DoRA magnitudes in kohya files, so no single file is right everywhere. The
diffusers file and the plain kohya file follow the paper, PEFT and LyCORIS: each row of the
changed weight gets the norm `m`. ComfyUI and Forge divide by the norm of the base weight
instead; a file whose name ends in `_comfyui` is made for them and is wrong elsewhere. The header
field `dora_convention` says which is which. diffusers ignores the magnitudes of kohya files, so
give it the diffusers file."""


def _front_matter(facts: TrainingFacts, state: AdapterState | None, tags: Sequence[str]) -> str:
    kind = "full-finetune" if state is None else state.algorithm
    all_tags = ["text-to-image", "diffusers", kind, *tags]
    if state is not None:
        all_tags += ["template:sd-lora", *_KOHYA_TAGS[state.algorithm]]
        all_tags += ["dora"] if state.use_dora else []
    lines = ["---", "library_name: diffusers", "pipeline_tag: text-to-image"]
    if is_hub_id(facts.base_model):
        relation = "finetune" if state is None else "adapter"
        lines += [f"base_model: {facts.base_model}", f"base_model_relation: {relation}"]
    # A JSON string is a YAML string, whatever is in it. The hub takes one prompt only.
    lines += [
        f"instance_prompt: {json.dumps(prompt, ensure_ascii=False)}"
        for prompt in facts.instance_prompts[:1]
    ]
    unique = dict.fromkeys(all_tags)
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in unique), "---"])


def _summary(facts: TrainingFacts, files: Sequence[CardFile], state: AdapterState | None) -> str:
    base = f"`{facts.base_model}`" if facts.base_model else "its base model"
    if state is None:
        folders = [f"`{file.name.partition('/')[0]}`" for file in files if file.role in _WHOLE]
        what = f"All weights of {' and '.join(folders) or 'the denoiser'} of {base}"
    else:
        name = "DoRA" if state.use_dora else ADAPTER_KINDS[state.algorithm]
        components = ", ".join(f"`{component}`" for component in sorted(state.components))
        what = f"A {name} adapter of rank {_ranks(state)} for {base}, on {components}"
    if facts.tokens:
        what += f", with new tokens for {', '.join(f'`{name}`' for name in facts.tokens)}"
    pictures = "picture" if facts.num_images == 1 else "pictures"
    text = f"{what}, trained on {facts.num_images} {pictures}."
    prompts = [f"`{prompt}`" for prompt in facts.instance_prompts]
    if len(prompts) > 1:
        return "\n".join(
            [f"{text}\n\nPrompts it was trained with:\n", *(f"- {p}" for p in prompts)]
        )
    return f"{text}\n\nPrompt it was trained with: {prompts[0]}" if prompts else text


_WHOLE = ("denoiser_weights", "text_encoder_weights", "text_encoder_2_weights")


def _ranks(state: AdapterState) -> str:
    ranks = dict.fromkeys(state.strengths[component].rank for component in sorted(state.components))
    return " and ".join(map(str, sorted(ranks)))


def _settings(facts: TrainingFacts, state: AdapterState | None) -> str:
    shown = {name: facts.settings.get(name) for name in _SHOWN_SETTINGS}
    if facts.width and facts.height:
        shown = {"resolution": f"{facts.width} x {facts.height}", **shown}
    if state is not None:
        shown = dict(_strength_rows(state.strengths)) | shown
    rows = [f"| {name} | {value} |" for name, value in shown.items() if value is not None]
    lines = ["## Training", "", "| setting | value |", "|---|---|", *rows]
    return "\n".join([*lines, *_precision(facts, state)])


def _precision(facts: TrainingFacts, state: AdapterState | None) -> list[str]:
    """What was not in 32 bits while it learnt."""
    bits = facts.settings.get("quantization", "none")
    if state is not None and bits != "none":
        return [
            "",
            f"The base model's denoiser was kept in `{bits}` while the adapter learnt; the files "
            "are for the base model as it was before.",
        ]
    if state is None and facts.settings.get("weights_dtype") == "bf16":
        return ["", "The weights learnt in bf16, each update rounded up or down by chance."]
    return []


def _strength_rows(strengths: Mapping[str, Strength]) -> Iterator[tuple[str, str]]:
    """Rank and alpha, once for all components or once for each."""
    is_one = len(set(strengths.values())) == 1
    for component, strength in list(strengths.items())[: 1 if is_one else None]:
        of = "" if is_one else f" of `{component}`"
        yield f"rank{of}", str(strength.rank)
        yield f"alpha{of}", f"{strength.alpha:g} (folded into the weights)"


def _extraction(extraction: Extraction, files: Sequence[CardFile]) -> str:
    names = {file.role: file.name for file in files}
    found = [names[role] for role in ("diffusers_lora", "kohya_lora") if role in names]
    if not found:
        return "## Extracted LoRA\n\nThere is none: no layer changed."
    lines = [
        "## Extracted LoRA",
        "",
        f"{' and '.join(f'`{name}`' for name in found)}: the best LoRA of rank {extraction.rank} "
        "for what training changed, made by singular value decomposition. Load it on the base "
        f"model instead of the full weights{_load_call(names)}. What it misses of the layers' "
        f"change is {extraction.residual:.1%} of its size (the residual's norm).",
    ]
    if extraction.left_out:
        lines[-1] += (
            " No LoRA can hold norms, biases and embeddings; they carry "
            f"{extraction.left_out_share:.1%} of the squared change."
        )
    if "extraction_report" in names:
        lines[-1] += f" `{names['extraction_report']}` has the numbers of each layer."
    return "\n".join(lines)


def _load_call(names: Mapping[str, str]) -> str:
    if "diffusers_lora" not in names:
        return ""
    name = names["diffusers_lora"]
    return f': `pipe.load_lora_weights(".", weight_name="{name}")`'


def _verification(checks: Sequence[Check]) -> str:
    head = [
        "## Verification",
        "",
        "Each file was loaded into a fresh base model; differences are those of the largest layer, "
        "relative to its weight and to what training changed of it.",
        "",
        "| file | reader | result | tensors | of weight | of change |",
        "|---|---|---|---|---|---|",
    ]
    if nothing_learnt(checks):
        head[2:2] = [
            "**Nothing was learnt**: every trained layer equals that of the base model.",
            "",
        ]
    return "\n".join([*head, *(_check_row(check) for check in checks)])


def _check_row(check: Check) -> str:
    name = check.path.removeprefix("outputs/")
    if check.status == "not checked":
        return f"| `{name}` | {check.reader} | not checked: {check.reason} | | | |"
    keys = f"{check.keys_matched} of {check.keys_total}"
    differences = [
        "unknown" if value is None else f"{value:.1e}"
        for value in (check.largest_difference, check.largest_change_difference)
    ]
    return f"| `{name}` | {check.reader} | {check.status} | {keys} | {' | '.join(differences)} |"
