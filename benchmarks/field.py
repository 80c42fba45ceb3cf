"""The contenders by name: what each is, which module runs it, and what is installed for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A contender."""

    name: str
    title: str
    #: module and class
    runs: str
    #: of the peer that it is a variant of; empty for ours and stock Celery, which run in one heat
    peer: str = ""
    #: its environment, a file of pins in `environments/`; empty for the one that runs the race
    environment: str = ""
    requirements: tuple[str, ...] = ()


_CELERY = "benchmarks.contenders.stock"
FIELD = {
    entry.name: entry
    for entry in (
        Entry(name="ours", title="Chordal", runs="benchmarks.contenders.ours:Ours"),
        Entry(name="bare", title="Celery, bare drain", runs=f"{_CELERY}:Bare"),
        Entry(name="drained", title="Celery, drain of a full queue", runs=f"{_CELERY}:Drained"),
        Entry(name="redis", title="Celery canvas, Redis results", runs=f"{_CELERY}:RedisResults"),
        Entry(
            name="postgres", title="Celery canvas, Postgres results", runs=f"{_CELERY}:PostgresResults",
            environment="sqlalchemy", requirements=("celery[redis,sqlalchemy]==5.7.0", "psycopg[binary]==3.3.9"),
        ),
        Entry(
            name="dbos", title="DBOS steps, one process", runs="benchmarks.contenders.dbos:Steps",
            peer="dbos", environment="dbos", requirements=("dbos==3.4.0",),
        ),
        Entry(
            name="dbos-queues", title="DBOS queues, two processes", runs="benchmarks.contenders.dbos:Queues",
            peer="dbos", environment="dbos", requirements=("dbos==3.4.0",),
        ),
        Entry(
            name="director", title="celery-director", runs="benchmarks.contenders.director:Director",
            peer="director", environment="director", requirements=("celery-director==0.10.0",),
        ),
        Entry(
            name="dyrygent", title="celery-dyrygent", runs="benchmarks.contenders.dyrygent:Dyrygent",
            peer="dyrygent", environment="dyrygent", requirements=("celery-dyrygent==0.8.0", "celery[redis]==5.7.0"),
        ),
        Entry(
            name="prefect", title="Prefect, recorded on its server", runs="benchmarks.contenders.prefect:Prefect",
            peer="prefect", environment="prefect", requirements=("prefect==3.8.8", "fastapi==0.139.2"),
        ),
    )
}  # fmt: skip
CORE = tuple(entry.name for entry in FIELD.values() if not entry.peer)
PEERS = tuple(dict.fromkeys(entry.peer for entry in FIELD.values() if entry.peer))
