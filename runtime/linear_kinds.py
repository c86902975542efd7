"""Which linears of a model play the same part, by their names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def kinds_of(names: Iterable[str]) -> dict[str, str]:
    """For each linear the name of its kind, which all blocks and all experts share.

    That is the end of its name, as much of it as tells the model's kinds apart: "q_proj", and
    "attn.c_proj" beside "mlp.c_proj" in GPT-2. Of experts it holds their number's place:
    "experts.*.w1".
    """
    parts = {name: tuple(_NUMBER.sub("*", name).split(".")) for name in names}
    places = set(parts.values())
    ends = {place: _end(place, places) for place in places}
    return {name: ends[place] for name, place in parts.items()}


def _end(place: tuple[str, ...], places: set[tuple[str, ...]]) -> str:
    stars = [at for at, part in enumerate(place) if part == "*"]
    least = len(place) - stars[-1] + 1 if len(stars) > 1 else 1  # the first is the block's
    lengths = range(least, len(place))
    alone = (n for n in lengths if sum(other[-n:] == place[-n:] for other in places) == 1)
    return ".".join(place[-next(alone, len(place)) :])
