"""Calls of Python functions that the site has listed."""

from __future__ import annotations

import asyncio
import inspect
import json
from importlib import import_module
from typing import Annotated, Any

from pydantic import Field

from pipeline import Context, Fail, ParamsError, Refused, handler


@handler("python.call")
def call(
    call: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")], args: dict[str, Any] | None = None, *, context: Context
) -> Any:
    """Call a function that the site has listed, and return what it returns.

    Params:
        call: the function, as `package.module:function`.
        args: its arguments, by name.

    Result: the function's own; it must be JSON.

    Errors: Refused where `call` is not listed, letter for letter; ParamsError where `args` do not fit the function's
    signature; Fail where it cannot be imported or returns what is not JSON; whatever the function raises.

    Settings: PIPELINE_PYTHON_CALLS lists the functions; none by default.
    """
    if call not in context.settings.get("python_calls", ()):
        raise Refused(f"python.call may not call {call!r}; PIPELINE_PYTHON_CALLS lists the functions that it may")
    module, _, name = call.partition(":")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError) as exc:
        raise Fail(f"{call!r} cannot be imported: {exc}") from exc
    try:
        inspect.signature(function).bind(**(args or {}))
    except TypeError as exc:
        raise ParamsError(f"args do not fit {call!r}: {exc}") from exc
    result = function(**(args or {}))
    if inspect.iscoroutine(result):
        result = asyncio.run(result)
    try:
        json.dumps(result, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as exc:
        raise Fail(f"{call!r} returned what is not JSON: {exc}") from exc
    return result
