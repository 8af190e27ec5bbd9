"""The recipe: immutable pydantic models that are both the Python object and the schema of the YAML.

Flow: plain data → field types → options of each layer kind → cross checks (a rule's pool exists, a pool is used) → `Recipe`.
"""

from __future__ import annotations

import hashlib
import json
import keyword
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import InitErrorDetails

from memrewrite.errors import UserError
from memrewrite.frozen import Frozen
from memrewrite.layers.contract import LayerOptions, MemoryLayer
from memrewrite.layers.kinds import KINDS
from memrewrite.layers.pool import Backend, Gradient, Pools, PoolSpec, ValueType, needs_fused
from memrewrite.plans import DEFAULT_OUTPUT, MATCH, MAX_MULTIPLE, LayerInit, Multiple, Placement, Train
from memrewrite.recipes.field_types import Count, Text, Whole
from memrewrite.recipes.validation_errors import did_you_mean, one_of, refused, shown
from memrewrite.recipes.where import Where
from memrewrite.recipes.yaml_scalars import Writer

VERSIONS = (1,)  # the format versions this package reads
MAX_KEYS = 2**16  # per half: 2**32 slots, 64 times the paper's largest pool
_ANY_WIDTH = 2**12 * 3 * 5 * 7


class PoolEntry(Frozen):
    """A value table that the layers of one or more rules share."""

    keys: Whole = Field(ge=2, le=MAX_KEYS, description="Keys per half, at least 2; the pool has keys × keys slots.")
    value_dim: Count | None = Field(default=None, description="Width of one value. Default: the d_model of the MLPs.")
    init: Literal["paper"] = Field(default="paper", description="Initialization of the values: 'paper': N(0, value_dim^-1/2).")
    seed: Whole = Field(default=0, ge=0, lt=2**63, description="Seed of the initial values.")
    dtype: ValueType | None = Field(default=None, description="Dtype of the stored values. Default: the dtype of the MLPs.")
    gradient: Gradient = "dense"
    backend: Backend = "auto"

    @model_validator(mode="after")
    def _can_learn(self) -> PoolEntry:
        if needs_fused(self.dtype, self.gradient):
            raise refused(f"a table of {self.dtype} can be trained only by fused updates", "gradient: fused")
        return self


class Init(Frozen):
    """How the layers of a rule start, measured on the example inputs."""

    output: Literal["match", "paper", "zero"] | Multiple | None = Field(
        default=None,
        description="The output at the start. 'match': as large as the MLP's (the same rms); a number: this multiple of it; "
        "'paper': the paper's initialization; 'zero': 0. Default: 'match'; for `placement: parallel` 'zero'.",
    )
    scores: Literal["paper"] | Multiple = Field(
        default="paper",
        description="Scores of queries and keys at the start. 'paper': the paper's initialization; a number: the standard "
        "deviation of a query's scores over all slots.",
    )

    @field_validator("output", "scores", mode="before")
    @classmethod
    def _word_or_number(cls, value: Any, info: ValidationInfo) -> Any:
        words = ("match", "paper", "zero") if info.field_name == "output" else ("paper",)
        if isinstance(value, str) and value not in words:
            hint = did_you_mean(value, words) or f"{one_of(words)}, or a number"
            raise refused(f"`{info.field_name}` cannot be {shown(value)}", hint)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= MAX_MULTIPLE
        if not (number or isinstance(value, str) or (value is None and info.field_name == "output")):
            what = f"`{info.field_name}` must be a number above 0, at most {MAX_MULTIPLE:g}, not {shown(value)}"
            raise refused(what, f"{one_of(words)}, or such a number")
        return value

    def of_layer(self, placement: Placement, kind: type[MemoryLayer]) -> LayerInit:
        """The same for a layer of this placement and kind, in a plan."""
        default = DEFAULT_OUTPUT[placement] if kind.scalable else "paper"
        wanted = default if self.output is None else self.output
        return LayerInit(output=MATCH if wanted == "match" else wanted, scores=self.scores)


