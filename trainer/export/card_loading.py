"""The model card's sections on loading: code for diffusers, and what to do in user interfaces."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.export.embeddings import token_file_stems
from trainer.export.facts import TrainingFacts
from trainer.export.state import AdapterState
from trainer.names import ADAPTER_KINDS, KohyaNames, tokenizer_name

# User interfaces: the folder of adapters, that of new tokens, how a prompt names these, and how an
# adapter by this name is used.
_INTERFACES = {
    "ComfyUI": ("models/loras", "models/embeddings", "embedding:{}", 'with the node "Load LoRA"'),
    "A1111": ("models/Lora", "embeddings", "{}", "by `<lora:{}:1>` in the prompt"),
    "Forge": ("models/Lora", "embeddings", "{}", "by `<lora:{}:1>` in the prompt"),
}
# Those whose DoRA divides by the norm of the base weight.
LIKE_COMFYUI = ("ComfyUI", "Forge")
# Takes files through its model manager. Of what is told of it here, its sources were read (v6.14:
# backend/patches/, backend/model_manager/configs/), and nothing was run.
_INVOKE = "InvokeAI"
# Those that take DoRA's magnitudes for those of a weight's columns; ours are of its rows. InvokeAI:
# backend/patches/layers/dora_layer.py; A1111: `apply_weight_decompose` in network.py.
_COLUMN_DORA = ("A1111", _INVOKE)
# Their own adapters leave magnitudes out: sd-scripts' networks/lora.py, musubi-tuner's likewise.
_WITHOUT_DORA = ("sd-scripts", "musubi-tuner")
# Those that give new tokens to CLIP alone.
_CLIP_ONLY = ("A1111", "Forge")
# InvokeAI knows new tokens of several vectors by this key: of CLIP's larger encoder.
_INVOKE_TOKENS = "clip_g"

_WHOLE_DENOISER = "denoiser_weights"
_WHOLE_TEXT_ENCODERS = ("text_encoder_weights", "text_encoder_2_weights")

# Told to all parts: left alone, transformers takes a checkpoint's number format, diffusers 32 bits.
_FORMAT = "dtype=torch.bfloat16"
# No format here: a language model keeps the angles of its positions in 32 bits.
_PLACED = (
    "# With less memory on the GPU: pipe.enable_model_cpu_offload() in place of this.\n"
    'pipe.to("cuda" if torch.cuda.is_available() else "cpu")\n'
)

_POOLING = {
    "diffusers": "`ti_pooling: diffusers`: in a base model whose configuration is older than "
    "transformers 4.31, CLIP's pooled vector was taken at the last new token, as diffusers does "
    "on its own; ComfyUI takes it at the end of the text, so its pictures differ a little.",
    "eos": "`ti_pooling: eos`: CLIP's pooled vector was taken at the end of the text, as ComfyUI "
    "does on its own; the code above makes diffusers do so too.",
}


@dataclass(frozen=True)
class CardFile:
    """A file that the card explains.

    Args:
        role: as in `result.json`.
        name: path relative to the folder of the card.
    """

    role: str
    name: str


def is_hub_id(name: str) -> bool:
    """Whether a name of a base model is `owner/name`, which the hub knows."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def listed(words: Sequence[str]) -> str:
    """Words as a sentence has them: `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def programs_of(names: KohyaNames, state: AdapterState | None) -> list[str]:
    """The programs other than diffusers and LyCORIS that read a kohya file as it is meant.

    Args:
        names: the family's table.
        state: the adapter in the file, or None where it was made of whole weights.
    """
    misreading: tuple[str, ...] = ()
    if state is not None and state.use_dora:
        misreading = (*_COLUMN_DORA, *_WITHOUT_DORA)
    elif state is not None and state.algorithm == "lokr" and names.unfused_prefix:
        misreading = (_INVOKE,)
    return [name for name in names.programs if name not in misreading]


def readers_of_plain(names: KohyaNames, state: AdapterState | None) -> list[str]:
    """Of `programs_of` those that read a kohya file that is not made for ComfyUI."""
    apart = LIKE_COMFYUI if state is not None and state.use_dora else ()
    return [name for name in programs_of(names, state) if name not in apart]


def interfaces(names: KohyaNames) -> list[str]:
    """The user interfaces that read a family's kohya files."""
    return [program for program in names.programs if program in _INTERFACES]


