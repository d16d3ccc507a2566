"""The model card: what was trained, how each file is loaded, and what was checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.export.facts import TrainingFacts
from trainer.export.state import AdapterState
from trainer.export.verify import Check, nothing_learnt

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
    "noise_offset",
    "caption_dropout",
    "mixed_precision",
    "save_dtype",
    "seed",
)

_KINDS = {"lora": "LoRA", "lokr": "LoKr", "loha": "LoHa"}
_KOHYA_TAGS = {"lora": (), "lokr": ("lycoris",), "loha": ("lycoris",)}


@dataclass(frozen=True)
class CardFile:
    """A file that the card explains.

    Args:
        role: as in `result.json`.
        name: path relative to the folder of the card.
    """

    role: str
    name: str


def model_card(
    facts: TrainingFacts,
    files: Sequence[CardFile],
    checks: Sequence[Check],
    *,
    pipeline_class: str,
    state: AdapterState | None,
    tags: Sequence[str] = (),
) -> str:
    """The card as Markdown with the hub's front-matter; equal input gives equal text.

    Args:
        facts: what was trained.
        files: the result files.
        checks: what verification found.
        pipeline_class: the diffusers class that loads the base model.
        state: the trained adapter, or None where all weights were trained.
        tags: further tags for the hub, such as the family's.
    """
    sections = [
        _front_matter(facts, state, tags),
        f"# {facts.output_name}\n\n{_summary(facts, state)}",
        _settings(facts, state),
        "## Files\n\n" + "\n".join(f"- `{file.name}`: {_MEANINGS[file.role]}" for file in files),
        *_loading(facts, files, pipeline_class, state),
    ]
    if state is not None and state.use_dora:
        sections.append(_DORA)
    if checks:
        sections.append(_verification(checks))
    return "\n\n".join(section for section in sections if section) + "\n"


_MEANINGS: Mapping[str, str] = {
    "diffusers_lora": "the adapter for diffusers",
    "kohya_lora": "the adapter for ComfyUI, A1111, Forge, sd-scripts and LyCORIS",
    "kohya_lora_comfyui": "the same with DoRA magnitudes for ComfyUI and Forge",
    "peft_folder": "the adapter of one component as a PEFT folder",
    "denoiser_weights": "all weights of the denoiser",
    "text_encoder_weights": "all weights of the text encoder",
    "text_encoder_2_weights": "all weights of the second text encoder",
    "embeddings": "the learnt tokens",
    "config": "the resolved configuration",
    "model_card": "this card",
    "loss_plot": "the course of the loss",
    "verification": "what each reader read back",
    "debug_dataset": "the pictures as they were trained",
    "debug_masks": "the masks as the loss used them",
}

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
    if _is_hub_id(facts.base_model):
        relation = "finetune" if state is None else "adapter"
        lines += [f"base_model: {facts.base_model}", f"base_model_relation: {relation}"]
    if facts.instance_prompt:
        # A JSON string is a YAML string, whatever is in it.
        lines.append(f"instance_prompt: {json.dumps(facts.instance_prompt, ensure_ascii=False)}")
    unique = dict.fromkeys(all_tags)
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in unique), "---"])


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def _summary(facts: TrainingFacts, state: AdapterState | None) -> str:
    base = f"`{facts.base_model}`" if facts.base_model else "its base model"
    if state is None:
        what = f"All weights of the denoiser of {base}"
    else:
        name = "DoRA" if state.use_dora else _KINDS[state.algorithm]
        components = ", ".join(f"`{component}`" for component in sorted(state.components))
        what = f"A {name} adapter of rank {state.rank} for {base}, on {components}"
    pictures = "picture" if facts.num_images == 1 else "pictures"
    text = f"{what}, trained on {facts.num_images} {pictures}."
    if facts.instance_prompt:
        text += f"\n\nPrompt it was trained with: `{facts.instance_prompt}`"
    return text


def _settings(facts: TrainingFacts, state: AdapterState | None) -> str:
    shown = {name: facts.settings.get(name) for name in _SHOWN_SETTINGS}
    if facts.width and facts.height:
        shown = {"resolution": f"{facts.width} x {facts.height}", **shown}
    if state is not None:
        adapter = {"rank": state.rank, "alpha": f"{state.alpha:g} (folded into the weights)"}
        shown = {**adapter, **shown}
    rows = [f"| {name} | {value} |" for name, value in shown.items() if value is not None]
    return "\n".join(["## Training", "", "| setting | value |", "|---|---|", *rows])


def _loading(
    facts: TrainingFacts,
    files: Sequence[CardFile],
    pipeline_class: str,
    state: AdapterState | None,
) -> list[str]:
    names = {file.role: file.name for file in reversed(files)}
    start = (
        f"from diffusers import {pipeline_class}\n\n"
        f"pipe = {pipeline_class}.{_base_model_loader(facts.base_model)}\n"
    )
    end = f"image = pipe({json.dumps(facts.instance_prompt, ensure_ascii=False)}).images[0]"
    sections = []
    if state is None and "denoiser_weights" in names:
        component = names["denoiser_weights"].partition("/")[0]
        load = f'pipe.{component} = type(pipe.{component}).from_pretrained("{component}")\n'
        sections.append(_diffusers_section(start + load + end))
    if state is not None and "diffusers_lora" in names:
        load = _load_snippet(state, names["diffusers_lora"])
        sections.append(_diffusers_section(start + load + end))
    if "kohya_lora" in names or "kohya_lora_comfyui" in names:
        sections.append(_interface_section(names))
    return sections


def _base_model_loader(name: str) -> str:
    """The call that loads the base model; a local one lies elsewhere on every machine."""
    if _is_hub_id(name):
        return f'from_pretrained("{name}")'
    method = "from_single_file" if name.endswith(".safetensors") else "from_pretrained"
    return f'{method}("path/to/{name}")  # the base model it was trained on'


def _diffusers_section(code: str) -> str:
    return f"## Loading with diffusers\n\nFrom the folder of this card:\n\n```python\n{code}\n```"


def _load_snippet(state: AdapterState, name: str) -> str:
    if state.algorithm == "lora":
        return f'pipe.load_lora_weights(".", weight_name="{name}")\n'
    kind = {"lokr": "LoKrConfig", "loha": "LoHaConfig"}[state.algorithm]
    return f"""\
