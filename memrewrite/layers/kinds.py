"""The layer kinds that a recipe can name. To add one, add its class to `KINDS`."""

from __future__ import annotations

from difflib import get_close_matches

from memrewrite.errors import UserError
from memrewrite.layers.contract import MemoryLayer
from memrewrite.layers.dense import Dense
from memrewrite.layers.identity import Identity, Nothing
from memrewrite.layers.memory_plus import MemoryPlus
from memrewrite.layers.moe import Moe
from memrewrite.layers.peer import Peer
from memrewrite.layers.pkm import Pkm

KINDS: tuple[type[MemoryLayer], ...] = (MemoryPlus, Pkm, Peer, Moe, Dense, Identity, Nothing)


def kind_named(name: str) -> type[MemoryLayer]:
    """The class of the layer kind `name`. Raises `UserError` with the most similar name if there is none."""
    kinds = {kind.kind: kind for kind in KINDS}
    if name in kinds:
        return kinds[name]
    near = get_close_matches(name, kinds, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(map(repr, kinds))}"
    raise UserError(f"unknown layer kind {name!r}", hint=hint)
