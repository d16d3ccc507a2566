"""Tensors of which each process holds a part: the part here, the whole of it, norms over all parts.

Parts are rows: of n processes, each holds as many as the first, the last what is left, perhaps none
(PyTorch's `Shard(0)`). A tensor that every process holds whole is its own part. What gathers or
sums must be called by all processes, with tensors of the same names and shapes. Knows no models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this process holds a part of it only."""
    return isinstance(tensor, DTensor)


def part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds, without a copy."""
    if not isinstance(tensor, DTensor):
        return tensor
    local: torch.Tensor = tensor.to_local().detach()
    return local


def rank(tensor: torch.Tensor) -> int:
    """Which of the parts is held here, from 0."""
    return tensor.device_mesh.get_local_rank() if isinstance(tensor, DTensor) else 0


def part_of(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The rows of a whole tensor that this process holds of another of its shape.

    Args:
        whole: on any device.
        like: sharded, or whole itself.
    """
    if not isinstance(like, DTensor):
        return whole
    rows = -(-len(whole) // like.device_mesh.size())
    first = min(rank(like) * rows, len(whole))
    return whole[first : first + rows]


def whole(local: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """All parts together, on the device of the part here.

    Args:
        local: a part, shaped as that of `like` here.
        like: what it is a part of; where that is not sharded, `local` is returned.
    """
    if not isinstance(like, DTensor):
        return local
    gathered: torch.Tensor = DTensor.from_local(
        local.contiguous(),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    ).full_tensor()
    return gathered


def gathered(tensors: Mapping[str, torch.Tensor], *, keep: bool) -> dict[str, torch.Tensor]:
    """Tensors by name, whole; sharded ones on the processor, put together one after the other.

    Args:
        tensors: whole or sharded.
        keep: whether this process wants them; others only send their parts, and get nothing.
    """
    answer: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        full = whole(part(tensor), tensor)
        if keep:
            answer[name] = full.cpu() if is_sharded(tensor) else full
    return answer


def put(tensors: Mapping[str, torch.Tensor], into: Mapping[str, torch.Tensor]) -> None:
    """Copies whole tensors by name into whole or sharded ones, in place."""
    assert tensors.keys() == into.keys()
    with torch.no_grad():
        for name, target in into.items():
            part(target).copy_(part_of(tensors[name], target))


def norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """() the L2 norm of sharded tensors together, in 32 bits; the same in every process.

    Args:
        gradients: at least one, all sharded over the same processes.
    """
    own = torch._foreach_norm([part(gradient) for gradient in gradients], dtype=torch.float32)
    squares = torch.stack(own).square().sum()
    (group,) = {g.device_mesh.get_group() for g in gradients if isinstance(g, DTensor)}
    dist.all_reduce(squares, group=group)
    return squares.sqrt()


def average(gradients: Sequence[torch.Tensor]) -> None:
    """Makes whole tensors their mean over all processes, in place, in one message for a format."""
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        alike = [gradient for gradient in gradients if gradient.dtype == dtype]
        message = torch.cat([gradient.flatten() for gradient in alike])
        dist.all_reduce(message)
        message /= dist.get_world_size()
        sizes = [gradient.numel() for gradient in alike]
        for gradient, values in zip(alike, message.split(sizes), strict=True):
            gradient.copy_(values.view_as(gradient))