def token_interfaces(names: KohyaNames) -> list[str]:
    """The user interfaces that know new tokens in all of a family's text encoders."""
    only_clip = all(_is_clip(key) for key in names.embedding_keys.values())
    return [name for name in interfaces(names) if only_clip or name not in _CLIP_ONLY]


def _is_clip(key: str) -> bool:
    return key.startswith("clip_")


def _by_place(programs: Sequence[str], which: int) -> dict[str, list[str]]:
    """Programs under the folder, or the way of naming, that they have in common."""
    places: dict[str, list[str]] = {}
    for program in programs:
        places.setdefault(_INTERFACES[program][which], []).append(program)
    return places


def _folders(programs: Sequence[str], which: int) -> str:
    places = _by_place(programs, which)
    return " or ".join(f"`{place}` ({', '.join(found)})" for place, found in places.items())


def loading_sections(
    facts: TrainingFacts,
    files: Sequence[CardFile],
    pipeline_class: str,
    names: KohyaNames,
    state: AdapterState | None,
) -> list[str]:
    """Sections as Markdown; arguments as for `model_card`."""
    found = {file.role: file.name for file in reversed(files)}
    sections = []
    loads = [
        *_whole_components(found),
        *_adapter(found, names, state),
        *_embeddings(found, facts, names),
    ]
    if loads:
        start = (
            f"import torch\nfrom diffusers import {pipeline_class}\n\n"
            f"pipe = {pipeline_class}.{_base_model_loader(facts.base_model)}\n"
        )
        prompts = facts.token_prompts if "embeddings" in found else facts.instance_prompts
        code = start + "".join(loads) + _PLACED + _pictures(prompts, _told_beside_prompts(facts))
        sections.append(_diffusers_section(code))
    if "kohya_lora" in found or "kohya_lora_comfyui" in found:
        sections.append(_interface_section(found, names, state))
    if "embeddings" in found:
        sections.append(_tokens_section(facts, files, names))
    return sections


def _told_beside_prompts(facts: TrainingFacts) -> str:
    """Arguments that make prompts what captions were in training."""
    length = facts.settings.get("max_sequence_length")
    return "" if length is None else f", max_sequence_length={length}"


def _pictures(prompts: Sequence[str], told: str) -> str:
    # By name: what comes first is a picture in some pipelines.
    if len(prompts) <= 1:
        prompt = "".join(prompts) or "what you would like to see"
        return f"image = pipe(prompt={json.dumps(prompt, ensure_ascii=False)}{told}).images[0]"
    lines = [f"    {json.dumps(prompt, ensure_ascii=False)},\n" for prompt in prompts]
    made = f"images = [pipe(prompt=p{told}).images[0] for p in prompts]"
    return f"prompts = [\n{''.join(lines)}]\n{made}"


def _whole_components(found: Mapping[str, str]) -> list[str]:
    folders = [
        found[role].partition("/")[0]
        for role in (_WHOLE_DENOISER, *_WHOLE_TEXT_ENCODERS)
        if role in found
    ]
    return [
        f'pipe.{component} = type(pipe.{component}).from_pretrained("{component}", {_FORMAT})\n'
        for component in folders
    ]


def _adapter(found: Mapping[str, str], names: KohyaNames, state: AdapterState | None) -> list[str]:
    if state is None or "diffusers_lora" not in found:
        return []
    return [_load_snippet(state, names, found["diffusers_lora"])]


def _embeddings(found: Mapping[str, str], facts: TrainingFacts, names: KohyaNames) -> list[str]:
    if "embeddings" not in found:
        return []
    tokens = json.dumps([token for each in facts.tokens.values() for token in each])
    encoders = [
        (key, f"pipe.{component}", f"pipe.{tokenizer_name(component)}")
        for component, key in names.embedding_keys.items()
    ]
    lines = ["from safetensors.torch import load_file", ""]
    lines += [f'vectors = load_file("{found["embeddings"]}")', f"tokens = {tokens}"]
    lines += [
        f'pipe.load_textual_inversion(vectors["{key}"], token=tokens, '
        f"text_encoder={encoder}, tokenizer={tokenizer})"
        for key, encoder, tokenizer in encoders
    ]
    if facts.settings.get("ti_pooling") == "eos":
        pooled = [(encoder, tokenizer) for key, encoder, tokenizer in encoders if _is_clip(key)]
        pairs = ", ".join(f"({encoder}, {tokenizer})" for encoder, tokenizer in pooled)
        lines += [
            f"for encoder, tokenizer in [{pairs}]:",
            "    for module in encoder.modules():",
            '        if hasattr(module, "eos_token_id"):',
            "            module.eos_token_id = tokenizer.eos_token_id",
        ]
    return ["\n".join([*lines, ""])]


