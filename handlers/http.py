"""Requests to HTTP servers."""

from __future__ import annotations

from json import dumps, loads
from typing import Annotated, Any, Literal

from pydantic import Field

from handlers.outbound import Reply, build, check_status, exchange
from pipeline import Context, Fail, ParamsError, handler

#: the answer's headers that a result keeps
_KEPT_HEADERS = ("content-type", "content-length", "date", "etag", "last-modified", "link", "location", "retry-after")


@handler("http.request")
def request(
    url: str,
    method: Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"] = "GET",
    headers: dict[str, str] | None = None,
    params: dict[str, str | int | float | bool | list[str | int | float | bool]] | None = None,
    json: Any = None,
    body: str | None = None,
    timeout: Annotated[float, Field(gt=0, le=86_400)] = 30,
    expect_status: list[int] | None = None,
    max_bytes: Annotated[int, Field(ge=0)] = 4_194_304,
    save_as: str | None = None,
    *,
    context: Context,
) -> dict[str, Any]:
    """Send an HTTP request and return the answer.

    Redirects are followed, five at most; to another origin only harmless headers go along. POST and PATCH carry an
    Idempotency-Key header, the same in every attempt, unless `headers` has one.

    Params:
        url: http or https; credentials belong into `headers`.
        params: added to the URL's query.
        json: sent as the body, as JSON; or `body`: sent as the body, as UTF-8 text.
        timeout: seconds for everything, from the first connection to the last byte.
        expect_status: statuses that are a success; 200 to 299 by default.
        max_bytes: largest body of an answer; 4 MiB by default.
        save_as: file name: the body becomes an artifact instead of a part of the result.

    Result: `{"status", "headers", "body"}`: the body is the parsed value where the answer is JSON, else text, and null
    where it is empty; `headers` are a choice of the answer's, in small letters. With `save_as`: `{"status", "headers",
    "artifact"}`.

    Errors: Refused where the host has an address that is not public; Retry at 429, 502, 503 and 504, after the time
    that Retry-After asks for; Fail at any other unexpected status below 500, where the body is too large, and where it
    is neither text nor saved; RuntimeError at 5xx; ConnectionError and TimeoutError.

    Settings: PIPELINE_HTTP_ALLOW_HOSTS lists private hosts, as host or host:port, that may be reached; none by default.
    """
    if json is not None and body is not None:
        raise ParamsError("give json or body, not both")
    content = None if body is None else body.encode()
    defaults = {}
    if json is not None:
        content = dumps(json, allow_nan=False).encode()
        defaults["content-type"] = "application/json"
    if method in ("POST", "PATCH"):
        defaults["idempotency-key"] = context.idempotency_key
    with exchange(
        build(method, url, headers=headers, params=params, content=content, defaults=defaults),
        allow_hosts=context.settings.get("http_allow_hosts", ()),
        timeout=timeout,
        max_bytes=max_bytes,
        stop_at=expect_status or (),
    ) as reply:
        check_status(reply, expect_status)
        kept = {name: reply.headers[name] for name in _KEPT_HEADERS if name in reply.headers}
        answer: dict[str, Any] = {"status": reply.status, "headers": kept}
        if save_as is None:
            return {**answer, "body": _parsed(reply)}
        media_type = reply.headers.get("content-type", "application/octet-stream").partition(";")[0].strip()
        with context.artifacts.write(save_as, media_type) as writing, writing.path.open("wb") as stream:
            for chunk in reply.chunks:
                stream.write(chunk)
    return {**answer, "artifact": writing.artifact}


def _parsed(reply: Reply) -> Any:
    raw = b"".join(reply.chunks)
    media_type, _, rest = reply.headers.get("content-type", "").lower().partition(";")
    if not raw:
        return None
    if media_type.strip() == "application/json" or media_type.strip().endswith("+json"):
        try:
            return loads(raw)
        except (ValueError, RecursionError) as exc:
            raise Fail(f"the body of {reply.origin} is called {media_type.strip()} and is none: {exc}") from exc
    charset = rest.partition("charset=")[2].partition(";")[0].strip(" \"'") or "utf-8"
    try:
        return raw.decode(charset)
    except (LookupError, UnicodeError) as exc:
        raise Fail(f"the body of {reply.origin} is no {charset} text; give save_as to keep it as a file") from exc
