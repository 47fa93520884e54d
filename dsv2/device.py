"""Which device a command runs on, by name or whatever is there, and the way of small tensors to it and back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is the GPU where there is one. Raises ValueError for a device that is unknown or not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is not one that torch knows, such as auto, cpu or cuda:0") from error
    if device.type == "meta":
        raise ValueError("device 'meta' holds no numbers: give auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def to_device(x: Tensor | np.ndarray, device: torch.device | str) -> Tensor:
    """What the host has, on `device`; a GPU gets it in the order of its work, and nobody waits."""
    x = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
    return x.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else x.to(device)


def to_host(x: Tensor) -> Tensor:
    """A copy on the host, there once the device's work so far is done: nobody waits for a GPU here."""
    if x.device.type != "cuda":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