def _base_model_loader(name: str) -> str:
    """The call that loads the base model; a local one lies elsewhere on every machine."""
    if is_hub_id(name):
        return f'from_pretrained("{name}", {_FORMAT})'
    method = "from_single_file" if name.endswith(".safetensors") else "from_pretrained"
    return f'{method}("path/to/{name}", {_FORMAT})  # the base model it was trained on'


def _diffusers_section(code: str) -> str:
    return f"## Loading with diffusers\n\nFrom the folder of this card:\n\n```python\n{code}\n```"


def _load_snippet(state: AdapterState, names: KohyaNames, name: str) -> str:
    if state.algorithm in names.diffusers_reads:
        return f'pipe.load_lora_weights(".", weight_name="{name}")\n'
    kind = {"lokr": "LoKrConfig", "loha": "LoHaConfig"}[state.algorithm]
    return f"""\
# `load_lora_weights` has no {ADAPTER_KINDS[state.algorithm]} for this model; PEFT has.
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


def _interface_section(
    found: Mapping[str, str], names: KohyaNames, state: AdapterState | None
) -> str:
    known = [name for name in names.programs if name in (*_INTERFACES, _INVOKE)]
    read = programs_of if "kohya_lora_comfyui" in found else readers_of_plain
    readers = [name for name in read(names, state) if name in known]
    ways: dict[str, list[str]] = {}
    for program in readers:
        ways.setdefault(_way(program, found), []).append(program)
    lines = [f"- {listed(programs)}: {way}" for way, programs in ways.items()]
    misreading = [name for name in known if name not in readers]
    if misreading:
        lines.append(f"- Not {listed(misreading)}: what these files hold is read otherwise there.")
    return "\n".join([f"## Loading in {listed(readers) or 'user interfaces'}", "", *lines])


def _way(program: str, found: Mapping[str, str]) -> str:
    """What to do with which file in a program."""
    of_its_own = program in LIKE_COMFYUI and "kohya_lora_comfyui" in found
    name = found.get("kohya_lora_comfyui" if of_its_own else "kohya_lora", "")
    name = name or found["kohya_lora_comfyui"]
    if program == _INVOKE:
        return (
            "in the Model Manager choose “Add Models”, give the path of this folder, scan it and "
            f"install `{name}`; then add it as a concept of weight 1."
        )
    folder, _, _, use = _INTERFACES[program]
    how = use.format(name.removesuffix(".safetensors"))
    return f"put `{name}` into `{folder}` and load it at strength 1 {how}."


def _tokens_section(facts: TrainingFacts, files: Sequence[CardFile], names: KohyaNames) -> str:
    stems = token_file_stems(facts)
    written = {
        file.name.removesuffix(".safetensors"): file.name
        for file in files
        if file.role == "token_embedding"
    }
    programs = token_interfaces(names)
    ways = _by_place(programs, 2)
    also = ""
    if _INVOKE in names.programs and _INVOKE_TOKENS in names.embedding_keys.values():
        ways["<{}>"] = [_INVOKE]
        also = f", or installed by {_INVOKE}'s Model Manager"
    heads = ["identifier", "in diffusers", "file", *(f"in {', '.join(p)}" for p in ways.values())]
    rows = [
        _row(
            f"`{identifier}`",
            f"`{''.join(tokens)}`",
            f"`{written[stems[identifier]]}`",
            *(f"`{way.format(stems[identifier])}`" for way in ways),
        )
        for identifier, tokens in facts.tokens.items()
    ]
    lines = [
        "## New tokens",
        "",
        "An identifier of the captions stands for new tokens, which a prompt must name: in "
        "diffusers by the tokens themselves, in user interfaces by the name of the "
        f"identifier's own file, after it was put into {_folders(programs, 1)}{also}.",
        "",
        _row(*heads),
        "|" + "---|" * len(heads),
        *rows,
    ]
    if len(names.embedding_keys) > 1:
        keys = [f"`{key}` for `{component}`" for component, key in names.embedding_keys.items()]
        lines += ["", f"Each file has vectors for every text encoder: {listed(keys)}."]
    pooling = facts.settings.get("ti_pooling")
    if pooling in _POOLING:
        lines += ["", _POOLING[pooling]]
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
