"""VALIDATE: what a caller hands over beside a definition has the form that it must have; pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.errors import InputError, Problem

#: characters of a user's name or an idempotency key
_TEXT_LENGTH = 255


def as_input(given: Any) -> dict[str, Any]:
    """An execution's input as a dict of its own.

    Raises:
        InputError: it is no mapping.
    """
    if given is not None and not isinstance(given, Mapping):
        raise InputError((Problem(path="", what=f"is a {type(given).__name__}, not a mapping", source="<input>"),))
    return dict(given or {})


def as_inputs(given: Any) -> list[Any]:
    """Inputs of several executions, each mapping as a dict of its own; what is none is left for validation to tell.

    Raises:
        InputError: they are no list.
    """
    if not isinstance(given, Iterable) or isinstance(given, Mapping | str | bytes):
        what = f"is a {type(given).__name__}, not a list of mappings"
        raise InputError((Problem(path="inputs", what=what, how="give a mapping for each execution"),))
    return [dict(one or {}) if one is None or isinstance(one, Mapping) else one for one in given]


def as_keys(given: Any, inputs: Sequence[Any]) -> list[str | None]:
    """Idempotency keys, one for each input.

    Raises:
        InputError: they are no list of that length, or inputs that differ have the same.
    """
    keys = None if not isinstance(given, Iterable) or isinstance(given, Mapping | str | bytes) else list(given)
    if keys is None or len(keys) != len(inputs):
        what = f"is a {type(given).__name__}, not a list" if keys is None else f"{len(keys)} keys for {len(inputs)} inputs"
        raise InputError((Problem(path="idempotency_keys", what=what, how="give one for each input, or none at all"),))
    first: dict[str, int] = {}
    for number, key in enumerate(keys):
        if isinstance(key, str) and _text(inputs[first.setdefault(key, number)]) != _text(inputs[number]):
            what = f"{key!r} repeats idempotency_keys[{first[key]}], whose input differs"
            raise InputError((Problem(path=f"idempotency_keys[{number}]", what=what, how="give each input its own key"),))
    return keys


def _text(given: Any) -> str:
    """What the store compares: 1, 1.0 and True differ there."""
    try:
        return json.dumps(given, sort_keys=True)
    except (TypeError, ValueError):  # validation tells why
        return repr(given)


def require_text(**texts: str | None) -> None:
    """Refuse what Postgres cannot hold, or nobody would mean.

    Raises:
        InputError: a text is none, is too long, or has a character that cannot be stored.
    """
    wrong = []
    for name, text in texts.items():
        if text is not None and not isinstance(text, str):
            wrong.append(Problem(path=name, what=f"is a {type(text).__name__}, not text"))
            continue
        if text == "" and name.startswith("idempotency_key"):
            wrong.append(Problem(path=name, what="is empty", how="give None where there is no key"))
        if text and ("\0" in text or any("\ud800" <= c <= "\udfff" for c in text)):
            wrong.append(Problem(path=name, what="has a character that cannot be stored (NUL, or half a surrogate pair)"))
        if text and len(text) > _TEXT_LENGTH:
            wrong.append(Problem(path=name, what=f"has {len(text):,} characters, more than {_TEXT_LENGTH}"))
    if wrong:
        raise InputError(tuple(wrong))
