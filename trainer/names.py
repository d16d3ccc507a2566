"""Names of components, and of layers in the files that other programs read.

Plain data, tables that a family fills in: knows neither tensors nor families. The exporters own
the arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# Words of diffusers and transformers layer paths that contain an underscore themselves:
# everything else between two underscores of a kohya name is a path step of its own.
COMPOUND_WORDS = (
    "down_blocks|up_blocks|mid_block|transformer_blocks|single_transformer_blocks|"
    "to_q|to_k|to_v|to_out|proj_in|proj_out|time_emb_proj|conv_shortcut|conv_in|conv_out|"
    "time_embedding|add_embedding|time_embed|label_emb|linear_1|linear_2|"
    "text_model|self_attn|q_proj|k_proj|v_proj|out_proj|text_projection|layer_norm1|layer_norm2|"
    "input_blocks|middle_block|output_blocks|in_layers|out_layers|emb_layers|skip_connection|"
    "to_add_out|add_q_proj|add_k_proj|add_v_proj|to_qkv_mlp_proj|proj_mlp|ff_context|norm1_context|"
    "linear_in|linear_out|norm_out|x_embedder|context_embedder|time_text_embed|time_guidance_embed|"
    "timestep_embedder|guidance_embedder|text_embedder|single_stream_modulation|"
    "double_stream_modulation_img|double_stream_modulation_txt|"
    "double_blocks|single_blocks|img_attn|txt_attn|img_mlp|txt_mlp|img_mod|txt_mod|img_in|txt_in|"
    "time_in|vector_in|guidance_in|in_layer|out_layer|final_layer|adaLN_modulation"
)

# Forms of adapter as people call them.
ADAPTER_KINDS: Mapping[str, str] = {"lora": "LoRA", "lokr": "LoKr", "loha": "LoHa"}

# A layer by component and path.
Layer = tuple[str, str]


def undot(path: str) -> str:
    """A layer path as kohya files write it: `attn1.to_out.0` becomes `attn1_to_out_0`."""
    return path.replace(".", "_")


def redot(name: str) -> str:
    """The layer path behind a kohya name: the inverse of `undot` for known layer words."""
    words = re.findall(rf"(?:{COMPOUND_WORDS})(?=_|$)|[^_]+", name)
    return ".".join(words)


def tokenizer_name(text_encoder: str) -> str:
    """The component that is a text encoder's tokenizer, as diffusers' pipelines name them."""
    return text_encoder.replace("text_encoder", "tokenizer")


@dataclass(frozen=True)
class KohyaNames:
    """How one model family is written in kohya files (sd-scripts' and ModelSpec's vocabulary).

    In paths of `layers` and `fusions`, `*` stands for the first number, that of the block.

    Args:
        denoiser_prefix: what every denoiser key starts with, `lora_unet`.
        text_encoder_prefixes: component name to key prefix, `{"text_encoder": "lora_te"}`.
        base_model_version: `ss_base_model_version`.
        architecture: `modelspec.architecture`, without the `/lora` ending.
        implementation: `modelspec.implementation`.
        denoiser: the component behind `denoiser_prefix`.
        layers: prefixes of diffusers layer paths to the prefixes used in the file; a path
            without an entry keeps its diffusers name.
        fusions: a layer of the file to the diffusers layers of which it is made, in the order of
            their rows, each with its rows as a multiple of the layer's inputs; a layer may be
            alone in it.
        swapped_halves: diffusers layers the two halves of whose rows change places in the file.
        unfused_prefix: what denoiser keys start with where layers keep their diffusers names,
            because what was trained of them cannot be fused; empty where nothing is.
        network_module: `ss_network_module` of a LoRA.
        diffusers_drops: diffusers layers that diffusers does not take from a kohya file.
        diffusers_width: the only number of inputs for which diffusers can read fused layers whose
            parts have unequal rows; None where it reads all.
        diffusers_reads: forms of adapter that `load_lora_weights` of the family's pipeline reads.
        programs: programs other than diffusers and LyCORIS that read the files.
        embedding_keys: text encoder to the key of its new token vectors in embedding files.
    """

    denoiser_prefix: str
    text_encoder_prefixes: Mapping[str, str]
    base_model_version: str
    architecture: str
    implementation: str
    denoiser: str = "unet"
    layers: Mapping[str, str] = field(default_factory=dict)
    fusions: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    swapped_halves: frozenset[str] = frozenset()
    unfused_prefix: str = ""
    network_module: str = "networks.lora"
    diffusers_drops: frozenset[str] = frozenset()
    diffusers_width: int | None = None
    diffusers_reads: frozenset[str] = frozenset({"lora"})
    programs: tuple[str, ...] = ("ComfyUI", "A1111", "Forge", "InvokeAI", "sd-scripts")
    embedding_keys: Mapping[str, str] = field(default_factory=dict)

    def of_layer(self, component: str, path: str, *, fused: bool = True) -> str:
        """The key prefix of one adapted layer: `unet`, `mid_block.…to_q` → `lora_unet_…to_q`.

        Layers that the file fuses have the same one.

        Args:
            fused: whether layers may be fused; no difference where the family fuses none.
        """
        if component in self.text_encoder_prefixes:
            return f"{self.text_encoder_prefixes[component]}_{undot(path)}"
        if self.unfused_prefix and not fused:
            return f"{self.unfused_prefix}_{undot(path)}"
        home = self._home(path)
        theirs = _swap_prefix(path, self.layers) if home is None else home
        return f"{self.denoiser_prefix}_{undot(theirs)}"

    def layers_of(self, name: str) -> dict[Layer, int]:
        """The diffusers layers behind a key prefix: the inverse of `of_layer`.

        Args:
            name: a key up to its first dot.

        Returns:
            Component and path of each layer, in the order of their rows, with its share of them.

        Raises:
            KeyError: the name belongs to none of this family's components.
        """
        for component, prefix in self.text_encoder_prefixes.items():
            if name.startswith(f"{prefix}_"):
                return {(component, redot(name.removeprefix(f"{prefix}_"))): 1}
        if self.unfused_prefix and name.startswith(f"{self.unfused_prefix}_"):
            return {(self.denoiser, redot(name.removeprefix(f"{self.unfused_prefix}_"))): 1}
        if not name.startswith(f"{self.denoiser_prefix}_"):
            raise KeyError(name)
        path = redot(name.removeprefix(f"{self.denoiser_prefix}_"))
        general, number = _generalised(path)
        if general in self.fusions:
            parts = self.fusions[general].items()
            return {(self.denoiser, _numbered(part, number)): share for part, share in parts}
        ours = {theirs: ours for ours, theirs in self.layers.items()}
        return {(self.denoiser, _swap_prefix(path, ours)): 1}

    def swaps_halves(self, component: str, path: str) -> bool:
        """Whether the halves of a layer's rows change places in the file."""
        return component == self.denoiser and path in self.swapped_halves

    def is_own(self, component: str, path: str) -> bool:
        """Whether the table speaks of a layer of the denoiser: it has a name of its own there."""
        return (
            component == self.denoiser
            and self.of_layer(component, path) != f"{self.denoiser_prefix}_{undot(path)}"
        )

    def _home(self, path: str) -> str | None:
        """The file's layer into which a layer is fused."""
        general, number = _generalised(path)
        for theirs, parts in self.fusions.items():
            if general in parts:
                return _numbered(theirs, number)
        return None


def _swap_prefix(path: str, table: Mapping[str, str]) -> str:
    """The path with the longest prefix that the table knows in other words."""
    steps = path.split(".")
    for length in range(len(steps), 0, -1):
        prefix = ".".join(steps[:length])
        general, number = _generalised(prefix)
        for known in (prefix, general):
            if known in table:
                return ".".join([_numbered(table[known], number), *steps[length:]])
    return path


def _generalised(path: str) -> tuple[str, str]:
    """A path with `*` for its first number, and that number; empty where it has none."""
    steps = path.split(".")
    place = next((i for i, step in enumerate(steps) if step.isdecimal()), None)
    if place is None:
        return path, ""
    return ".".join([*steps[:place], "*", *steps[place + 1 :]]), steps[place]


def _numbered(general: str, number: str) -> str:
    return general.replace("*", number)
