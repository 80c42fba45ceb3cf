"""VALIDATE: what a caller hands over beside a definition has the form that it must have; pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.errors import InputError, Problem
from pipeline.validation import MOST_PROBLEMS

#: characters of a user's name or an idempotency key
_TEXT_LENGTH = 255


def as_input(given: Any, path: str = "", source: str = "<input>") -> dict[str, Any]:
    """An execution's input as a dict of its own.

    Raises:
        InputError: it is no mapping.
    """
    if given is not None and not isinstance(given, Mapping):
        raise InputError((Problem(path=path, what=f"is a {type(given).__name__}, not a mapping", source=source),))
    return dict(given or {})


def as_inputs(given: Any) -> list[dict[str, Any]]:
    """Inputs of several executions.

    Raises:
        InputError: they are no list, or some are no mappings.
    """
    if not isinstance(given, Iterable) or isinstance(given, Mapping | str | bytes):
        what = f"is a {type(given).__name__}, not a list of mappings"
        raise InputError((Problem(path="inputs", what=what, how="give a mapping for each execution"),))
    found, wrong = list[dict[str, Any]](), list[Problem]()
    for number, one in enumerate(given):
        try:
            found.append(as_input(one, f"[{number}]", "<inputs>"))
        except InputError as exc:
            wrong.extend(exc.problems)
    if wrong:
        raise InputError(tuple(wrong[:MOST_PROBLEMS]))
    return found


def as_keys(given: Any, inputs: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """Idempotency keys, one for each input.

    Raises:
        InputError: they are no list of that length, or inputs that differ have the same.
    """
    if not isinstance(given, Sequence) or isinstance(given, str | bytes) or len(given) != len(inputs):
        count = len(given) if isinstance(given, Sequence) and not isinstance(given, str | bytes) else None
        what = f"is a {type(given).__name__}, not a list" if count is None else f"{count} keys for {len(inputs)} inputs"
        raise InputError((Problem(path="idempotency_keys", what=what, how="give one for each input, or none at all"),))
    first: dict[Any, int] = {}
    for number, key in enumerate(given):
        if isinstance(key, str) and inputs[first.setdefault(key, number)] != inputs[number]:
            what = f"is that of input {first[key]} too, which is another"
            raise InputError((Problem(path=f"idempotency_keys[{number}]", what=what, how="give each work a key of its own"),))
    return list(given)


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
        if text and ("\0" in text or any("\ud800" <= c <= "\udfff" for c in text)):
            wrong.append(Problem(path=name, what="has a character that cannot be stored (NUL, or half a surrogate pair)"))
        if text and len(text) > _TEXT_LENGTH:
            wrong.append(Problem(path=name, what=f"has {len(text):,} characters, more than {_TEXT_LENGTH}"))
    if wrong:
        raise InputError(tuple(wrong))
