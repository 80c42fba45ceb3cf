"""HTTP requests to addresses that other people name: they cannot be turned against the site's own network.

A host is resolved once, every address that it has is checked, and the connection is made to a checked address: a DNS
answer that changes afterwards changes nothing. TLS and the Host header still know the host by its name. Redirects are
followed here, each through the same check. Proxies of the environment are not used, bodies are read up to a limit, and
one deadline bounds everything from the first connection to the last byte.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
import time
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpcore
import httpx

from pipeline import Fail, ParamsError, Refused, Retry

#: IPv4 that is not the public internet, by IANA's registry of special addresses, with multicast
_IPV4_REFUSED = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
#: what IANA has handed out of IPv6; without NAT64 (64:ff9b::/96), IPv4-mapped, private, link-local and multicast
_IPV6_PUBLIC = ipaddress.IPv6Network("2000::/3")
#: inside it: protocols with Teredo, documentation, and 6to4
_IPV6_REFUSED = tuple(map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))

_ODD_NUMBER = re.compile(r"(\d+|0x[0-9a-f]*)", re.IGNORECASE)
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
#: headers that belong to one hop or to this module; a caller's would confuse the framing or the check of the host
_OWN_HEADERS = frozenset({"connection", "content-length", "host", "te", "trailer", "transfer-encoding", "upgrade"})
#: the only headers that go along to another origin: any other may be a credential
_HARMLESS_HEADERS = frozenset({"accept", "accept-encoding", "accept-language", "content-type", "user-agent"})
_RETRYABLE = frozenset({429, 502, 503, 504})
#: seconds: a server that asks for more is asked again after this
_MAX_RETRY_AFTER = 3600.0
#: seconds for one address, so that a dead one leaves time for the next
_CONNECT = 10.0


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer whose body has not been read yet."""

    status: int
    headers: httpx.Headers
    #: scheme and host that gave the answer
    origin: str
    #: the decoded body; raises Fail past the limit
    chunks: Iterator[bytes]


def build(
    method: str,
    url: str,
    *,
    headers: dict[str, str] | None = None,
    params: dict[str, Any] | None = None,
    content: bytes | None = None,
    defaults: dict[str, str],
) -> httpx.Request:
    """A request, with `defaults` for the headers that the caller leaves out.

    Raises:
        ParamsError: the URL or a header cannot be sent.
    """
    given = httpx.Headers({"user-agent": "pipeline", **defaults})
    for name, value in (headers or {}).items():
        if name.lower() in _OWN_HEADERS or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
            raise ParamsError(f"header {name!r} cannot be set")
        if not value.isascii() or not all(c.isprintable() or c == "\t" for c in value):
            raise ParamsError(f"the value of header {name!r} must be printable ASCII on one line")
        given[name] = value
    given["accept-encoding"] = "identity"
    try:
        target = httpx.URL(url)
        request = httpx.Request(
            method, target.copy_merge_params(params) if params else target, headers=given, content=content
        )
    except (httpx.InvalidURL, TypeError, ValueError) as exc:
        raise ParamsError(f"the URL cannot be used: {exc}") from exc
    if target.userinfo:
        raise ParamsError("the URL holds a user name or password: put credentials into the authorization header")
    return request


