"""Compile mla_prefill's gradient of q for an H100, which needs none. A line a pair of widths: shared memory, in JSON.

Run in a process of its own, without TRITON_INTERPRET. Arguments: widths of keys and values, such as 160,160.
"""

from __future__ import annotations

import json
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from dsv2.kernels.mla_prefill.kernel import _mla_prefill_dq_kernel, constants

TYPES = dict.fromkeys(("q", "do", "o", "dq"), "*bf16")
TYPES |= dict.fromkeys(("lse", "delta"), "*fp32")
TYPES |= dict.fromkeys(("cu", "cu_prefix"), "*i32")
TYPES |= dict.fromkeys(("scale", "dscale"), "fp32")


def shared_bytes(K: int, V: int) -> int:
    """With a prefix, whose walk needs most."""
    constexprs = constants("dq", torch.device("cpu"), K, V) | {"GROUP": 1, "HAS_PREFIX": True}
    options = {name: constexprs.pop(name) for name in ("num_warps", "num_stages")}
    pieces = {"k": constexprs["BK"], "k2": constexprs["BK2"], "v": constexprs["BV"]}
    types = TYPES | dict.fromkeys(constexprs, "constexpr")
    for name, width in pieces.items():
        types |= dict.fromkeys((name, f"{name}_prefix"), f"tensordesc<bf16[1, {constexprs['BN']}, {width}]>")
    signature = {p.name: types.get(p.name, "i32") for p in _mla_prefill_dq_kernel.params}
    source = ASTSource(fn=_mla_prefill_dq_kernel, signature=signature, constexprs=constexprs)
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared


for argument in sys.argv[1:]:
    K, V = map(int, argument.split(","))
    sys.stdout.write(json.dumps({"K": K, "V": V, "shared_bytes": shared_bytes(K, V)}) + "\n")
