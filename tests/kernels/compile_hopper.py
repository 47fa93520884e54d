"""Compile a room's Gluon kernels for an H100, which needs none. A line a kernel: what the test reads, in JSON.

Run in a process of its own, without TRITON_INTERPRET. Argument: mla_decode or mla_prefill.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import compile
from triton.experimental.gluon._runtime import GluonASTSource

from dsv2.kernels.mla_decode import hopper as decode
from dsv2.kernels.mla_prefill import hopper as prefill
from tests.kernels.ptxas import ptxas_notes

LAYOUT = (
    "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2, transposed=False, fp4_padded=False, "
    "cga_layout=[])"
)
BLOCKS = {"latent": (64, 512), "rope": (64, 64), "qn": (64, 128), "qr": (64, 64)}
BLOCKS |= {"kn": (128, 128), "kr": (128, 64), "v": (128, 128)}
TYPES = {"q_c": "*bf16", "q_r": "*bf16", "out": "*bf16", "o": "*bf16", "scale_log2": "fp32"}
TYPES |= dict.fromkeys(("ROWS", "num_warps"), "constexpr")
TYPES |= dict.fromkeys(("lse", "part_out", "part_lse"), "*fp32")
TYPES |= dict.fromkeys(("table", "lengths", "parts", "splits", "cu", "counter"), "*i32")
TYPES |= {f"{name}_desc": f"tensordesc<bf16[{b}, {width}],{LAYOUT}>" for name, (b, width) in BLOCKS.items()}
KERNELS: dict[str, tuple[tuple[Any, int], ...]] = {
    "mla_decode": (
        (decode._mla_decode_swapped_kernel, 16),
        (decode._mla_decode_swapped_kernel, 32),
        (decode._mla_decode_kernel, 64),
    ),
    "mla_prefill": ((prefill._mla_prefill_fwd_kernel, 64),),
}


def compiled(kernel: Any, rows: int) -> Any:
    names = [p.name for p in kernel.params]
    signature = {name: TYPES.get(name, "i32") for name in names}
    constants = {n: v for n, v in {"ROWS": rows, "num_warps": 4}.items() if n in names}
    is_aligned = [signature[n].startswith("*") or n.startswith("stride") for n in names]
    attrs = {(i,): [["tt.divisibility", 16]] for i, aligned in enumerate(is_aligned) if aligned}
    source = GluonASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


for kernel, rows in KERNELS[sys.argv[1]]:
    built = compiled(kernel, rows)
    ptx = built.asm["ptx"]
    notes = ptxas_notes(ptx)
    found = {
        "rows": rows,
        "shared_bytes": built.metadata.shared,
        "matrix_instructions": ptx.count("wgmma.mma_async"),
        "serialised": "serialized" in notes,
        "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", notes))),
    }
    sys.stdout.write(json.dumps(found) + "\n")
