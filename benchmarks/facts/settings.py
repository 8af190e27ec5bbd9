"""What one run trains, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One run. The defaults are setting C: 10,000 facts, about three times what the dense model can store.

    Attributes:
        model: Name in `compared_models.MODELS`.
        rule: Name in `rules.RULES`: how the table is updated.
        seed: Seed of the weights and of the order of the facts.
        lr: Learning rate of everything but the tables; warm-up, then cosine to zero.
        value_lr: Learning rate of the tables.
        output: `init.output` of the recipe's rules.
        qk_norm: Whether the memory layers normalize queries and keys.
        weight_decay: Of everything but the tables.
        clip: Largest gradient norm of the rest, and of the tables, each by itself; 0: no clipping.
        warmup: Steps of the warm-up.
        fixed_values: Keep the tables' rate at `value_lr` after the warm-up.
        dtype: Dtype of the tables; "" is the model's.
        facts: Number of facts.
        batch: Facts per step.
        steps: Number of steps.
        initializer_range: Standard deviation of the base model's initial weights.
    """

    model: str = "memory-plus"
    rule: str = "lazy-adam"
    seed: int = 0
    lr: float = 8e-3
    value_lr: float = 4e-2
    output: str | float = "match"
    qk_norm: bool = True
    weight_decay: float = 0.1
    clip: float = 0.0
    warmup: int = 20
    fixed_values: bool = False
    dtype: str = ""
    facts: int = 10_000
    batch: int = 1024
    steps: int = 450
    initializer_range: float = 0.02

    @property
    def key(self) -> str:
        """What differs from the defaults, as text: the name of the run in files."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return " ".join(f"{name}={value}" for name, value in changed.items()) or "default"

    @property
    def label(self) -> str:
        """Model, update rule, and what else differs from the defaults. Runs with one label differ in their seeds only."""
        others = replace(self, model=Setting.model, rule=Setting.rule, seed=Setting.seed)
        named = [self.model] if self.model == "dense" else [self.model, self.rule]
        return ", ".join([*named, others.key] if others != Setting() else named)

    def to_json(self) -> Json:
        """All fields."""
        return asdict(self)
