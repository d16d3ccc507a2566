"""A denoiser of which each GPU holds a part (FSDP2), for what does not fit one GPU.

Asked for by accelerate's configuration and done here, since accelerate itself wraps what it is
given as one piece, not on a processor, and not beside adapters that every process has whole. The
frozen or learning weights of each block are put together when it computes and given up after it.
Knows blocks and processes, no family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import environ
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from trainer import shards
from trainer.config import Note, TrainingConfig
from trainer.errors import InputError
from trainer.frozen import repeated_blocks
from trainer.trainables import Trainables, gathered_anew

_USED = "ACCELERATE_USE_FSDP"
_VERSION = "FSDP_VERSION"
_WRAPPING = "FSDP_AUTO_WRAP_POLICY"
_RESHARD = "FSDP_RESHARD_AFTER_FORWARD"
_HERE = "launch with configs/accelerate/fsdp2.yaml, or with a file like it"

# Other launchers' ways to split a model, by accelerate's variable.
_OTHERS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
# Entries of `fsdp_config` that are not done here, by variable, with what to do.
_REFUSED = {
    "FSDP_OFFLOAD_PARAMS": "give false, and `weights_dtype: bf16` or more processes",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "give false: every process reads the base model itself",
    "FSDP_ACTIVATION_CHECKPOINTING": "give false, and the option `gradient_checkpointing: true`",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "give false",
}
# Entries that mean nothing here, by variable: what they hold where they say nothing, and why.
_IDLE = {
    "FSDP_STATE_DICT_TYPE": ("FULL_STATE_DICT", "checkpoints hold whole tensors"),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": ("", "the model itself says what its blocks are"),
    "FSDP_IGNORED_MODULES": ("", "adapters alone are left whole"),
}
_OPTIMIZERS = ("adamw",)


@dataclass(frozen=True)
class Sharding:
    """What the launcher asked for.

    Args:
        reshard_after_forward: give a block's weights up after the forward pass too, and gather
            them again for the backward pass.
        notes: what of its configuration does not act.
    """

    reshard_after_forward: bool
    notes: tuple[Note, ...]


def asked_for(variables: Mapping[str, str] = environ) -> Sharding | None:
    """What `accelerate launch` was told of sharding, by the variables that it sets; None: nothing.

    Raises:
        InputError: it was told something that is not done here.
    """
    for variable, name in _OTHERS.items():
        if _is_true(variables, variable):
            raise InputError.of("accelerate launch", f"`{name}` is not available here", _HERE)
    if not _is_true(variables, _USED):
        return None
    version = variables.get(_VERSION, "1")
    if version != "2":
        message = f"FSDP of version {version} is not available here"
        raise InputError.of("fsdp_version", message, f"give `fsdp_version: 2`; {_HERE}")
    wrapping = variables.get(_WRAPPING, "TRANSFORMER_BASED_WRAP")
    if wrapping != "TRANSFORMER_BASED_WRAP":
        message = f"`{wrapping}` is not available here"
        raise InputError.of("fsdp_auto_wrap_policy", message, "give `TRANSFORMER_BASED_WRAP`")
    for variable, hint in _REFUSED.items():
        if _is_true(variables, variable):
            raise InputError.of(variable.lower(), "`true` is not available here", hint)
    reshard = variables.get(_RESHARD, "true").lower()
    if reshard not in ("true", "false"):
        message = f"`{reshard}` belongs to version 1"
        raise InputError.of(_RESHARD.lower(), message, "give true or false")
    notes = tuple(
        Note(kind="warning", field=variable.lower(), message=f"does not act: {reason}")
        for variable, (nothing, reason) in _IDLE.items()
        if variables.get(variable, nothing) not in (nothing, "None")
    )
    return Sharding(reshard == "true", notes)


def _is_true(variables: Mapping[str, str], name: str) -> bool:
    return variables.get(name, "").lower() in ("1", "true")


@contextmanager
def kept_from_accelerate() -> Iterator[None]:
    """Accelerate sees plain data parallelism while it is set up: sharding is done here."""
    told = environ.pop(_USED, None)
    try:
        yield
    finally:
        if told is not None:
            environ[_USED] = told


def refuse_in_shards(config: TrainingConfig, num_processes: int) -> None:
    """Finds out early what cannot be done in shards.

    Args:
        config: completed.
        num_processes: of this training.

    Raises:
        InputError: an option keeps weights where no shard could be made of them, or needs all.
    """
    if num_processes == 1:
        raise InputError.of(
            "accelerate launch",
            "FSDP needs at least 2 processes",
            "give `num_processes`, or configs/accelerate/one_gpu.yaml",
        )
    for field, (is_so, message, hint) in _impossible(config).items():
        if is_so:
            raise InputError.of(field, f"with FSDP, {message}", hint)


def _impossible(config: TrainingConfig) -> Mapping[str, tuple[bool, str, str]]:
    """Options that cannot be had in shards: whether this is one, why, and what to do."""
    whole = not config.adapter.use_lora
    return {
        "quantization": (
            config.model.quantization != "none",
            "weights in few bits are not sharded",
            "give `quantization: none`, or launch with configs/accelerate/eight_gpus.yaml",
        ),
        "offload_blocks": (
            config.run.offload_blocks > 0,
            "a block in the computer's memory is not sharded",
            "give `offload_blocks: 0`: every further process holds less of the model",
        ),
        "compile_blocks": (
            config.run.compile_blocks is True,
            "a block is put together outside of what would be compiled",
            "leave it out",
        ),
        "channels_last": (
            config.run.channels_last is True and not whole,
            "a shard has no layout to choose",
            "leave it out",
        ),
        "fused_backward": (
            whole and config.optim.fused_backward,
            "gradients are summed over the processes before an update",
            "give `fused_backward: false`",
        ),
        "optimizer": (
            whole and config.optim.optimizer not in _OPTIMIZERS,
            f"`{config.optim.optimizer}` looks at whole tensors or blocks of them, which no "
            "process has",
            f"give {' or '.join(f'`{name}`' for name in _OPTIMIZERS)}",
        ),
        "mixed_precision": (
            whole and config.run.mixed_precision == "fp16",
            "fp16's scaler must see whole gradients",
            "give `bf16` or `no`",
        ),
        "disable_unet_during_ti_training": (
            whole and config.token.disable_unet_during_ti_training,
            "weights that all learn do so from the first step",
            "give false",
        ),
    }


def shard(trainables: Trainables, sharding: Sharding, accelerator: Accelerator) -> Trainables:
    """Spreads the denoiser over all processes, a block at a time, from wherever it is.

    Adapters stay whole in every process; their gradients are not averaged here. A process's GPU
    never holds more than its parts and one whole block.

    Args:
        trainables: what learns; the denoiser is changed in place.
        sharding: as asked for.
        accelerator: says which processes, on what, and in which precision.

    Returns:
        What learns now: where all weights do, other parameters are in their place.
    """
    _, denoiser = trainables.denoiser
    device = accelerator.device
    mesh = init_device_mesh(device.type, (accelerator.num_processes,))
    adapters = set() if trainables.whole else set(trainables.of(["denoiser"]))
    for parameter in adapters:
        parameter.data = parameter.data.to(device)
    # Autocast, where it is asked for; weights are moved and spread below.
    accelerator.prepare_model(denoiser, device_placement=False, evaluation_mode=True)
    # Weights that learn in 32 bits travel in the format that they are multiplied in; otherwise
    # autocast would keep a narrow copy of all of them for the backward pass.
    in_bf16 = trainables.whole and accelerator.mixed_precision == "bf16"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if in_bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    settings: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "ignored_params": adapters}
    for block in repeated_blocks(denoiser):
        fully_shard(block, reshard_after_forward=sharding.reshard_after_forward, **settings)
    # What stands outside of blocks is needed at the end of the forward pass and in what follows.
    fully_shard(denoiser, **settings)
    return gathered_anew(trainables) if trainables.whole else trainables


def put_together(denoiser: torch.nn.Module, *, keep: bool) -> None:
    """Makes an ordinary model of a sharded one, on the processor; to be called by all processes.

    Args:
        denoiser: changed in place; computes no more where it is not kept.
        keep: whether this process wants it; others only send their parts.
    """
    made: dict[int, torch.nn.Parameter] = {}
    sharded = [module for module in denoiser.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.reshard()
    for owner in denoiser.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if id(parameter) not in made:
                full = shards.gathered({name: parameter.detach()}, keep=keep)
                tensor = full[name].cpu() if keep else torch.empty(0, dtype=parameter.dtype)
                made[id(parameter)] = torch.nn.Parameter(tensor, parameter.requires_grad)
            owner.register_parameter(name, made[id(parameter)])
    for module in sharded:
        _forget(module)
    denoiser.to("cpu")


def _forget(module: FSDPModule) -> None:
    """Takes away what `fully_shard` did to a module besides its parameters.

    PyTorch has no way back: its hooks would gather parts that are no longer there.
    """
    state = module._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    # Made of FSDPModule and the class that it was.
    module.__class__ = type(module).__bases__[1]
