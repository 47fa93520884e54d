"""What NVIDIA's assembler says of a kernel's code. For scripts that compile for a card that need not be there."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from triton.backends.nvidia import compiler


def ptxas_notes(ptx: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "kernel.ptx"), Path(folder, "kernel.o")
        source.write_text(ptx)
        command = [compiler.get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(source), "-o", str(target)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr
