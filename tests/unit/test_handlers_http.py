from __future__ import annotations

import gzip
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from handlers.http import request
from handlers.outbound import addresses, is_public
from pipeline import Artifact, ArtifactStore, Context, Fail, ParamsError, Refused, Retry

Answer = Callable[[BaseHTTPRequestHandler, bytes], None]


class Site:
    """A real HTTP server on a free port of 127.0.0.1: `answers` by path, `seen` requests in order."""

    def __init__(self) -> None:
        site = self
        self.answers: dict[str, Answer] = {}
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                site.seen.append((self.command, self.path, headers, body))
                site.answers[self.path.partition("?")[0]](self, body)

            do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = answer

            def log_message(self, *args: Any, **more: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Clients that leave early are what some tests are about."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"


def plain(
    body: bytes = b"", status: int = 200, media_type: str = "text/plain; charset=utf-8", **headers: str
) -> Answer:
    def answer(connection: BaseHTTPRequestHandler, _body: bytes) -> None:
        connection.send_response(status)
        connection.send_header("Content-Type", media_type)
        connection.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            connection.send_header(name.replace("_", "-"), value)
        connection.end_headers()
        if connection.command != "HEAD":
            connection.wfile.write(body)

    return answer


@contextmanager
def serving() -> Iterator[Site]:
    site = Site()
    thread = threading.Thread(target=site.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.server.shutdown()
        site.server.server_close()
        thread.join()


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as served:
        yield served


@pytest.fixture
def context(tmp_path: Path, site: Site) -> Context:
    return allowing(tmp_path, f"127.0.0.1:{site.port}")


def allowing(folder: Path, *hosts: str) -> Context:
    return Context(
        execution_id="exec-1",
        task_id="task",
        workflow_id="w",
        attempt=1,
        artifacts=ArtifactStore(root=str(folder), folder="exec-1/task/1"),
        settings={"http_allow_hosts": hosts},
    )


def test_request_json_answer_is_parsed(site: Site, context: Context) -> None:
    site.answers["/a"] = plain(b'{"n": [1, null]}', media_type="application/json", ETag="x", Set_Cookie="s=1")
    result = request(site.url + "/a", context=context)
    headers = result["headers"]
    assert (result["status"], result["body"]) == (200, {"n": [1, None]})
    assert headers["etag"] == "x"
    assert headers["content-type"] == "application/json"
    assert "set-cookie" not in headers


@pytest.mark.parametrize(
    ("raw", "media_type", "body"),
    [
        (b'{"a": 1}', "application/problem+json", {"a": 1}),
        ("é".encode(), "text/plain", "é"),
        ("é".encode("latin-1"), "text/plain; charset=latin-1", "é"),
        (b"", "application/json", None),
    ],
)
def test_request_body_follows_its_media_type(
    site: Site, context: Context, raw: bytes, media_type: str, body: Any
) -> None:
    site.answers["/"] = plain(raw, media_type=media_type)
    assert request(site.url, context=context)["body"] == body


@pytest.mark.parametrize("media_type", ["application/json", "text/plain", "text/plain; charset=klingon"])
def test_request_body_that_is_not_what_it_says_fails(site: Site, context: Context, media_type: str) -> None:
    site.answers["/"] = plain(b"\xff{", media_type=media_type)
    with pytest.raises(Fail, match=r"body of http://127\.0\.0\.1"):
        request(site.url, context=context)


def test_request_json_and_query_and_headers_arrive(site: Site, context: Context) -> None:
    site.answers["/p"] = plain()
    request(
        site.url + "/p?a=1", "POST", headers={"X-Key": "k"}, params={"b": ["2 3", 4]}, json={"é": 1}, context=context
    )
    method, path, headers, body = site.seen[0]
    assert (method, path) == ("POST", "/p?a=1&b=2+3&b=4")
    assert json.loads(body) == {"é": 1}
    assert headers["x-key"] == "k"
    assert headers["content-type"] == "application/json"
    assert headers["host"] == f"127.0.0.1:{site.port}"
    assert headers["idempotency-key"] == "exec-1_task"


def test_request_text_body_arrives(site: Site, context: Context) -> None:
    site.answers["/"] = plain()
    request(site.url, "PUT", body="a,b\né", headers={"Content-Type": "text/csv"}, context=context)
    assert site.seen[0][3] == "a,b\né".encode()
    assert site.seen[0][2]["content-type"] == "text/csv"
    assert "idempotency-key" not in site.seen[0][2]


def test_request_saved_becomes_an_artifact(site: Site, context: Context) -> None:
    data = bytes(range(256)) * 1000
    site.answers["/"] = plain(data, media_type="application/zip")
    result = request(site.url, save_as="data.zip", context=context)
    artifact = result["artifact"]
    assert isinstance(artifact, Artifact)
    assert (artifact.media_type, artifact.bytes, "body" in result) == ("application/zip", len(data), False)
    with context.artifacts.read(artifact.uri) as path:
        assert path.read_bytes() == data


def test_request_head_has_no_body(site: Site, context: Context) -> None:
    site.answers["/"] = plain(b"12345")
    result = request(site.url, "HEAD", context=context)
    assert (result["body"], result["headers"]["content-length"]) == (None, "5")


@pytest.mark.parametrize("status", [400, 401, 404, 410, 304])
def test_request_status_that_stays_fails(site: Site, context: Context, status: int) -> None:
    site.answers["/"] = plain(b"" if status == 304 else b"no such thing", status)
    with pytest.raises(Fail, match=f"status {status}" + ("" if status == 304 else ": no such thing")):
        request(site.url, context=context)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
@pytest.mark.parametrize(
    ("header", "after"),
    [("7", 7.0), ("999999", 3600.0), (formatdate(0, usegmt=True), 0.0), ("soon", None), ("-1", None), ("", None)],
)
def test_request_status_that_passes_is_retried_when_the_server_says(
    site: Site, context: Context, status: int, header: str, after: float | None
) -> None:
    site.answers["/"] = plain(b"", status, Retry_After=header)
    with pytest.raises(Retry, match=f"status {status}") as raised:
        request(site.url, context=context)
    assert raised.value.after == after


def test_request_status_500_is_an_ordinary_error(site: Site, context: Context) -> None:
    site.answers["/"] = plain(b"", 500)
    with pytest.raises(RuntimeError, match="status 500"):
        request(site.url, context=context)


@pytest.mark.parametrize("status", [404, 503, 302])
def test_request_status_expected_is_a_result(site: Site, context: Context, status: int) -> None:
    site.answers["/"] = plain(b"x", status, Location="/elsewhere")
    assert request(site.url, expect_status=[status], context=context)["status"] == status


def test_request_status_200_not_expected_fails(site: Site, context: Context) -> None:
    site.answers["/"] = plain()
    with pytest.raises(Fail, match="status 200"):
        request(site.url, expect_status=[201], context=context)


SELF = [
    "127.0.0.1",
    "127.1",
    "127.0.1",
    "127.9.8.7",
    "2130706433",
    "0x7f000001",
    "0x7f.1",
    "0x7F.0.0.0x1",
    "017700000001",
    "127.0.0.1.",
    "127。0。0。1",
    "0.0.0.0",
    "0",
    "localhost",
    "LocalHost.",
    "[::1]",
    "[0:0:0:0:0:0:0:1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::127.0.0.1]",
    "[64:ff9b::127.0.0.1]",
    "[64:ff9b:1::7f00:1]",
    "[2002:7f00:1::]",
    "[2001:0:7f00:1::]",
    "[::1%25lo]",
]
METADATA = [
    "169.254.169.254",
    "169.16689662",
    "2852039166",
    "0xa9fea9fe",
    "0xA9.0xFE.0xA9.0xFE",
    "025177524776",
    "169.254.169.254.",
    "[::ffff:169.254.169.254]",
    "[::ffff:a9fe:a9fe]",
    "[64:ff9b::a9fe:a9fe]",
    "[2002:a9fe:a9fe::1]",
    "[fd00:ec2::254]",
    "[fe80::a9fe:a9fe]",
]
PRIVATE = ["10.1.2.3", "172.31.0.1", "192.168.0.1", "100.64.0.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "[ff02::1]"]


@pytest.mark.parametrize("host", [*SELF, *METADATA, *PRIVATE])
def test_request_address_that_is_not_public_is_refused_in_every_spelling(tmp_path: Path, site: Site, host: str) -> None:
    site.answers["/"] = plain()
    with pytest.raises(Refused, match="PIPELINE_HTTP_ALLOW_HOSTS"):
        request(f"http://{host}:{site.port}/", context=allowing(tmp_path))
    assert site.seen == []


@pytest.mark.parametrize(
    "url",
    [
        "http://0177.0.0.1/",
        "http://0251.0376.0251.0376/",
        "http://①②⑦.⓪.⓪.①/",
        "http://[::1/",
        "http:///",
        "http://u:p@x.org/",
    ],
)
def test_request_url_that_cannot_be_used_is_a_params_error(tmp_path: Path, url: str) -> None:
    with pytest.raises(ParamsError):
        request(url, context=allowing(tmp_path))


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://example.org/", "gopher://127.0.0.1/", "/path", ""])
def test_request_other_scheme_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(Refused, match="only http and https"):
        request(url, context=allowing(tmp_path))


@pytest.mark.parametrize("address", ["1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700:4700::1111", "2a00:1450::1"])
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(address)
    assert addresses(address, 443, frozenset()) == [address]


@pytest.mark.parametrize("entry", ["127.0.0.2", "127.0.0.1:1", "localhost", "0.0.1", ".1", "*"])
def test_request_allowed_host_allows_no_other(tmp_path: Path, site: Site, entry: str) -> None:
    with pytest.raises(Refused):
        request(site.url, context=allowing(tmp_path, entry))


@pytest.mark.parametrize("entry", ["LOCALHOST", "localhost:{port}"])
def test_request_allowed_host_is_known_by_name_or_name_and_port(tmp_path: Path, site: Site, entry: str) -> None:
    site.answers["/"] = plain(b"in")
    url = f"http://localhost:{site.port}/"
    assert request(url, context=allowing(tmp_path, entry.format(port=site.port)))["body"] == "in"
    assert site.seen[0][2]["host"] == f"localhost:{site.port}"


class Resolver:
    """Stands before the system's resolver for one name: gives the answers in turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, *answers: list[str]) -> None:
        self.asked, system = 0, socket.getaddrinfo

        def resolve(host: Any, port: Any, *args: Any, **more: Any) -> Any:
            if host != name:
                return system(host, port, *args, **more)
            self.asked += 1
            return [entry for a in answers[self.asked - 1] for entry in system(a, port, *args, **more)]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)


def test_request_connects_to_the_address_that_was_checked(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.answers["/"] = plain(b"in")
    resolver = Resolver(monkeypatch, "rebind.test", ["127.0.0.1"], ["10.0.0.1"])
    url = f"http://rebind.test:{site.port}/"
    assert request(url, context=allowing(tmp_path, "rebind.test"))["body"] == "in"
    assert resolver.asked == 1
    assert site.seen[0][2]["host"] == f"rebind.test:{site.port}"


def test_request_name_with_one_private_address_among_public_ones_is_refused(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    Resolver(monkeypatch, "mixed.test", ["1.1.1.1", "127.0.0.1"])
    with pytest.raises(Refused, match=r"mixed.test.*127\.0\.0\.1"):
        request(f"http://mixed.test:{site.port}/", context=allowing(tmp_path))
    assert site.seen == []


def test_request_first_address_dead_tries_the_next(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.answers["/"] = plain(b"in")
    Resolver(monkeypatch, "two.test", ["::1", "127.0.0.1"])
    assert request(f"http://two.test:{site.port}/", context=allowing(tmp_path, "two.test"))["body"] == "in"


def test_request_proxies_of_the_environment_are_not_used(
    site: Site, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.answers["/"] = plain(b"direct")
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert request(site.url, context=context)["body"] == "direct"


def test_request_tls_names_the_host_though_the_address_is_pinned(tmp_path: Path) -> None:
    hello: list[bytes] = []
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def listen() -> None:
            connection, _ = server.accept()
            with connection:
                hello.append(connection.recv(4096))

        thread = threading.Thread(target=listen)
        thread.start()
        with pytest.raises(ConnectionError, match="https://localhost"):
            request(f"https://localhost:{server.getsockname()[1]}/", context=allowing(tmp_path, "localhost"))
        thread.join()
    assert b"localhost" in hello[0]


def test_request_redirect_is_followed(site: Site, context: Context) -> None:
    site.answers |= {"/a": plain(b"", 302, Location="b?x=1"), "/b": plain(b"here")}
    assert request(site.url + "/a", headers={"Authorization": "t"}, context=context)["body"] == "here"
    assert [seen[1] for seen in site.seen] == ["/a", "/b?x=1"]
    assert site.seen[1][2]["authorization"] == "t"


@pytest.mark.parametrize("target", ["http://localhost:{port}/", "http://2130706433:{port}/", "//[::1]:{port}/"])
def test_request_redirect_to_a_private_address_is_refused(site: Site, context: Context, target: str) -> None:
    site.answers |= {"/a": plain(b"", 302, Location=target.format(port=site.port)), "/": plain(b"inside")}
    with pytest.raises(Refused):
        request(site.url + "/a", context=context)
    assert len(site.seen) == 1


def test_request_redirect_to_another_scheme_is_refused(site: Site, context: Context) -> None:
    site.answers["/a"] = plain(b"", 302, Location="file:///etc/passwd")
    with pytest.raises(Refused, match="file"):
        request(site.url + "/a", context=context)


def test_request_redirect_to_another_origin_carries_no_credentials(site: Site, tmp_path: Path) -> None:
    with serving() as other:
        site.answers["/a"] = plain(b"", 307, Location=other.url + "/b")
        other.answers["/b"] = plain(b"there")
        secrets = {"Authorization": "Bearer t", "Cookie": "s", "X-Api-Key": "k", "Accept": "text/plain"}
        request(site.url + "/a", headers=secrets, context=allowing(tmp_path, "127.0.0.1"))
        headers = other.seen[0][2]
    assert headers["accept"] == "text/plain"
    assert {"authorization", "cookie", "x-api-key"}.isdisjoint(headers)
    assert headers["host"] == f"127.0.0.1:{other.port}"


@pytest.mark.parametrize(
    ("status", "method", "then"),
    [(301, "POST", "GET"), (302, "POST", "GET"), (303, "PUT", "GET"), (307, "POST", "POST"), (308, "PUT", "PUT")],
)
def test_request_redirect_keeps_method_and_body_or_neither(
    site: Site, context: Context, status: int, method: Any, then: str
) -> None:
    site.answers |= {"/a": plain(b"", status, Location="/b"), "/b": plain()}
    request(site.url + "/a", method, body="text", context=context)
    assert (site.seen[1][0], site.seen[1][3]) == (then, b"text" if then == method else b"")


def test_request_redirects_end_after_five(site: Site, context: Context) -> None:
    site.answers["/loop"] = plain(b"", 302, Location="/loop")
    with pytest.raises(Fail, match="after 5 redirects"):
        request(site.url + "/loop", context=context)
    assert len(site.seen) == 6


@pytest.mark.parametrize("save_as", [None, "big"])
def test_request_body_larger_than_the_limit_fails_and_leaves_nothing(
    site: Site, context: Context, tmp_path: Path, save_as: str | None
) -> None:
    site.answers["/"] = plain(b"x" * 1001)
    with pytest.raises(Fail, match="larger than 1000 bytes"):
        request(site.url, max_bytes=1000, save_as=save_as, context=context)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert request(site.url, max_bytes=1001, save_as=save_as, context=context)["status"] == 200


def test_request_body_without_end_fails(site: Site, context: Context) -> None:
    def endless(connection: BaseHTTPRequestHandler, _body: bytes) -> None:
        connection.send_response(200)
        connection.end_headers()
        while True:
            connection.wfile.write(b"x" * 65_536)

    site.answers["/"] = endless
    with pytest.raises(Fail, match="larger than"):
        request(site.url, max_bytes=1_000_000, context=context)


def drip(head: bytes) -> Answer:
    """Sends `head`, then a byte now and then until the client leaves."""

    def answer(connection: BaseHTTPRequestHandler, _body: bytes) -> None:
        connection.wfile.write(head)
        while True:
            connection.wfile.write(b"x")
            threading.Event().wait(0.02)

    return answer


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n"], ids=["headers", "body"])
@pytest.mark.parametrize("save_as", [None, "slow"])
def test_request_answer_that_drips_ends_at_the_timeout(
    site: Site, context: Context, head: bytes, save_as: str | None
) -> None:
    site.answers["/"] = drip(head)
    with pytest.raises(TimeoutError, match=r"within 0\.3 s"):
        request(site.url, timeout=0.3, save_as=save_as, context=context)


def test_request_answer_that_breaks_off_is_a_connection_error(site: Site, context: Context, tmp_path: Path) -> None:
    def short(connection: BaseHTTPRequestHandler, _body: bytes) -> None:
        connection.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")

    site.answers["/"] = short
    with pytest.raises(ConnectionError):
        request(site.url, save_as="half", context=context)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_request_nobody_listens_is_a_connection_error(tmp_path: Path) -> None:
    with closing(socket.socket()) as deaf:
        deaf.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=re.escape(url)) as raised:
            request(url + "/?token=canary", context=allowing(tmp_path, "127.0.0.1"))
    assert "canary" not in str(raised.value)


def test_request_name_that_does_not_exist_is_a_connection_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_args: Any, **_more: Any) -> Any:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ConnectionError, match=r"absent\.test"):
        request("http://absent.test/", context=allowing(tmp_path))


def test_request_compressed_body_is_unpacked(site: Site, context: Context) -> None:
    site.answers["/"] = plain(gzip.compress(b"packed" * 1000), Content_Encoding="gzip")
    assert request(site.url, context=context)["body"] == "packed" * 1000
    assert site.seen[0][2]["accept-encoding"] == "identity"


def test_request_compressed_bomb_fails(site: Site, context: Context) -> None:
    site.answers["/"] = plain(gzip.compress(bytes(20_000_000)), Content_Encoding="gzip")
    with pytest.raises(Fail, match="larger than"):
        request(site.url, max_bytes=1_000_000, context=context)


@pytest.mark.parametrize(
    ("body", "encoding", "error"),
    [
        (gzip.compress(b"x" * 999)[:-4], "gzip", ConnectionError),
        (gzip.compress(b"x") + b"more", "gzip", ConnectionError),
        (b"no gzip", "gzip", ConnectionError),
        (b"x", "br", Fail),
        (gzip.compress(gzip.compress(b"x")), "gzip, gzip", Fail),
    ],
)
def test_request_compressed_body_that_is_none_is_an_error(
    site: Site, context: Context, body: bytes, encoding: str, error: type[Exception]
) -> None:
    site.answers["/"] = plain(body, Content_Encoding=encoding)
    with pytest.raises(error):
        request(site.url, context=context)


@pytest.mark.parametrize(
    "headers", [{"X": "a\r\nY: b"}, {"X\r\nY": "b"}, {"X": "a\nb"}, {"X": "é"}, {"Host": "h"}, {"Content-Length": "1"}]
)
def test_request_header_that_cannot_be_set_is_a_params_error(
    site: Site, context: Context, headers: dict[str, str]
) -> None:
    with pytest.raises(ParamsError, match="header"):
        request(site.url, headers=headers, context=context)
    assert site.seen == []


def test_request_json_and_body_is_a_params_error(site: Site, context: Context) -> None:
    with pytest.raises(ParamsError, match="not both"):
        request(site.url, "POST", json={}, body="", context=context)
