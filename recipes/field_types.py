"""Types of the fields of a recipe: numbers, flags and texts that are not converted from other types."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

MAX_SIZE = 2**31 - 1  # of every number that counts something and has no smaller bound

# strict: otherwise `true` would be accepted as the number 1, and text as a number
Whole = Annotated[int, Field(strict=True)]
Index = Annotated[int, Field(strict=True, ge=0, le=MAX_SIZE)]
Count = Annotated[int, Field(strict=True, ge=1, le=MAX_SIZE)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True, min_length=1, max_length=10_000)]
