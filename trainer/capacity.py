"""How much memory a device has, and whether a training is foreseen to fit."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass

import torch

# For the driver, kernels' own workspaces and what allocation wastes.
SPARE = 2**30


@dataclass(frozen=True)
class Room:
    """A device's memory, and what is foreseen that steps take of it, in bytes.

    Args:
        capacity: all of it.
        steps: the most that steps take.
        activations: of that, what is neither weights nor the optimizer's.
    """

    capacity: int
    steps: int
    activations: int

    @property
    def holds_two_steps(self) -> bool:
        """Whether activations fit twice."""
        return fits(self.steps + self.activations, self.capacity)


def fits(peak_bytes: int, capacity: int) -> bool:
    """Whether a training with this peak runs on a device with so much memory."""
    return peak_bytes + SPARE <= capacity


def device_memory(device: torch.device) -> int:
    """Bytes of memory that a device has, or that this process may take of it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return installed if limit == resource.RLIM_INFINITY else min(installed, limit)
