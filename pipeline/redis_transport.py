"""DISPATCH, on Redis: kombu's transport with one client for each channel instead of one for each operation.

To make a client costs more than most of what it is made for; the connections are the pool's either way.
"""

from __future__ import annotations

from typing import Any

from kombu.connection import Connection as KombuConnection
from kombu.connection import ConnectionPool, PooledConnection
from kombu.transport import redis


class Channel(redis.Channel):
    """A channel that keeps its client."""

    _kept: Any = None

    def _create_client(self, asynchronous: bool = False) -> Any:
        if asynchronous:  # these hold a connection each, for as long as they wait for messages
            return super()._create_client(asynchronous=True)  # type: ignore[no-untyped-call]
        if self._kept is None or self._kept.connection_pool is not self.pool:  # the pool is another after a disconnection
            self._kept = super()._create_client()  # type: ignore[no-untyped-call]
        return self._kept


class Transport(redis.Transport):
    """Redis as kombu has it, but for the channel."""

    Channel = Channel


class _Redis(KombuConnection):
    def get_transport_cls(self) -> Any:
        """The class of the transport."""
        return Transport if self.transport_cls in ("redis", "rediss") else super().get_transport_cls()  # type: ignore[no-untyped-call]


class _PooledConnection(_Redis, PooledConnection):
    pass


class _Pool(ConnectionPool):
    def new(self) -> _PooledConnection:
        return _PooledConnection(self, **dict(self.connection._info(resolve=False)))  # type: ignore[no-untyped-call]


class Connection(_Redis):
    """Uses it wherever a URL says `redis`, also for the connections of its pool, by which everything is published."""

    def Pool(self, limit: int | None = None, **_: Any) -> ConnectionPool:  # noqa: N802 - kombu's name
        """Connections like this one."""
        return _Pool(self, limit)  # type: ignore[no-untyped-call]
