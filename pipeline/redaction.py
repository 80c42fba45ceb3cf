"""Keeps secrets out of what is recorded, logged or shown: their values are replaced before anything is cut short."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, quote_plus

_SHOWN = "[secret]"
#: shorter values would blot out ordinary text
_SHORTEST = 4


@dataclass(frozen=True)
class Redactor(logging.Filter):
    """Replaces the values of secrets; also a logging filter."""

    values: tuple[str, ...] = field(repr=False)

    @classmethod
    def of(cls, secrets: Iterable[str]) -> Redactor:
        """Also covers how Python, JSON and URLs write them; the longest go first, for one may be part of another."""
        written = {
            form
            for value in secrets
            if len(value) >= _SHORTEST
            for form in (value, repr(value)[1:-1], json.dumps(value)[1:-1], quote(value), quote_plus(value))
        }
        return cls(tuple(sorted(written, key=len, reverse=True)))

    def text(self, text: str) -> str:
        """The text without secrets."""
        for value in self.values:
            text = text.replace(value, _SHOWN)
        return text

    def holds(self, exc: BaseException) -> bool:
        """Whether the exception's traceback would show a secret."""
        told = "".join(traceback.format_exception(exc)) if self.values else ""
        return self.text(told) != told

    def value(self, value: Any) -> Any:
        """JSON data without secrets: in keys, in text, and where a number reads as one."""
        if not self.values:
            return value
        match value:
            case str():
                return self.text(value)
            case dict():
                return {self.text(key): self.value(item) for key, item in value.items()}
            case list():
                return [self.value(item) for item in value]
            case int() | float() if str(value) in self.values:
                return _SHOWN
            case _:
                return value

    def filter(self, record: logging.LogRecord) -> bool:
        """Redact a log record, its arguments and its traceback."""
        if self.values:
            try:
                message = record.getMessage()
            except Exception:  # wrong arguments: logging reports them where nothing filters, and so must this
                message = f"{record.msg} {record.args}"
            record.msg, record.args = self.text(message), ()
            if record.exc_info and not record.exc_text:
                record.exc_text = logging.Formatter().formatException(record.exc_info)
            if record.exc_text:
                record.exc_text = self.text(record.exc_text)
        return True
