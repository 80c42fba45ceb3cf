"""EXECUTE, at the edges of a handler: what it is given by name, and what is recorded of what it returns."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic_core import PydanticSerializationError, to_jsonable_python

from pipeline.errors import ResultError
from pipeline.redaction import Redactor

#: an escaped NUL in JSON text, and not the escaped backslash of a text that reads so
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def recordable(returned: Any, redactor: Redactor, limit: int) -> Any:
    """What a handler returned, as JSON data without secrets.

    Raises:
        ResultError: it is not JSON, or larger than `limit` bytes.
    """
    try:
        data = redactor.value(to_jsonable_python(returned, inf_nan_mode="constants"))
        text = json.dumps(data, ensure_ascii=False, allow_nan=False)
        size = len(text.encode())
    except (PydanticSerializationError, ValueError, TypeError, RecursionError) as exc:
        raise ResultError(
            f"the handler returned a {type(returned).__name__} that is not JSON ({exc});"
            " return dicts, lists, text, numbers, booleans, None or pydantic models"
        ) from exc
    if _NUL.search(text):
        raise ResultError(
            "the handler returned text with a NUL character, which Postgres cannot hold; remove it, or write the data"
            " with context.artifacts and return the reference"
        )
    if size > limit:
        raise ResultError(
            f"the handler returned {size:,} bytes, the limit is {limit:,} (PIPELINE_MAX_RESULT_BYTES);"
            " write the data with context.artifacts and return the reference"
        )
    return data


def bound_name(dependency: str, names: set[str]) -> str | None:
    """The parameter that takes a dependency's result: its id, with - read as _ where no parameter is called so."""
    plain = dependency.replace("-", "_")
    return dependency if dependency in names else plain if plain in names else None


def text_of(exc: BaseException) -> str:
    """An exception's message; its type's name where it has none."""
    try:
        return str(exc) or type(exc).__name__
    except Exception:
        return f"{type(exc).__name__} (its message cannot be read)"