# `load_lora_weights` has no {_KINDS[state.algorithm]} for this model; PEFT has.
import json
from peft import {kind}, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open

with safe_open("{name}", framework="pt") as file:
    header = json.loads(file.metadata()["lora_adapter_metadata"])
    tensors = {{key: file.get_tensor(key) for key in file.keys()}}
for component in sorted({{key.split(".")[0] for key in tensors}}):
    model = getattr(pipe, component)
    config = {{k.split(".", 1)[1]: v for k, v in header.items() if k.startswith(component + ".")}}
    state = {{k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(component + ".")}}
    if not hasattr(model, "text_model"):
        state = {{key.removeprefix("text_model."): value for key, value in state.items()}}
    inject_adapter_in_model({kind}(**config), model)
    set_peft_model_state_dict(model, state)
"""


def _interface_section(names: Mapping[str, str]) -> str:
    lines = ["## Loading in ComfyUI, A1111 and Forge", ""]
    if "kohya_lora" in names:
        lines.append(
            f"Put `{names['kohya_lora']}` into `models/loras` (ComfyUI) or `models/Lora` (A1111, "
            "Forge) and load it at strength 1."
        )
    if "kohya_lora_comfyui" in names:
        lines.append(
            f"In ComfyUI and Forge take `{names['kohya_lora_comfyui']}` instead: see below."
        )
    return "\n".join(lines)


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
