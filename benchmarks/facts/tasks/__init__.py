"""What the models learn: facts, which need memory, and rules, which do not. A task is a function of the number of sequences."""

from __future__ import annotations

from collections.abc import Callable

from tasks.addition import addition
from tasks.airports import airports, airports_in_detail
from tasks.cities import cities
from tasks.countries import countries
from tasks.sequences import Sequences

TASKS: dict[str, Callable[[int], Sequences]] = {
    "airports": airports,
    "airports-in-detail": airports_in_detail,
    "cities": cities,
    "countries": countries,
    "addition": addition,
}
FACTS = ("airports", "airports-in-detail", "cities")  # the others are rules: they are asked for what was not trained
