"""A TCP line to a server that tests can cut, mend and hold: for outages that leave the server itself alone."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit


class Line:
    """A line to a server that can be cut: what runs over it breaks, and nothing new gets through."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname
        self._target = (parts.hostname, parts.port or 0)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.1)
        address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        user, at, _ = parts.netloc.rpartition("@")
        self.url = parts._replace(netloc=user + at + address).geturl()
        #: cleared, answers do not come through until it is set
        self.answers = threading.Event()
        self.answers.set()
        self._open: list[socket.socket] = []
        self._cut = self._closed = False
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def cut(self) -> None:
        """Break what is there."""
        self._cut = True
        for end_ in self._open:
            with suppress(OSError):
                end_.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Let connections through again."""
        self._cut = False

    def close(self) -> None:
        """The end of it."""
        self._closed = True
        self.answers.set()
        self._thread.join()
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
            except TimeoutError:
                continue
            near.settimeout(None)
            try:
                if self._cut:
                    raise ConnectionRefusedError
                far = socket.create_connection(self._target)
            except OSError:
                near.close()
                continue
            self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, sink, source is far), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, far: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if far:
                    self.answers.wait()
                sink.sendall(data)
        for end_ in (source, sink):
            with suppress(OSError):
                end_.shutdown(socket.SHUT_RDWR)
        source.close()


@contextmanager
def line(url: str) -> Iterator[Line]:
    made = Line(url)
    try:
        yield made
    finally:
        made.close()
