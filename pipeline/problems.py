"""The problems of one document, collected: where each stands, what is wrong, how to mend it."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import jsonschema_rs
from pydantic import BaseModel, ValidationError

from pipeline.document import UNSTORABLE, Document
from pipeline.errors import Problem
from pipeline.templates import Path, path_text

Model = TypeVar("Model", bound=BaseModel)

_INT64 = 2**63


class Problems:
    """Collects; looks up lines and similar names."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._found: list[Problem] = []
        self._comparisons = 100_000  # similar names are worth some time, not all of it

    def add(self, path: Path, what: str, how: str = "") -> None:
        """Record one problem."""
        source, line = self._document.source, self._document.line(path)
        self._found.append(Problem(path=path_text(path), what=what, how=how, source=source, line=line))

    def sorted(self) -> tuple[Problem, ...]:
        """What was found, by line, then as found."""
        return tuple(sorted(self._found, key=lambda problem: problem.line or 0))

    def line_words(self, path: Path) -> str:
        """` (line 7)`, or nothing where there are no lines."""
        line = self._document.line(path)
        return f" (line {line})" if line is not None else ""

    def nearest(self, name: str, names: Collection[str], otherwise: str = "") -> str:
        """A question after the most similar name, or `otherwise`."""
        self._comparisons -= len(names)
        affordable = self._comparisons > 0 and len(name) <= 255
        close = difflib.get_close_matches(name, names, n=1) if affordable else []
        return f"did you mean {close[0]!r}?" if close else otherwise

    def json(self, value: Any, path: Path, depth: int) -> bool:
        """Record everything in `value` that is not JSON, or deeper than `depth` levels in all; true where nothing is."""
        if is_json(value, depth - len(path)):
            return True
        self._not_json(value, path, depth)
        return False

    def _not_json(self, value: Any, path: Path, depth: int) -> None:
        if isinstance(value, dict | list | tuple):
            if len(path) >= depth:
                self.add(path[:8], f"nested deeper than {depth} levels", "flatten it")
                return
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                if isinstance(value, dict) and not isinstance(key, str):
                    self.add(path, f"key {_show(key)} is not text", "JSON has text keys only: write it as text")
                elif isinstance(key, str) and UNSTORABLE.search(key):
                    self.add(path, f"key {_show(key)} has a NUL character or half a surrogate pair", "take it out")
                elif not is_json(item, depth - len(path) - 1):
                    self._not_json(item, (*path, key), depth)
        elif isinstance(value, str):
            self.add(path, "text with a NUL character or half a surrogate pair", "take it out")
        elif isinstance(value, float):
            self.add(path, f"{value} is no number that JSON has", "use null, or text")
        elif isinstance(value, int):
            self.add(path, "a whole number of more than 64 bits", "write it as text")
        else:
            self.add(path, f"a {type(value).__name__} is not JSON", "use text, numbers, booleans, lists and mappings")

    def model(self, model: type[Model], data: Mapping[str, Any], path: Path) -> tuple[Model | None, frozenset[str]]:
        """The model of `data`; or None and the names of the fields that are wrong, each recorded."""
        try:
            return model.model_validate(data), frozenset()
        except ValidationError as exc:
            errors = exc.errors(include_url=False)
        for error in errors:
            what, how = self._words(model, error)
            self.add((*path, *error["loc"]), what, how)
        return None, frozenset(str(error["loc"][0]) for error in errors if error["loc"])

    def _words(self, model: type[BaseModel], error: Any) -> tuple[str, str]:
        kind, name, value = error["type"], str(error["loc"][-1]) if error["loc"] else "", error["input"]
        if kind == "extra_forbidden":
            fields = _fields(model, error["loc"][:-1])
            return f"unknown field {name!r}", self.nearest(name, fields, f"it takes {', '.join(fields)}")
        if kind == "missing":
            return f"{name} is missing", "add it"
        if kind == "model_type" or kind == "dict_type":
            return f"{name or 'this'} must be a mapping, found {_show(value)}", "write `name: value` pairs"
        if kind == "tuple_type":
            return f"{name} must be a list, found {_show(value)}", f"write [{value}]" if isinstance(value, str) else ""
        how = ""
        if kind == "string_type" and isinstance(value, int | float):
            how = f'quote it: {name}: "{value}"'
        elif kind == "literal_error" and isinstance(value, str):
            how = self.nearest(value, re.findall("'([^']+)'", error["ctx"]["expected"]))
        elif kind == "string_pattern_mismatch":
            how = "use letters, digits, _ . and -, beginning with a letter or digit"
            return f"{name} {_show(value)} is not a name that can be used", how
        return f"{name} {error['msg'].replace('Input should', 'should')}, found {_show(value)}", how

    def schema(self, validator: jsonschema_rs.Validator, value: Any, path: Path, what: str) -> set[str]:
        """Record how `value` does not fit the schema; the names of its properties that are missing."""
        missing: set[str] = set()
        if validator.is_valid(value):
            return missing
        for error in validator.iter_errors(value):
            if isinstance(error.kind, jsonschema_rs.ValidationErrorKind.Required) and not error.instance_path:
                missing.add(error.kind.property)
            self.add((*path, *error.instance_path), f"{what}{clip(_schema_words(error))}")
        return missing


def schema_validator(schema: Any) -> jsonschema_rs.Validator:
    """A validator that never reaches out for a referenced schema.

    Raises:
        ValueError: not a JSON Schema; a `jsonschema_rs.ValidationError` where the place is known.
    """
    try:
        return jsonschema_rs.validator_for(schema, offline=True)
    except jsonschema_rs.ReferencingError as exc:
        raise ValueError(str(exc)) from None


def _schema_words(error: jsonschema_rs.ValidationError) -> str:
    if isinstance(error.kind, jsonschema_rs.ValidationErrorKind.AnyOf):
        return ", and ".join(branch[0].message for branch in error.kind.context if branch) or error.message
    return error.message


def clip(text: str, limit: int = 200) -> str:
    """The first of `text`."""
    return text if len(text) <= limit else text[:limit] + "..."


def _show(value: Any) -> str:
    return "nothing" if value is None else clip(ascii(value), 60)


def _fields(model: type[BaseModel], loc: Iterable[Any]) -> list[str]:
    for part in loc:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        if field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            model = field.annotation
    return list(model.model_fields)


def is_json(value: Any, depth: int) -> bool:
    """Whether `value` is JSON that Postgres can hold, of no more than so many levels."""
    if isinstance(value, str):
        return UNSTORABLE.search(value) is None
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, int):
        return -_INT64 <= value < _INT64
    if isinstance(value, float):
        return math.isfinite(value)
    if depth <= 0:
        return False
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str) or UNSTORABLE.search(key) is not None or not is_json(item, depth - 1):
                return False
        return True
    return isinstance(value, list | tuple) and all(is_json(item, depth - 1) for item in value)