class Rule(Frozen):
    """Which MLPs get which layer. In Python, the field `with` is `with_`."""

    model_config = ConfigDict(populate_by_name=True)  # `with` is a keyword in Python

    where: Where = Field(description="Which MLPs.")
    with_: Text = Field(validation_alias="with", serialization_alias="with", description="The layer kind.")
    pool: Text | None = Field(default=None, description="Name of the pool that the layers read, from `pools`.")
    placement: Placement = Field(
        default="replace",
        description="'replace': the layer replaces the MLP; 'parallel': the layer's output is added to the MLP's output.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        validate_default=True,
        description="Options of the layer kind; the others have their defaults.",
    )
    init: Init = Field(default_factory=Init, description="How the layers start.")

    @property
    def kind(self) -> type[MemoryLayer]:
        """The class of the layer kind named by `with`."""
        return _kinds()[self.with_]

    def layer_options(self) -> LayerOptions:
        """The options as an instance of the kind's `Options`."""
        return self.kind.Options.model_validate(self.options)

    @field_validator("with_")
    @classmethod
    def _known_kind(cls, name: str) -> str:
        if name not in _kinds():
            raise refused(f"unknown layer kind {shown(name)}", did_you_mean(name, _kinds()) or one_of(_kinds()))
        return name

    @field_validator("options")
    @classmethod
    def _normalised(cls, given: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        kind = _kinds().get(info.data.get("with_", ""))
        if kind is None:  # the kind was refused already, so its options cannot be checked
            return given
        # strict: neither `heads: true` nor `heads: '1'` may become one head
        return kind.Options.model_validate(given, strict=True).model_dump(mode="json")

    @model_validator(mode="after")
    def _pool_fits_kind(self) -> Rule:
        if self.kind.uses_pool and self.pool is None:
            _raise_at(("with",), f"{self.with_!r} reads a pool, but the rule names none", "add `pool:` to this rule")
        if not self.kind.uses_pool and self.pool is not None:
            _raise_at(("pool",), f"{self.with_!r} reads no pool", "remove `pool:` from this rule", key=True)
        if not self.kind.scalable and self.init.output is not None:
            _raise_at(("init", "output"), f"{self.with_!r} has no parameters to initialize", "remove `output:`", key=True)
        if not self.kind.has_scores and self.init.scores != "paper":
            _raise_at(("init", "scores"), f"{self.with_!r} has no queries and keys", "remove `scores:`", key=True)
        if self.placement == "parallel" and self.kind.replaces_only:
            _raise_at(("placement",), self.kind.replaces_only, "placement: replace")
        return self


class Recipe(Frozen):
    """A rewrite of a model: pools, and rules that state which MLPs get which layer."""

    memrewrite: Literal[1] = Field(description="Version of the recipe format: 1.")
    pools: dict[str, PoolEntry] = Field(default_factory=dict, description="Value tables by name, shared by the layers.")
    replace: tuple[Rule, ...] = Field(min_length=1, description="Rules; no two may select the same MLP.")
    train: Train = Field(
        default="all",
        description="'memory_only': all other parameters are frozen (`requires_grad=False`); 'all': nothing is frozen.",
    )
    verify: Literal["full", "off"] = Field(default="full", description="'full': check the rewritten model; 'off': no checks.")

    @field_validator("memrewrite", mode="before")
    @classmethod
    def _readable(cls, version: Any) -> Any:
        if type(version) is not int or version not in VERSIONS:
            read = ", ".join(map(str, VERSIONS))
            raise refused(f"recipe format version {shown(version)} cannot be read", f"supported versions: {read}")
        return version

    @field_validator("verify", mode="before")
    @classmethod
    def _off(cls, verify: Any) -> Any:
        return "off" if verify is False else verify  # a reader of YAML 1.1 gives False for a bare `off`

    @model_validator(mode="after")
    def _pools_meet_rules(self) -> Recipe:
        lines = []
        for index, rule in enumerate(self.replace):
            if rule.pool is not None and rule.pool not in self.pools:
                hint = did_you_mean(rule.pool, self.pools) or f"define it: `pools: {{{rule.pool}: {{keys: 1024}}}}`"
                lines.append(_line(("replace", index, "pool"), f"there is no pool {shown(rule.pool)}", hint))
            else:
                lines += _buildable(rule, ("replace", index, "options"), self.pools.get(rule.pool or ""))
        used = {rule.pool for rule in self.replace}
        for name in self.pools:
            if not _can_be_attribute(name):
                hint = "a pool becomes `model.memory.<name>`: use letters, digits, _, and no attribute name of torch modules"
                lines.append(_line(("pools", name), f"a pool cannot be named {shown(name)}", hint, key=True))
            elif name not in used:
                hint = f"name it in a rule (`pool: {name}`) or remove it"
                lines.append(_line(("pools", name), f"pool {shown(name)} is not used by any rule", hint, key=True))
        if lines:
            raise ValidationError.from_exception_data("Recipe", lines)
        return self

    @model_validator(mode="after")
    def _something_is_trained(self) -> Recipe:
        if self.train == "memory_only" and not any(rule.kind.scalable for rule in self.replace):
            what = "`train: memory_only` would train nothing: no layer has parameters"
            _raise_at(("train",), what, "remove `train:`", key=True)
        return self

    def to_data(self) -> dict[str, Any]:
        """The recipe as plain data that `read_recipe` accepts. Defaults are included, except those of selectors."""
        data = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        for rule, written in zip(self.replace, data["replace"], strict=True):
            written["options"] = rule.options  # all of them: None may differ from an option's default
            written["where"] = rule.where.model_dump(mode="json", exclude_defaults=True)
        return data

    def to_yaml(self) -> str:
        """The recipe as YAML; reading it gives an equal recipe."""
        # non-ASCII is escaped: PyYAML writes a bare U+0085 and reads it back as a space
        text: str = yaml.dump(self.to_data(), Dumper=Writer, sort_keys=False, width=120)
        return text

    def digest(self) -> str:
        """SHA-256 of the recipe's content, in hexadecimal; formatting, order of keys and comments have no effect."""
        text = json.dumps(self.to_data(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _kinds() -> dict[str, type[MemoryLayer]]:
    return {kind.kind: kind for kind in KINDS}


def _buildable(rule: Rule, loc: tuple[str | int, ...], entry: PoolEntry | None) -> list[InitErrorDetails]:
    """What the kind's `check` refuses for every model: tested with a width that suits every option."""
    width = rule.where.d_model or _ANY_WIDTH
    pool = None if entry is None else _spec(entry, width, rule.kind.reads_inputs)
    try:
        rule.kind.check(width, width, rule.layer_options(), pool)
        rule.kind.check_trainable(width, rule.layer_options(), pool)
    except UserError as error:
        at = next((name for name in rule.options if f"`{name}" in error.what), None)
        return [_line(loc if at is None else (*loc, at), error.what, error.hint or "see the options of this kind")]
    return []


def _spec(entry: PoolEntry, width: int, has_inputs: bool) -> PoolSpec:
    fields = entry.model_dump(exclude_none=True)
    return PoolSpec.model_validate({"value_dim": width, "input_dim": width if has_inputs else None, **fields})


def _can_be_attribute(name: str) -> bool:
    """True if `Pools` accepts a pool with this name; tested before a model exists."""
    plain = name.isascii() and name.isidentifier() and not name.startswith("_") and not keyword.iskeyword(name)
    return plain and not hasattr(Pools({}), name)


def _line(loc: tuple[str | int, ...], what: str, hint: str, *, key: bool = False) -> InitErrorDetails:
    return InitErrorDetails(type=refused(what, hint, key=key), loc=loc, input=None)


def _raise_at(loc: tuple[str | int, ...], what: str, hint: str, *, key: bool = False) -> None:
    raise ValidationError.from_exception_data("Rule", [_line(loc, what, hint, key=key)])
