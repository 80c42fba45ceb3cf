"""The proxy, against a server that echoes."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterator

import pytest

from pipeline.testing.proxy import Proxy


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(4096):
            self.request.sendall(data)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Resets are what these tests are about."""


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with _Server(("127.0.0.1", 0), _Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Proxy("127.0.0.1", server.server_address[1]) as proxy:
            yield proxy
        server.shutdown()


def client(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=30)


def say(line: socket.socket, text: bytes) -> bytes:
    line.sendall(text)
    return line.recv(4096)


def hears_nothing(line: socket.socket) -> bool:
    line.settimeout(0.2)
    try:
        line.recv(4096)
    except TimeoutError:
        return True
    finally:
        line.settimeout(30)
    return False


def test_pass_forwards_both_ways_and_counts_clients(proxy: Proxy) -> None:
    with client(proxy) as one, client(proxy) as other:
        assert say(one, b"a") == b"a"
        assert say(other, b"b") == b"b"
        assert proxy.connections == 2


def test_large_data_arrives_whole(proxy: Proxy) -> None:
    data = bytes(range(256)) * 4096
    with client(proxy) as line:
        sender = threading.Thread(target=line.sendall, args=(data,))
        sender.start()
        got = b""
        while len(got) < len(data):
            got += line.recv(65_536)
        sender.join()
    assert got == data


def test_cut_resets_clients_and_takes_new_ones(proxy: Proxy) -> None:
    with client(proxy) as line:
        assert say(line, b"a") == b"a"
        proxy.cut()
        with pytest.raises(ConnectionError):
            say(line, b"b") or say(line, b"b")
    with client(proxy) as line:
        assert say(line, b"c") == b"c"


def test_refuse_resets_old_and_new_clients_until_it_passes_again(proxy: Proxy) -> None:
    with client(proxy) as old:
        assert say(old, b"a") == b"a"
        proxy.set("refuse")
        with pytest.raises(ConnectionError):
            say(old, b"b") or say(old, b"b")
    with pytest.raises(ConnectionError), client(proxy) as new:
        say(new, b"c") or say(new, b"c")
        raise AssertionError("a client was served")
    proxy.set("pass")
    with client(proxy) as line:
        assert say(line, b"d") == b"d"


def test_blackhole_moves_nothing_and_resets_when_it_ends(proxy: Proxy) -> None:
    with client(proxy) as old:
        assert say(old, b"a") == b"a"
        proxy.set("blackhole")
        old.sendall(b"b")
        assert hears_nothing(old)
        with client(proxy) as new:
            new.sendall(b"c")
            assert hears_nothing(new)
            proxy.set("pass")
            for line in (old, new):
                with pytest.raises(ConnectionError):
                    assert line.recv(4096)
                    line.recv(4096)
                    raise AssertionError("a client was served")


def test_stall_holds_answers_and_gives_them_when_it_ends(proxy: Proxy) -> None:
    with client(proxy) as line:
        assert say(line, b"a") == b"a"
        proxy.set("stall")
        line.sendall(b"b")
        assert hears_nothing(line)
        proxy.set("pass")
        assert line.recv(4096) == b"b"


def test_server_that_is_down_closes_clients() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with Proxy("127.0.0.1", taken.getsockname()[1]) as proxy, pytest.raises(ConnectionError):
            with client(proxy) as line:  # which may hear of it while it still connects
                assert line.recv(4096)
                raise AssertionError("a client was served")
