"""Which MLPs a rule selects: the selectors of `where`."""

from __future__ import annotations

import re
from collections import Counter

from pydantic import Field, field_validator, model_validator

from memrewrite.frozen import Frozen
from memrewrite.recipes.field_types import Count, Flag, Index, Text
from memrewrite.recipes.regex_limits import too_slow
from memrewrite.recipes.validation_errors import refused, shown


class Centred(Frozen):
    """`count` blocks at distance `stride`, around the middle of the stack of blocks."""

    count: Count = Field(description="Number of blocks.")
    stride: Count = Field(default=1, description="Distance from one block to the next, in blocks.")


class Where(Frozen):
    """Selects MLPs: an MLP must match every selector that is set."""

    layers: tuple[Index, ...] | None = Field(default=None, min_length=1, description="Blocks by index, from 0.")
    centred: Centred | None = Field(default=None, description="Blocks around the middle of the stack, as in the paper.")
    every: Count | None = Field(default=None, description="Every n-th block of the stack: indices n-1, 2n-1, ...")
    path: Text | None = Field(default=None, description="Glob over module paths, such as 'model.layers.*.mlp'.")
    regex: Text | None = Field(default=None, description="Regular expression over module paths.")
    pattern: Text | None = Field(default=None, description="MLP pattern, such as 'gated', as `inspect` shows it.")
    d_model: Count | None = Field(default=None, description="Width of the MLP's output.")
    all: Flag = Field(default=False, description="true: every MLP found.")
    tower: Text | None = Field(default=None, description="Path of the stack of blocks, for models with more than one.")

    @field_validator("layers")
    @classmethod
    def _each_once(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        twice = [index for index, times in Counter(layers or ()).items() if times > 1]
        if twice:
            raise refused(f"block {min(twice)} is listed twice", "list every block once")
        return layers

    @field_validator("regex")
    @classmethod
    def _compiles(cls, regex: str | None) -> str | None:
        try:
            re.compile(regex or "")
            slow = too_slow(regex or "")
        except (re.error, RecursionError, OverflowError) as error:
            hint = "correct the expression, or use `path` with a glob such as '*.mlp'"
            raise refused(f"{shown(regex)} is not a regular expression: {error}", hint) from None
        if slow:
            hint = "use at most three repeats, not inside one another, or `path` with a glob such as '*.mlp'"
            raise refused(f"{shown(regex)} may take too long: {slow}", hint)
        return regex

    @property
    def counts(self) -> bool:
        """True if a selector depends on block numbers, and so on the whole stack of blocks."""
        return any(selector is not None for selector in (self.layers, self.centred, self.every, self.tower))

    @model_validator(mode="after")
    def _selects(self) -> Where:
        if not self.model_dump(exclude_defaults=True):
            names = ", ".join(f"`{name}`" for name in type(self).model_fields)
            raise refused("`where` selects nothing", f"set at least one of {names}; `all: true` selects every MLP")
        return self
