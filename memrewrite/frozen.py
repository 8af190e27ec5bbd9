"""The base class of plain data that is immutable and has JSON both ways."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Immutable plain data with JSON both ways; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")