@contextmanager
def exchange(
    request: httpx.Request,
    *,
    allow_hosts: Collection[str],
    timeout: float,
    max_bytes: int,
    redirects: int = 5,
    stop_at: Collection[int] = (),
) -> Iterator[Reply]:
    """Send the request and give the answer; at most `redirects` are followed, none with a status in `stop_at`.

    Args:
        request: as `build` makes it.
        allow_hosts: hosts (or host:port) that are reached whatever their address.
        timeout: seconds for everything, the reading of the body included.
        max_bytes: largest body, decoded.

    Raises:
        Refused: the site forbids the scheme or the address.
        Fail: too many redirects, or the body is larger than `max_bytes`.
        TimeoutError, ConnectionError: nobody answered, or not to the end.
    """
    deadline = _Deadline(time.monotonic() + timeout)
    backend = _Pinned(frozenset(name.lower() for name in allow_hosts), deadline)
    followed = 0
    while True:
        if request.url.scheme not in ("http", "https"):
            raise Refused(f"scheme {request.url.scheme!r} is not allowed; only http and https are")
        if not request.url.host:
            raise ParamsError("the URL holds no host")
        origin = f"{request.url.scheme}://{request.url.netloc.decode()}"
        try:
            with (
                httpcore.ConnectionPool(network_backend=backend, max_keepalive_connections=0) as pool,
                pool.stream(
                    request.method,
                    httpcore.URL(
                        scheme=request.url.raw_scheme,
                        host=request.url.raw_host,
                        port=request.url.port,
                        target=request.url.raw_path,
                    ),
                    headers=request.headers.raw,
                    content=request.content,
                ) as response,
            ):
                headers = httpx.Headers(response.headers)
                status = response.status
                if not (redirects and status in _REDIRECTS and status not in stop_at and "location" in headers):
                    assert isinstance(response.stream, Iterable)
                    chunks = _decoded(response.stream, headers.get("content-encoding", ""), max_bytes)
                    yield Reply(status=status, headers=headers, origin=origin, chunks=chunks)
                    return
        except httpcore.TimeoutException as exc:
            raise TimeoutError(f"{request.method} {origin}: no complete answer within {timeout:g} s") from exc
        except (httpcore.NetworkError, httpcore.ProtocolError) as exc:
            raise ConnectionError(f"{request.method} {origin}: {exc}") from exc
        followed += 1
        if followed > redirects:
            raise Fail(f"{origin} redirects once more after {redirects} redirects")
        request = _redirected(request, status, headers["location"])


def check_status(reply: Reply, expected: Collection[int] | None = None) -> None:
    """Raise unless the status is among the expected ones (None: 200 to 299).

    Raises:
        Retry: 429, 502, 503 or 504, after the time that the server asks for (an hour at most).
        Fail: any other status below 500; it would be the same the next time.
        RuntimeError: any other status.
    """
    status = reply.status
    if 200 <= status < 300 if expected is None else status in expected:
        return
    what = f"{reply.origin} answered with status {status}"
    if status in _RETRYABLE:
        raise Retry(what, after=_retry_after(reply.headers.get("retry-after", "")))
    if status < 500:
        said = next(reply.chunks, b"")[:300].decode("utf-8", "replace").strip()
        raise Fail(f"{what}: {said}" if said else what)
    raise RuntimeError(what)


def addresses(host: str, port: int, allow_hosts: Collection[str]) -> list[str]:
    """Resolve a host, once, to addresses that may be reached.

    Raises:
        Refused: one of its addresses is not public, or it is an address in an odd spelling.
        ConnectionError: it has no address.
    """
    name = host.lower().rstrip(".")
    allowed = not {name, f"{name}:{port}", f"[{name}]", f"[{name}]:{port}"}.isdisjoint(allow_hosts)
    hint = f"PIPELINE_HTTP_ALLOW_HOSTS may allow {name!r}"
    if not allowed and _is_odd(name):
        raise Refused(f"host {host!r} is an address in an odd spelling; {hint}")
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise ConnectionError(f"host {host!r} cannot be resolved: {exc}") from exc
    results = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not allowed and (private := [address for address in results if not is_public(address)]):
        raise Refused(f"host {host!r} has the address {private[0]}, which is not public; {hint}")
    return results


def _is_odd(name: str) -> bool:
    """Whether a resolver might read an address into what is not plainly one: 0x7f.1, 2130706433, fe80::1%eth0."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return ":" in name or "%" in name or _ODD_NUMBER.fullmatch(name.rsplit(".", 1)[-1]) is not None
    return "%" in name


def is_public(address: str) -> bool:
    """Whether an IP address lies on the public internet and hides no other address in itself."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in network for network in _IPV4_REFUSED)
    return ip.scope_id is None and ip in _IPV6_PUBLIC and not any(ip in network for network in _IPV6_REFUSED)


