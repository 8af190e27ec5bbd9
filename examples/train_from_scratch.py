"""Trains a small Llama with Memory+ layers on text: recipe → apply → plain loop with fused updates → save → resume.

    python examples/train_from_scratch.py [--steps 300] [--out DIR] [--resume]

Writes model, optimizer, learning curve and which slots are read to DIR; `--resume` goes on from there, the same in every bit.
The text is the language reference in Python itself. Needs `pip install 'memrewrite[hf,plot]'`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from matplotlib.figure import Figure
from transformers import LlamaConfig, LlamaForCausalLM

import memrewrite

TEXT = torch.frombuffer(bytearray("".join(topics.values()), "utf-8"), dtype=torch.uint8).long()
LENGTH, BATCH, LR = 128, 16, 4e-3
OPTIONS = {"heads": 2, "topk": 8, "qk_norm": True}
RECIPE = {
    "memrewrite": 1,
    "pools": {"shared": {"keys": 64, "gradient": "fused"}},  # 64² = 4,096 slots, shared by both layers
    "replace": [{"where": {"layers": [1, 3]}, "with": "memory_plus", "pool": "shared", "options": OPTIONS}],
}


def new_model() -> torch.nn.Module:
    """A Llama of five blocks that reads bytes, with memory layers in blocks 1 and 3."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=LENGTH, use_cache=False, **sizes))
    batch = {"input_ids": TEXT[: 8 * LENGTH].view(8, LENGTH)}
    memrewrite.apply(model, RECIPE, batch)
    memrewrite.calibrate(model, [batch])  # queries that differ from each other, so that most slots stay in use
    return model


def main() -> None:
    """Train, save, and show what was learned."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("out/from-scratch"))
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()
    model = memrewrite.load(given.out / "model") if given.resume else new_model()
    optimizer = torch.optim.AdamW(memrewrite.param_groups(model, lr=LR))
    memrewrite.fuse(optimizer, model)
    state = torch.load(given.out / "training.pt", weights_only=True) if given.resume else {"losses": []}
    losses = state["losses"]
    if given.resume:
        optimizer.load_state_dict(state["optimizer"])
    model.train()
    for step in range(len(losses), given.steps):
        starts = torch.randint(len(TEXT) - LENGTH, (BATCH,), generator=torch.Generator().manual_seed(step))
        batch = TEXT[starts[:, None] + torch.arange(LENGTH)]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        memrewrite.clip_grad_norm_(model, 1.0)
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step:4}  loss {losses[-1]:.3f}", end="\n" if step % 20 == 0 else "\r", flush=True)
    memrewrite.save(model, given.out / "model", overwrite=True)
    torch.save({"optimizer": optimizer.state_dict(), "losses": losses}, given.out / "training.pt")
    with memrewrite.watch(model.eval()) as usage, torch.no_grad():
        model(input_ids=TEXT[: 64 * LENGTH].view(64, LENGTH))
    usage.plot(given.out / "usage.png", overwrite=True)
    axes = Figure(layout="constrained").subplots()
    axes.set(xlabel="training step", ylabel="loss (nats a byte)")
    axes.plot(losses, color="black")[0].figure.savefig(given.out / "losses.png")


if __name__ == "__main__":
    main()
