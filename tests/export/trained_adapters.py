"""Adapters with random weights on tiny pipelines; PEFT's own merge says what is true of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from copies import copied_module
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer

from trainer.export.state import AdapterState, Strength
from trainer.families.flux import FAMILY as FLUX
from trainer.families.flux2 import FAMILY as FLUX2
from trainer.names import KohyaNames

UNET_TARGETS = ["to_k", "to_q", "to_v", "to_out.0", "conv1", "conv2"]
DENOISER_TARGETS = {
    "sd15": UNET_TARGETS,
    "sdxl": UNET_TARGETS,
    "flux": [
        *FLUX.target_modules,
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "proj_mlp",
        "ff.net.2",
    ],
    "flux2": [
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"),
        *(
            "to_qkv_mlp_proj",
            "single_transformer_blocks.0.attn.to_out",
            "ff.linear_in",
            "ff_context.linear_out",
        ),
    ],
}
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def sgm_layers() -> dict[str, str]:
    """SDXL's UNet names for two layers per block, written out by hand from its block diagram.

    Source: `input_blocks` and `output_blocks` of the original checkpoint's key list.
    """
    attentions = {
        "down_blocks.1.attentions.0": "input_blocks.4.1",
        "down_blocks.1.attentions.1": "input_blocks.5.1",
        "down_blocks.2.attentions.0": "input_blocks.7.1",
        "down_blocks.2.attentions.1": "input_blocks.8.1",
        "mid_block.attentions.0": "middle_block.1",
        "up_blocks.0.attentions.0": "output_blocks.0.1",
        "up_blocks.0.attentions.1": "output_blocks.1.1",
        "up_blocks.0.attentions.2": "output_blocks.2.1",
        "up_blocks.1.attentions.0": "output_blocks.3.1",
        "up_blocks.1.attentions.1": "output_blocks.4.1",
        "up_blocks.1.attentions.2": "output_blocks.5.1",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    }
    resnets = {
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.resnets.1": "input_blocks.2.0",
        "down_blocks.1.resnets.0": "input_blocks.4.0",
        "down_blocks.1.resnets.1": "input_blocks.5.0",
        "down_blocks.2.resnets.0": "input_blocks.7.0",
        "down_blocks.2.resnets.1": "input_blocks.8.0",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.resnets.1": "middle_block.2",
        "up_blocks.0.resnets.0": "output_blocks.0.0",
        "up_blocks.0.resnets.1": "output_blocks.1.0",
        "up_blocks.0.resnets.2": "output_blocks.2.0",
        "up_blocks.1.resnets.0": "output_blocks.3.0",
        "up_blocks.1.resnets.1": "output_blocks.4.0",
        "up_blocks.1.resnets.2": "output_blocks.5.0",
        "up_blocks.2.resnets.0": "output_blocks.6.0",
        "up_blocks.2.resnets.1": "output_blocks.7.0",
        "up_blocks.2.resnets.2": "output_blocks.8.0",
    }
    inside = {
        "conv1": "in_layers.2",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    convolutions = {
        f"{ours}.{part}": f"{theirs}.{original}"
        for ours, theirs in resnets.items()
        for part, original in inside.items()
    }
    ends = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
    return attentions | convolutions | ends


SD15 = KohyaNames(
    denoiser_prefix="lora_unet",
    text_encoder_prefixes={"text_encoder": "lora_te"},
    base_model_version="sd_v1",
    architecture="stable-diffusion-v1",
    implementation="diffusers",
    embedding_keys={"text_encoder": "clip_l"},
)
SDXL = KohyaNames(
    denoiser_prefix="lora_unet",
    text_encoder_prefixes={"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    base_model_version="sdxl_base_v1-0",
    architecture="stable-diffusion-xl-v1-base",
    implementation="https://github.com/Stability-AI/generative-models",
    layers=sgm_layers(),
    embedding_keys={"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
)
TABLES = {"flux": FLUX.kohya, "flux2": FLUX2.kohya, "sd15": SD15, "sdxl": SDXL}


@dataclass(frozen=True)
class TrainedAdapter:
    """A trained adapter, the weights that PEFT merges it into, and its base model."""

    state: AdapterState
    weights: dict[str, dict[str, torch.Tensor]]
    base: Any
    names: KohyaNames

    def fresh(self) -> Any:
        """An untouched pipeline, with models of its own where an adapter may go."""
        return _copy(self.base, (self.names.denoiser, *self.names.text_encoder_prefixes))

    def base_weight(self, component: str, path: str) -> torch.Tensor:
        """The weight of a layer before training."""
        return self.base.components[component].get_submodule(path).weight.detach()


def train(
    folder: Path,
    family: str,
    algorithm: str = "lora",
    *,
    use_dora: bool = False,
    rank: int = 4,
    alpha: float = 4,
    text: Strength | None = None,
    targets: Sequence[str] | None = None,
    **options: Any,
) -> TrainedAdapter:
    """A random adapter on layers of a tiny pipeline's denoiser and of its text encoders.

    Args:
        text: rank and alpha of the text encoders; None: those of the denoiser.
        targets: endings of the denoiser's layers; None: some of every kind.
    """
    base = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    denoiser = TABLES[family].denoiser
    adapted = (denoiser, *TABLES[family].text_encoder_prefixes)
    pipeline = _copy(base, adapted)
    torch.manual_seed(7)
    states, weights, strengths = {}, {}, {}
    for component in adapted:
        model = pipeline.components[component]
        ours = DENOISER_TARGETS[family] if targets is None else targets
        wanted = list(ours) if component == denoiser else TEXT_TARGETS
        is_text = component != denoiser and text is not None
        strength = strengths[component] = text if is_text else Strength(rank, alpha)
        peft.inject_adapter_in_model(
            _config(algorithm, strength, wanted, use_dora, dict(options)), model
        )
        _randomise(model)
        states[component] = {
            name: tensor.clone() for name, tensor in peft.get_peft_model_state_dict(model).items()
        }
        weights[component] = _merge(model)
    state = AdapterState(algorithm, use_dora, states, strengths)
    return TrainedAdapter(state, weights, base, TABLES[family])


def _copy(base: Any, trained_components: tuple[str, ...]) -> Any:
    """A pipeline with models and tokenizers of its own where training may go."""
    parts = base.components
    copies = {name: copied_module(parts[name]) for name in parts if name in trained_components}
    tokenizers = [name for name in parts if name.startswith("tokenizer")]
    copies |= {name: copy.deepcopy(parts[name]) for name in tokenizers}
    return type(base)(**{**parts, **copies})


def _config(
    algorithm: str,
    strength: Strength,
    targets: list[str],
    use_dora: bool,
    options: dict[str, Any],
) -> peft.PeftConfig:
    if "second_rank" in options:
        second = options.pop("second_rank")
        pattern = {name: second for name in ("to_k", "conv1", "q_proj") if name in targets}
        options |= {"rank_pattern": pattern, "alpha_pattern": pattern}
    common = {"r": strength.rank, "target_modules": targets, **options}
    if algorithm == "lora":
        return peft.LoraConfig(lora_alpha=strength.alpha, use_dora=use_dora, **common)
    kinds = {"lokr": peft.LoKrConfig, "loha": peft.LoHaConfig}
    return kinds[algorithm](alpha=strength.alpha, **common)


def _randomise(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
            elif any(mark in name for mark in ("lora_", "lokr_", "hada_")):
                parameter.normal_(std=0.1)


def _merge(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    merged = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            merged[name] = module.get_base_layer().weight.detach().clone()
    return merged
