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
    "input_blocks|middle_block|output_blocks|in_layers|out_layers|emb_layers|skip_connection"
)


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

    Args:
        denoiser_prefix: what every denoiser key starts with, `lora_unet`.
        text_encoder_prefixes: component name to key prefix, `{"text_encoder": "lora_te"}`.
        layers: prefixes of diffusers layer paths to the prefixes used in the file; a path
            without an entry keeps its diffusers name.
        base_model_version: `ss_base_model_version`.
        architecture: `modelspec.architecture`, without the `/lora` ending.
        implementation: `modelspec.implementation`.
        embedding_keys: text encoder to the key of its new token vectors in embedding files.
    """

    denoiser_prefix: str
    text_encoder_prefixes: Mapping[str, str]
    base_model_version: str
    architecture: str
    implementation: str
    layers: Mapping[str, str] = field(default_factory=dict)
    embedding_keys: Mapping[str, str] = field(default_factory=dict)

    def of_layer(self, component: str, path: str) -> str:
        """The key prefix of one adapted layer: `unet`, `mid_block.…to_q` → `lora_unet_…to_q`."""
        if component in self.text_encoder_prefixes:
            return f"{self.text_encoder_prefixes[component]}_{undot(path)}"
        return f"{self.denoiser_prefix}_{undot(_swap_prefix(path, self.layers))}"

    def layer_of(self, name: str, denoiser: str) -> tuple[str, str]:
        """Component and diffusers layer path behind a key prefix: the inverse of `of_layer`.

        Args:
            name: a key up to its first dot.
            denoiser: the component name that stands behind `denoiser_prefix`.

        Raises:
            KeyError: the name belongs to none of this family's components.
        """
        for component, prefix in self.text_encoder_prefixes.items():
            if name.startswith(f"{prefix}_"):
                return component, redot(name.removeprefix(f"{prefix}_"))
        if not name.startswith(f"{self.denoiser_prefix}_"):
            raise KeyError(name)
        path = redot(name.removeprefix(f"{self.denoiser_prefix}_"))
        return denoiser, _swap_prefix(path, {theirs: ours for ours, theirs in self.layers.items()})


def _swap_prefix(path: str, table: Mapping[str, str]) -> str:
    steps = path.split(".")
    for length in range(len(steps), 0, -1):
        prefix = ".".join(steps[:length])
        if prefix in table:
            return ".".join([table[prefix], *steps[length:]])
    return path
