"""What a training that ran out of memory could do without, in words.

Knows options, neither models nor machines.
"""

from __future__ import annotations

from trainer.config import TrainingConfig


def remedies(config: TrainingConfig) -> str:
    """Up to three settings that would save memory in a training, the most helpful first."""
    adapter, width = config.adapter, config.data.resolution_width
    priority = config.data.priority
    known = [
        (not config.run.gradient_checkpointing, "gradient_checkpointing: true"),
        (
            config.run.batch_size > 1,
            "batch_size: 1 with gradient_accumulation_steps: "
            f"{config.run.batch_size * config.run.gradient_accumulation_steps}",
        ),
        (
            not adapter.use_lora and adapter.weights_dtype == "fp32",
            "weights_dtype: bf16 with fused_backward: true",
        ),
        (adapter.use_lora and config.model.quantization == "none", "quantization: nf4"),
        (not adapter.use_lora, "use_lora: true"),
        (config.prior.with_prior_preservation, "with_prior_preservation: false"),
        (config.optim.optimizer == "adamw", "optimizer: adamw8bit"),
        (priority in ("quality", "high_res_only"), "priority: speed"),
        (
            priority is None and (width is None or width > 512),
            "resolution_width and resolution_height: 512",
        ),
        (not config.data.cache_latents, "cache_latents: true"),
        (adapter.use_lora and adapter.rank > 8, "rank: 8"),
    ]
    helpful = [setting for helps, setting in known if helps][:3]
    return "try " + ", or ".join(helpful) if helpful else "a GPU with more memory is needed"