@dataclass(frozen=True)
class _Deadline:
    at: float

    def left(self, most: float = float("inf")) -> float:
        left = self.at - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout
        return min(left, most)


@dataclass(frozen=True)
class _Pinned(httpcore.NetworkBackend):
    """Connects to checked addresses only: httpcore hands the host's name to nobody else."""

    allow_hosts: frozenset[str]
    deadline: _Deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        error: Exception = httpcore.ConnectError(f"host {host!r} has no address")
        for address in addresses(host, port, self.allow_hosts):
            try:
                stream = httpcore.SyncBackend().connect_tcp(address, port, self.deadline.left(_CONNECT))
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as exc:
                error = exc
            else:
                return _Timed(stream, self.deadline)
        raise error


@dataclass(frozen=True)
class _Timed(httpcore.NetworkStream):
    """A stream whose every operation ends by the deadline: a server that drips bytes gains nothing."""

    stream: httpcore.NetworkStream
    deadline: _Deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self.stream.read(max_bytes, self.deadline.left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), 65_536):
            self.stream.write(buffer[start : start + 65_536], self.deadline.left())

    def close(self) -> None:
        self.stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Timed(self.stream.start_tls(ssl_context, server_hostname, self.deadline.left()), self.deadline)

    def get_extra_info(self, info: str) -> Any:
        return self.stream.get_extra_info(info)


def _redirected(request: httpx.Request, status: int, location: str) -> httpx.Request:
    try:
        url = request.url.join(location)
    except httpx.InvalidURL as exc:
        raise Fail(f"the redirect leads to what is no URL: {exc}") from exc
    seen = (status == 303 and request.method != "HEAD") or (status in (301, 302) and request.method == "POST")
    dropped = _OWN_HEADERS | ({"content-type"} if seen else set())
    same = (url.scheme, url.netloc) == (request.url.scheme, request.url.netloc)
    headers = {
        name: value
        for name, value in request.headers.items()
        if name not in dropped and (same or name in _HARMLESS_HEADERS)
    }
    return httpx.Request(
        "GET" if seen else request.method, url, headers=headers, content=None if seen else request.content
    )


def _decoded(stream: Iterable[bytes], encoding: str, max_bytes: int) -> Iterator[bytes]:
    coded = encoding.strip().lower()
    if coded not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise Fail(f"the body has the content encoding {encoding!r}, though none was asked for")
    # 47: zlib and gzip are told apart by their heads
    decoder = zlib.decompressobj(wbits=47) if coded not in ("", "identity") else None
    size = 0
    for raw in stream:
        try:
            # one byte more than may come: a bomb is noticed, not unpacked
            chunk = decoder.decompress(raw, max_bytes - size + 1) if decoder else raw
        except zlib.error as exc:
            raise httpcore.RemoteProtocolError(f"the body is no valid {coded}: {exc}") from exc
        size += len(chunk)
        if size > max_bytes:
            raise Fail(f"the body is larger than {max_bytes} bytes; raise max_bytes, and give save_as for large files")
        if decoder and decoder.unused_data:
            raise httpcore.RemoteProtocolError(f"the body goes on after the end of its {coded} data")
        if chunk:
            yield chunk
    if decoder and size and not decoder.eof:
        raise httpcore.RemoteProtocolError(f"the body ends within its {coded} data")


def _retry_after(text: str) -> float | None:
    """Seconds from now, from a number of seconds or a date; None where the header says nothing of use."""
    try:
        if re.fullmatch(r"\d{1,9}", text.strip(), re.ASCII):
            seconds = float(text)
        else:
            when = parsedate_to_datetime(text)
            seconds = (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    except ValueError:
        return None
    return min(_MAX_RETRY_AFTER, max(0.0, seconds))
