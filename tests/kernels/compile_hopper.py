"""Compile mla_decode's Gluon kernels for an H100, which needs none. A line a kernel: what the test reads, in JSON.

Run in a process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler
from triton.compiler import compile
from triton.experimental.gluon._runtime import GluonASTSource

from dsv2.kernels.mla_decode import hopper

LAYOUT = (
    "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2, transposed=False, fp4_padded=False, "
    "cga_layout=[])"
)
TYPES = {"q_c": "*bf16", "q_r": "*bf16", "out": "*bf16", "scale_log2": "fp32"}
TYPES |= dict.fromkeys(("ROWS", "num_warps"), "constexpr")
TYPES |= dict.fromkeys(("lse", "part_out", "part_lse"), "*fp32")
TYPES |= dict.fromkeys(("table", "lengths", "parts", "splits"), "*i32")
TYPES |= {f"{name}_desc": f"tensordesc<bf16[64, {width}],{LAYOUT}>" for name, width in (("latent", 512), ("rope", 64))}
KERNELS: tuple[tuple[Any, int], ...] = (
    (hopper._mla_decode_swapped_kernel, 16),
    (hopper._mla_decode_swapped_kernel, 32),
    (hopper._mla_decode_kernel, 64),
)


def compiled(kernel: Any, rows: int) -> Any:
    names = [p.name for p in kernel.params]
    signature = {name: TYPES.get(name, "i32") for name in names}
    constants = {n: v for n, v in {"ROWS": rows, "num_warps": 4}.items() if n in names}
    is_aligned = [signature[n].startswith("*") or n.startswith("stride") for n in names]
    attrs = {(i,): [["tt.divisibility", 16]] for i, aligned in enumerate(is_aligned) if aligned}
    source = GluonASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def ptxas_notes(ptx: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "kernel.ptx"), Path(folder, "kernel.o")
        source.write_text(ptx)
        command = [compiler.get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(source), "-o", str(target)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


for kernel, rows in KERNELS:
    built = compiled(kernel, rows)
    ptx = built.asm["ptx"]
    notes = ptxas_notes(ptx)
    found = {
        "rows": rows,
        "shared_bytes": built.metadata.shared,
        "matrix_instructions": ptx.count("wgmma.mma_async"),
        "serialised": "serialized" in notes,
    }
    sys.stdout.write(json.dumps(found) + "\n")
