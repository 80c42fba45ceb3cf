"""What is known of the handlers, as data: validation is handed this and imports no handler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a handler's function."""

    #: as in the signature
    name: str
    #: true where the function gives no default
    required: bool
    #: JSON Schema of the type that the signature gives; {} where it gives none
    schema: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class HandlerSpec:
    """What a handler takes."""

    #: the name by which definitions and Celery know it
    name: str
    #: bound by name from the merged input; the context is not among them
    parameters: tuple[Parameter, ...] = ()
    #: true where the function has **kwargs: any further name is taken
    open_ended: bool = False
    #: first line of the function's docstring
    summary: str = ""


#: handlers by name
Catalogue = Mapping[str, HandlerSpec]
