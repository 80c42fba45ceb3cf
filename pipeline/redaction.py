"""Keeps secrets out of what is recorded, logged or shown: their values are replaced before anything is cut short."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

_SHOWN = "[secret]"
#: shorter values would blot out ordinary text
_SHORTEST = 4


@dataclass(frozen=True)
class Redactor(logging.Filter):
    """Replaces the values of secrets; also a logging filter."""

    values: tuple[str, ...] = field(repr=False)

    @classmethod
    def of(cls, values: Iterable[str]) -> Redactor:
        """The longest values go first, so that one secret inside another is covered too."""
        return cls(tuple(sorted({v for v in values if len(v) >= _SHORTEST}, key=len, reverse=True)))

    def text(self, text: str) -> str:
        """The text without secrets."""
        for value in self.values:
            text = text.replace(value, _SHOWN)
        return text

    def json(self, text: str) -> str:
        """JSON text without secrets, however their characters are escaped in it."""
        for value in self.values:
            text = text.replace(json.dumps(value)[1:-1], _SHOWN).replace(json.dumps(value, ensure_ascii=False)[1:-1], _SHOWN)
        return text

    def filter(self, record: logging.LogRecord) -> bool:
        """Redact a log record, its arguments and its traceback."""
        if self.values:
            record.msg, record.args = self.text(record.getMessage()), ()
            if record.exc_info and not record.exc_text:
                record.exc_text = logging.Formatter().formatException(record.exc_info)
            if record.exc_text:
                record.exc_text = self.text(record.exc_text)
        return True

    def value(self, value: Any) -> Any:
        """A JSON value without secrets."""
        return json.loads(self.json(json.dumps(value))) if self.values else value
