"""Tensors on their way from the processor's memory to a GPU."""

from __future__ import annotations

import torch


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device; the processor does not wait for what a GPU is doing.

    A copy from ordinary memory begins when all work before it is done, and the processor waits for
    both. From page-locked memory, which torch keeps for reuse, it is one more piece of that work.
    """
    if device.type != "cuda" or tensor.device == device:
        return tensor.to(device, non_blocking=True)
    return tensor.pin_memory().to(device, non_blocking=True)
