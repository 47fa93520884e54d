"""What a room's `cases.py` is made of: inputs by argument name, and the work that any implementation must do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LARGE = 2**22
"""Elements from which on drawing on the CPU would take longer than what is tested."""


@dataclass(frozen=True, slots=True)
class Maker:
    """Draws inputs on the CPU, so that every device and dtype gets the same numbers, rounded; large ones in place."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    @staticmethod
    def seeded(seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Maker:
        return Maker(torch.device(device), dtype, torch.Generator().manual_seed(seed))

    def normal(self, *shape: int, std: float = 1.0, mean: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        if math.prod(shape) > LARGE and self.device.type != "cpu":
            seed = int(torch.randint(2**31, (), generator=self.generator))
            generator = torch.Generator(self.device).manual_seed(seed)
            x = torch.randn(shape, generator=generator, device=self.device, dtype=dtype or self.dtype)
            return x.mul_(std).add_(mean)
        x = torch.randn(shape, generator=self.generator) * std + mean
        return x.to(self.device, dtype or self.dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Uniform in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator, dtype=dtype).to(self.device)

    def tensor(self, values: Any, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device)


Inputs = Callable[[Maker], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One set of inputs for parity tests: small and hostile.

    `function` is the room's function where it has several (else: its name). `gradients` names the arguments whose
    gradients are compared, `mutated` those that are written in place and compared afterwards. `dtypes` are those in
    which the case runs interpreted on the CPU; on a GPU it runs in `gpu_dtypes`.
    """

    name: str
    inputs: Inputs
    function: str = ""
    gradients: tuple[str, ...] = ()
    mutated: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16)
    gpu_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One shape to time, with the least work that any implementation must do.

    `inputs` draws on the GPU itself (shapes are large). `flops` and `bytes` count one call, `backward` times forward
    plus backward with the gradients of `gradients`. `baselines` are functions of the same arguments to run beside it.
    `target_us` is the time to reach, where there is one. `mutated` names the arguments that are written in place, which
    parity compares afterwards; they must bear being written again by every call that is timed.
    """

    name: str
    inputs: Callable[[torch.device], dict[str, Any]]
    function: str = ""
    flops: float
    bytes: float
    gradients: tuple[str, ...] = ()
    backward: bool = False
    baselines: dict[str, Callable[..., Any]] = field(default_factory=dict)
    target_us: float | None = None
    mutated: tuple[str, ...] = ()
