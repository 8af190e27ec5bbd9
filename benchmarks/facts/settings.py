"""What one run trains, as plain data."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One run. Together the defaults are Memory+ on the airports, as the table of models has it.

    Attributes:
        task: Name in `tasks.TASKS`.
        scale: Name in `scales.SCALES`: the size of the base model, and of the tables.
        model: Name in `compared_models.MODELS`.
        rule: Name in `rules.RULES`: how the table is updated.
        seed: Seed of the weights and of the order of the sequences.
        lr: Learning rate of everything but the tables; warm-up, then cosine to zero.
        value_factor: Learning rate of the tables, as a multiple of `lr`.
        initializer_range: Standard deviation of the base model's weights; 0: width^-1/2.
        output: `init.output` of the recipe's rules.
        scores: `init.scores` of the recipe's rules.
        keys: Keys per half of the pool; 0: those of the model at this scale.
        separate: Give each memory layer a pool of its own instead of a shared one.
        heads: Heads of a memory layer.
        topk: Slots that a head reads.
        qk_norm: Whether the memory layers normalize queries and keys.
        dtype: Dtype of the tables; "" is the model's.
        weight_decay: Of everything but the tables.
        value_decay: Weight decay of the tables.
        clip: Largest gradient norm of the rest, and of the tables, each by itself; 0: no clipping.
        warmup: Steps of the warm-up.
        fixed_values: Keep the tables' rate after the warm-up, as the paper and `memrewrite.schedule` do.
        facts: Number of training sequences.
        batch: Sequences per step.
        steps: Number of steps.
        device: "cpu" or "cuda". On CUDA devices the products are in bfloat16 (autocast).
    """

    task: str = "airports"
    scale: str = "d32"
    model: str = "memory-plus"
    rule: str = "lazy-adam-bf16"
    seed: int = 0
    lr: float = 8e-3
    value_factor: float = 5.0
    initializer_range: float = 0.0
    output: str | float = "match"
    scores: str | float = "paper"
    keys: int = 0
    separate: bool = False
    heads: int = 2
    topk: int = 8
    qk_norm: bool = True
    dtype: str = ""
    weight_decay: float = 0.1
    value_decay: float = 0.0
    clip: float = 0.0
    warmup: int = 20
    fixed_values: bool = True
    facts: int = 16_000
    batch: int = 1024
    steps: int = 375
    device: str = "cpu"

    @property
    def changed(self) -> Json:
        """The fields that differ from the defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    @property
    def key(self) -> str:
        """Name of the run in files: readable, and unique by a digest of all fields."""
        digest = hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()
        return f"{self.task}-{self.scale}-{self.model}-{self.seed}-{digest[:12]}"

    def __str__(self) -> str:
        """What differs from the defaults, with model and seed."""
        others = (f"{name}={value}" for name, value in self.changed.items() if name not in ("model", "seed"))
        return " ".join([self.model, f"seed={self.seed}", *others])

    def but(self, **changes: Any) -> Setting:
        """A copy with other values."""
        return replace(self, **changes)

    def to_json(self) -> Json:
        """All fields."""
        return asdict(self)
