"""A TCP proxy whose line can be cut: what lies between the workers and a server, run by a thread of its own."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, Self

#: pass; refuse: new connections are reset; blackhole: nothing moves, and what was held is lost at the end, so that the
#: connections are reset then; stall: answers are held and come late
Mode = Literal["pass", "refuse", "blackhole", "stall"]

#: SO_LINGER for no seconds: closing sends RST
_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """Forwards a port of this machine to a server; a context manager."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self.port = 0
        self._mode: Mode = "pass"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy-{port}", daemon=True)
        self._writers: set[asyncio.StreamWriter] = set()
        self._lines: set[asyncio.Task[None]] = set()
        #: set while bytes may move: to the server, to the client
        self._inward, self._outward = asyncio.Event(), asyncio.Event()
        self._server: asyncio.Server | None = None

    @property
    def mode(self) -> Mode:
        """How it treats connections."""
        return self._mode

    @property
    def connections(self) -> int:
        """How many clients it has."""
        return len(self._lines)

    def set(self, mode: Mode) -> None:
        """Treat all connections so from now on."""
        self._call(self._set(mode))

    def cut(self) -> None:
        """Reset every connection; new ones are taken."""
        self._call(self._cut())

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._start())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _start(self) -> None:
        await self._set("pass")
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._cut()
        await self._server.wait_closed()

    async def _set(self, mode: Mode) -> None:
        before, self._mode = self._mode, mode
        if mode == "refuse" or before == "blackhole":
            await self._cut()
        (self._inward.clear if mode == "blackhole" else self._inward.set)()
        (self._outward.clear if mode in ("blackhole", "stall") else self._outward.set)()

    async def _cut(self) -> None:
        for writer in list(self._writers):
            _reset(writer)
        lines = list(self._lines)
        for line in lines:
            line.cancel()
        await asyncio.gather(*lines, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._mode == "refuse":
            _reset(writer)
            return
        line = asyncio.current_task()
        assert line is not None
        self._lines.add(line)
        self._writers.add(writer)
        ours = {writer}
        try:
            await self._inward.wait()
            there, back = await asyncio.open_connection(*self._target)
            ours.add(back)
            self._writers.add(back)
            pumps = [
                asyncio.ensure_future(_pump(reader, back, self._inward)),
                asyncio.ensure_future(_pump(there, writer, self._outward)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass  # the server is down, or the line was cut
        finally:
            self._lines.discard(line)
            self._writers -= ours
            for one in ours:
                _reset(one)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, moves: asyncio.Event) -> None:
    with suppress(OSError):
        while data := await reader.read(65_536):
            await moves.wait()
            writer.write(data)
            await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    with suppress(OSError, AttributeError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
