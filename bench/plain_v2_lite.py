"""V2-Lite at full size through the plain path: prefill, decode, save, load. The floor that later kernels start from.

    python -m bench.plain_v2_lite --out bench/results/h100/plain_v2_lite.json --scratch /tmp/v2-lite

Random weights (normal, std 0.02), so that routing spreads over the experts. Needs a GPU with 40 GB and as much disk.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dsv2
from dsv2.bench.engine import random_model
from dsv2.model import Cache, Context, Transformer


def timed(run: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median and range of wall seconds, after one warm-up."""
    run()
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


@torch.inference_mode()
def prefill(model: Transformer, num_sequences: int, length: int) -> dict[str, Any]:
    tokens = torch.randint(model.cfg.vocab_size, (num_sequences * length,), device="cuda")
    bounds = [i * length for i in range(num_sequences + 1)]
    last = torch.tensor(bounds[1:], device="cuda") - 1
    t = timed(lambda: model.logits(model.model(tokens, Context.packed(bounds, "cuda"))[last]), 5)
    return {"sequences": num_sequences, "length": length, **t, "tokens_per_s": num_sequences * length / t["median_s"]}


@torch.inference_mode()
def decode(model: Transformer, num_sequences: int, context_length: int) -> dict[str, Any]:
    capacity = context_length + 16
    cache = Cache(model.cfg, num_slots=num_sequences, capacity=capacity, device="cuda", dtype=model.dtype)
    for layer in cache.layers:
        layer.normal_()
    cache.lengths = [context_length] * num_sequences
    tokens = torch.randint(model.cfg.vocab_size, (num_sequences,), device="cuda")
    step = cache.extend([1] * num_sequences, absorb=True)
    t = timed(lambda: model.logits(model.model(tokens, step)), 5)
    return {"sequences": num_sequences, "context": context_length, **t, "tokens_per_s": num_sequences / t["median_s"]}


def checkpoint(model: Transformer, scratch: Path) -> dict[str, Any]:
    """Save from the GPU and load to the CPU at full size; peak host memory includes the mapped files."""
    began = time.perf_counter()
    dsv2.save(model, scratch)
    saved = time.perf_counter()
    files = list(scratch.glob("*.safetensors"))
    size = sum(f.stat().st_size for f in files)
    again = dsv2.load(scratch)
    loaded = time.perf_counter()
    same = all(torch.equal(a.cpu(), b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    shutil.rmtree(scratch)
    return {
        "bytes": size,
        "shards": len(files),
        "save_s": saved - began,
        "load_s": loaded - saved,
        "bit_equal": same,
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    model = random_model(dsv2.ModelConfig.preset("v2-lite"), torch.device("cuda"), torch.bfloat16)
    result = {
        "what": "V2-Lite, random bf16 weights, plain path without kernels of our own",
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": options.commit,
        "prefill": [prefill(model, 8, 2048)],
        "decode": [decode(model, n, 1024) for n in (1, 32)],
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(),
        "checkpoint": checkpoint(model, options.scratch),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
