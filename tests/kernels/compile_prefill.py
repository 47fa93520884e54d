"""Compile mla_prefill's kernels for an H100, which needs none. A line a kernel: what it asks of the card, in JSON.

Run in a process of its own, without TRITON_INTERPRET. Arguments: kernels and widths of keys and values, such as
dq,160,160.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

import dsv2.kernels.mla_prefill.kernel as room
from tests.kernels.ptxas import ptxas_notes

TYPES: dict[str, str] = dict.fromkeys(("lse", "delta"), "*fp32")
TYPES |= dict.fromkeys(("cu", "cu_prefix", "cu_keys"), "*i32")
TYPES |= dict.fromkeys(("scale", "dscale"), "fp32")
DESCRIBED = {
    "fwd": {"BN": {"k": "BK", "k2": "BK2", "v": "BV"}},
    "dq": {"BN": {"k": "BK", "k2": "BK2", "v": "BV"}},
    "dkv": {"BM": {"q": "BK", "q2": "BK2", "do": "BV"}},
}
"""Which arguments are tensor descriptors, by their rows and channels."""

UNALIGNED = ("N", "blocks")
"""What no multiple of 16 may be presumed of."""


def compiled(name: str, K: int, V: int) -> Any:
    """With a prefix, whose walk needs most."""
    kernel = getattr(room, f"_mla_prefill_{name}_kernel")
    constants = room.constants(name, torch.device("cpu"), K, V)
    options = {n: constants.pop(n) for n in ("num_warps", "num_stages")}
    flags = {"GROUP": 1, "HAS_PREFIX": True, "IS_PREFIX": False, "SHARED": False}
    names = [p.name for p in kernel.params]
    constants = {n: x for n, x in (constants | flags).items() if n in names}
    types = TYPES | dict.fromkeys(constants, "constexpr")
    for rows, pieces in DESCRIBED[name].items():
        for n, width in pieces.items():
            kind = f"tensordesc<bf16[1, {constants[rows]}, {constants[width]}]>" if constants[width] else "constexpr"
            types |= {n: kind, f"{n}_prefix": kind}
    others = {n: "i32" if n.startswith("stride") or n in ("T", "H", *UNALIGNED) else "*bf16" for n in names}
    signature = {n: types.get(n, others[n]) for n in names}
    absent = {n: None for n, kind in signature.items() if kind == "constexpr" and n not in constants}
    is_aligned = [signature[n][0] == "*" or (signature[n] == "i32" and n not in UNALIGNED) for n in names]
    attrs = {(i,): [["tt.divisibility", 16]] for i, aligned in enumerate(is_aligned) if aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants | absent, attrs=attrs)
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, text
    return int(found[1])


for argument in sys.argv[1:]:
    name, K, V = argument.split(",")
    built = compiled(name, int(K), int(V))
    notes = ptxas_notes(built.asm["ptx"])
    found = {
        "kernel": name,
        "K": int(K),
        "V": int(V),
        "shared_bytes": built.metadata.shared,
        "registers": number(r"Used (\d+) registers", notes),
        "spilled_bytes": number(r"(\d+) bytes spill stores", notes),
        "serialised": "serialized" in notes,
    }
    sys.stdout.write(json.dumps(found) + "\n")
