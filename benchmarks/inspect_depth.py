"""Time and memory of inspecting and planning a model with the shape of Llama 3 405B on `meta`, as a function of its depth.

    python benchmarks/inspect_depth.py [--depths 8 32 126] [--json OUT]

Each depth runs in a separate process, to measure its peak memory. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

SHAPE = {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def measure(depth: int) -> dict[str, float]:
    """Inspect and plan one model; seconds, and peak memory of this process in GiB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import memrewrite

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=depth, **SHAPE)).to(torch.bfloat16)
    inputs = {"input_ids": torch.zeros(1, 16, dtype=torch.long), "use_cache": False}
    recipe = {
        "memrewrite": 1,
        "pools": {"shared": {"keys": 4096}},
        "replace": [{"where": {"all": True}, "with": "memory_plus", "pool": "shared"}],
    }
    start = time.perf_counter()
    plan = memrewrite.plan(model, recipe, inputs)  # captures, locates and selects
    seconds = time.perf_counter() - start
    assert len(plan.substitutions) == depth, f"{len(plan.substitutions)} MLPs at depth {depth}"
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"depth": depth, "seconds": seconds, "peak_gib": memory}


def main() -> None:
    """Run every depth and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 32, 126])
    parser.add_argument("--json", type=Path, default=Path("inspect_depth.json"))
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one)))
        return
    rows = []
    print(f"{'blocks':>6} {'inspect and plan':>17} {'per block':>10} {'peak':>9}")
    for depth in args.depths:
        command = [sys.executable, __file__, "--one", str(depth)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        each = row["seconds"] / depth * 1000
        print(f"{depth:6d} {row['seconds']:16.1f}s {each:8.0f}ms {row['peak_gib']:6.2f}GiB", flush=True)
    import torch

    machine = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
