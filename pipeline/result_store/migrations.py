"""The schema's versions: numbered files, up only; the newest of them is what this code needs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

import psycopg

from pipeline.errors import SchemaMismatch
from pipeline.result_store.connection import connect, translated

#: any number that nobody else uses: one upgrade at a time
_LOCK = 7_243_509_112


@dataclass(frozen=True, kw_only=True)
class Migration:
    """One step of the schema."""

    version: int
    name: str
    sql: str


def migrations() -> tuple[Migration, ...]:
    """All steps, oldest first; `0001_initial.sql` is version 1."""
    folder = resources.files("pipeline.result_store").joinpath("migrations")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".sql")), key=lambda f: f.name)
    steps = []
    for file in files:
        number, _, name = file.name.removesuffix(".sql").partition("_")
        steps.append(Migration(version=int(number), name=name, sql=file.read_text("utf-8")))
    return tuple(steps)


def version(url: str) -> int:
    """The schema version of a database; 0 where it has none.

    Raises:
        DatabaseUnavailable: the server cannot be reached.
    """
    with translated(), connect(url, "chordal migrate") as connection:
        return _version(connection)


def upgrade(url: str) -> tuple[Migration, ...]:
    """Bring a database to the newest version, each step in a transaction of its own; returns the steps taken.

    Raises:
        DatabaseUnavailable: the server cannot be reached.
        SchemaMismatch: the database is newer than this code, or workers of the present version run on it.
    """
    with translated(), connect(url, "chordal migrate") as connection:
        connection.execute("SET statement_timeout = 0")  # a step takes as long as there is data
        connection.execute("SELECT pg_advisory_lock(%s)", (_LOCK,))
        present = _version(connection)
        _refuse_newer(present)
        if 0 < present < migrations()[-1].version:
            _refuse_workers(connection, present)
        steps = tuple(step for step in migrations() if step.version > present)
        for step in steps:
            with connection.transaction():
                connection.execute(step.sql.encode())
                connection.execute(
                    "INSERT INTO pipeline.schema_versions (version, name) VALUES (%s, %s)", (step.version, step.name)
                )
        return steps


def require_current(url: str) -> None:
    """Refuse a database that is on another version than this code.

    Raises:
        SchemaMismatch: with the command that mends it.
    """
    present, wanted = version(url), migrations()[-1].version
    _refuse_newer(present)
    if present < wanted:
        raise SchemaMismatch(f"the database is on schema version {present}, this code needs {wanted}; run `pipeline db upgrade`")


def _refuse_newer(present: int) -> None:
    wanted = migrations()[-1].version
    if present > wanted:
        raise SchemaMismatch(
            f"the database is on schema version {present}, this code knows {wanted}; run a version of chordal that fits"
        )


def _refuse_workers(connection: psycopg.Connection[tuple[object, ...]], present: int) -> None:
    row = connection.execute("SELECT count(*) FROM pipeline.workers WHERE expires_at > pipeline.clock()").fetchone()
    if row and row[0]:
        raise SchemaMismatch(
            f"{row[0]} processes of workers run on schema version {present}: end them (what they run goes back), wait for"
            " their leases to run out, and upgrade then"
        )


def _version(connection: psycopg.Connection[tuple[object, ...]]) -> int:
    row = connection.execute("SELECT to_regclass('pipeline.schema_versions') IS NOT NULL").fetchone()
    if not row or not row[0]:
        return 0
    found = connection.execute("SELECT coalesce(max(version), 0) FROM pipeline.schema_versions").fetchone()
    return int(str(found[0])) if found else 0
