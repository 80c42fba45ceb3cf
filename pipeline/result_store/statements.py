"""The SQL files of this package, as data."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

_HEADER = re.compile(r"^-- (\w+) --\n", re.MULTILINE)


@cache
def statements() -> dict[str, str]:
    """The statements of queries.sql by name."""
    pieces = _HEADER.split(sql_text("queries.sql"))
    return {name: body.strip() for name, body in zip(pieces[1::2], pieces[2::2], strict=True)}


@cache
def sql_text(name: str) -> str:
    """A file of this package."""
    return resources.files("pipeline.result_store").joinpath(name).read_text("utf-8")
