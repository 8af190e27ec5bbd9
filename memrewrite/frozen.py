"""Base class of immutable plain data that converts to and from JSON."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Immutable plain data that converts to and from JSON; unknown keys raise `pydantic.ValidationError`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
