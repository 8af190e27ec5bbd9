"""Trains a small Llama with Memory+ layers on text: recipe → apply → plain loop with fused updates → save → resume.

    python examples/train_from_scratch.py [--steps 300] [--out DIR] [--resume]

Writes the model, the optimizer, the learning curve and a picture of which slots are read to DIR; `--resume` goes on from there,
bit for bit as if it had not stopped. The text is Python's own language reference. Needs `pip install 'memrewrite[hf,plot]'`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import memrewrite

LENGTH, BATCH, LR = 128, 16, 4e-3
RECIPE = """
memrewrite: 1
pools:
  shared: {keys: 64, gradient: fused}          # 64² = 4,096 slots, shared by both layers
replace:
  - where: {layers: [1, 3]}
    with: memory_plus
    pool: shared
    options: {heads: 2, topk: 8, qk_norm: true}
"""


def new_model() -> torch.nn.Module:
    """A Llama of five blocks that reads bytes, with memory layers in blocks 1 and 3."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=LENGTH, use_cache=False, **sizes))
    return memrewrite.apply(model, RECIPE, {"input_ids": torch.arange(LENGTH)[None]}).model


def main() -> None:
    """Train, save, and show what was learned."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="train up to this step")
    parser.add_argument("--out", type=Path, default=Path("out/from-scratch"), help="where everything is written")
    parser.add_argument("--resume", action="store_true", help="go on from what --out contains")
    given = parser.parse_args()

    text = torch.frombuffer(bytearray("".join(topics.values()), "utf-8"), dtype=torch.uint8).long()
    model = memrewrite.load(given.out / "model").model if given.resume else new_model()
    optimizer = torch.optim.AdamW(memrewrite.param_groups(model, lr=LR))
    memrewrite.fuse(optimizer, model)
    losses: list[float] = []
    if given.resume:
        optimizer.load_state_dict(torch.load(given.out / "optimizer.pt", weights_only=True))
        losses = json.loads((given.out / "losses.json").read_text())

    model.train()
    for step in range(len(losses), given.steps):
        starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=torch.Generator().manual_seed(step))
        batch = text[starts[:, None] + torch.arange(LENGTH)]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        memrewrite.clip_grad_norm_(model, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0:
            print(f"step {step:4}  loss {losses[-1]:.3f}", flush=True)

    memrewrite.save(model, given.out / "model", overwrite=True)
    torch.save(optimizer.state_dict(), given.out / "optimizer.pt")
    (given.out / "losses.json").write_text(json.dumps(losses))
    with memrewrite.watch(model.eval()) as usage, torch.no_grad():
        model(input_ids=text[: 64 * LENGTH].view(64, LENGTH))
    usage.plot(given.out / "usage.png")


if __name__ == "__main__":
    main()
