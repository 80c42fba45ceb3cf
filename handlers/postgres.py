"""Tables between Postgres and data sets, through COPY in both directions.

Rows go through a CSV file in a scratch folder, so memory stays flat however large the table is. Every value is quoted
there and NULL is a bare \\N: no text can be taken for it, nor for the end of the data.
"""
# ruff: noqa: S608 - SQL is put together here: names are quoted, values bound, the connection locked

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import psycopg
from psycopg import sql as pg
from psycopg.conninfo import make_conninfo
from pydantic import BaseModel, ConfigDict

from handlers import tables
from pipeline import Context, Dataset, Fail, Refused, Retry, handler

#: bytes between two looks at whether the attempt is still this worker's
CHUNK = 1 << 20

#: DuckDB's types by those of Postgres; all others come as text
FROM_POSTGRES = {
    "bool": "BOOLEAN",
    "int2": "SMALLINT",
    "int4": "INTEGER",
    "int8": "BIGINT",
    "oid": "BIGINT",
    "float4": "FLOAT",
    "float8": "DOUBLE",
    "date": "DATE",
    "time": "TIME",
    "timestamp": "TIMESTAMP",
    "timestamptz": "TIMESTAMPTZ",
    "interval": "INTERVAL",
    "uuid": "UUID",
    "json": "JSON",
    "jsonb": "JSON",
}

#: types of Postgres by those of DuckDB; nested ones go as jsonb, all others as text
TO_POSTGRES = {
    "BOOLEAN": "boolean",
    "TINYINT": "smallint",
    "SMALLINT": "smallint",
    "INTEGER": "integer",
    "BIGINT": "bigint",
    "HUGEINT": "numeric",
    "UTINYINT": "smallint",
    "USMALLINT": "integer",
    "UINTEGER": "bigint",
    "UBIGINT": "numeric",
    "UHUGEINT": "numeric",
    "FLOAT": "real",
    "DOUBLE": "double precision",
    "DATE": "date",
    "TIME": "time",
    "TIMESTAMP": "timestamp",
    "TIMESTAMP_S": "timestamp",
    "TIMESTAMP_MS": "timestamp",
    "TIMESTAMP_NS": "timestamp",
    "TIMESTAMP WITH TIME ZONE": "timestamptz",
    "INTERVAL": "interval",
    "UUID": "uuid",
    "JSON": "jsonb",
    "BLOB": "bytea",
}


class Loaded(BaseModel):
    """What a load put into a table."""

    model_config = ConfigDict(frozen=True)

    rows: int
    #: with its schema
    table: str


@handler("sql.query", retry_on=tables.PASSING)
def query(
    connection: str, sql: str, params: Mapping[str, Any] | Sequence[Any] | None = None, *, context: Context
) -> Dataset:
    """Run one SELECT in Postgres, in a read-only transaction, and keep its rows as a data set.

    Values come in from `params` as `%(name)s`, or `%s` for a list; a percent sign is then written `%%`. A `numeric`
    without a scale comes as DOUBLE; cast it in the query where that is too coarse.
    """
    body = sql.strip().removesuffix(";")
    with tempfile.TemporaryDirectory(prefix="sql-query-") as folder:
        file = Path(folder) / "rows.csv"
        with _session(connection, context) as session:
            session.read_only = True
            cursor = session.cursor()
            # The extended protocol (binary) takes one statement only, so nothing can follow the query's last bracket.
            cursor.execute(f"SELECT * FROM ({body}\n) AS q LIMIT 0".encode(), params or None, binary=True)
            described = cursor.description or []
            types = {column.name: _type_name(session, column) for column in described}
            statement = f"COPY ({body}\n) TO STDOUT (FORMAT csv, NULL '\\N', FORCE_QUOTE *)".encode()
            with file.open("wb") as stream, cursor.copy(statement, params or None) as copy:
                for block in _watched(copy, context):
                    stream.write(block)
        if len(types) != len(described):
            raise Fail("sql gives two columns the same name; name them apart with AS")
        return tables.save(context, _read_csv(file, described, types), {}, {}, [file])


@handler("sql.load", retry_on=tables.PASSING)
def load(
    data: Dataset,
    connection: str,
    table: str,
    key: Sequence[str] = (),
    mode: Literal["append", "replace", "upsert"] | None = None,
    create: bool = True,
    *,
    context: Context,
) -> Loaded:
    """Load a data set into a table of Postgres, in one transaction.

    With `upsert` (the default where a key is given) and `replace`, a second run changes nothing. `append` (the default
    without a key) adds the rows again where an attempt is repeated after its commit.

    Args:
        connection: name of PIPELINE_CONNECTION_<NAME>, or "default" for the pipeline's own database.
        table: in the schema `public` where it names none.
        key: columns by which `upsert` knows a row; the primary key where the table is created.
        create: whether a table that is missing is created, with the columns of the data set.
    """
    mode = mode or ("upsert" if key else "append")
    if mode == "upsert" and not key:
        raise Fail("mode upsert needs a key: the columns by which a row is known")
    if missing := sorted(set(key) - set(data.columns)):
        raise Fail(f"key: the data set has no column {', '.join(missing)}; it has {', '.join(data.columns)}")
    target = _target(table)
    with tempfile.TemporaryDirectory(prefix="sql-load-") as folder:
        file = Path(folder) / "rows.csv"
        types = _write_csv(data, file, context)
        with _session(connection, context) as session:
            rows = _load(session, file, types, target, list(key), mode, create, context)
    return Loaded(rows=rows, table=".".join(target))


def _load(
    session: psycopg.Connection[Any],
    file: Path,
    types: Mapping[str, str],
    target: tuple[str, str],
    key: list[str],
    mode: str,
    create: bool,
    context: Context,
) -> int:
    place = pg.Identifier(*target)
    columns = pg.SQL(", ").join(map(pg.Identifier, types))
    cursor = session.cursor()
    # Two loads of one table would meet on its creation, or lock its rows in different orders.
    cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", ["pipeline sql.load " + ".".join(target)])
    if create:
        lines = [pg.SQL("{} {}").format(pg.Identifier(name), pg.SQL(kind)) for name, kind in types.items()]
        if key:
            lines.append(pg.SQL("PRIMARY KEY ({})").format(pg.SQL(", ").join(map(pg.Identifier, key))))
        cursor.execute(pg.SQL("CREATE TABLE IF NOT EXISTS {} ({})").format(place, pg.SQL(", ").join(lines)))
    stage = pg.SQL("CREATE TEMP TABLE incoming ON COMMIT DROP AS SELECT {} FROM {} WITH NO DATA")
    cursor.execute(stage.format(columns, place))
    with file.open("rb") as stream, cursor.copy("COPY pg_temp.incoming FROM STDIN (FORMAT csv, NULL '\\N')") as copy:
        for block in _watched(iter(lambda: stream.read(CHUNK), b""), context):
            copy.write(block)
    if mode == "replace":
        cursor.execute(pg.SQL("DELETE FROM {}").format(place))
    insert = pg.SQL("INSERT INTO {} ({}) SELECT {} FROM pg_temp.incoming").format(place, columns, columns)
    if mode == "upsert":
        changed = [
            pg.SQL("{} = EXCLUDED.{}").format(pg.Identifier(name), pg.Identifier(name))
            for name in types
            if name not in key
        ]
        action = pg.SQL("UPDATE SET {}").format(pg.SQL(", ").join(changed)) if changed else pg.SQL("NOTHING")
        by = pg.SQL(", ").join(map(pg.Identifier, key))
        insert = pg.SQL("{} ON CONFLICT ({}) DO {}").format(insert, by, action)
    counted = cursor.execute("SELECT count(*) FROM pg_temp.incoming").fetchone()
    cursor.execute(insert)
    context.heartbeat()  # an attempt that lost its task must not commit
    return int(counted[0]) if counted else 0


def _target(table: str) -> tuple[str, str]:
    """Schema and name; the schema is always said, so that the search path of a role cannot choose another."""
    parts = tuple(part.strip('"') for part in table.split("."))
    schema, name = parts if len(parts) == 2 else ("public", parts[0])
    if len(parts) > 2 or not schema or not name:
        raise Fail(f"table {table!r} must be written NAME or SCHEMA.NAME")
    if schema.startswith("pg_") or schema in ("pipeline", "information_schema"):
        raise Refused(f"table {table!r}: the schema {schema!r} is not for loads; name one of your own")
    return schema, name


@contextmanager
def _session(name: str, context: Context) -> Iterator[psycopg.Connection[Any]]:
    """A connection of its own with one transaction: committed when the block ends well.

    Raises:
        Refused: the site names no such connection.
        Retry: the server cannot be reached, went away, or ended the transaction for the sake of another.
        Fail: Postgres refuses the statement.
    """
    urls = {known.casefold(): url for known, url in context.settings.get("connections", {}).items()}
    if name.casefold() not in urls:
        known = ", ".join(sorted(urls)) or "none"
        raise Refused(f"connection {name!r} is not configured (there is: {known}); PIPELINE_CONNECTION_<NAME> adds one")
    try:
        url = make_conninfo(urls[name.casefold()], application_name=f"pipeline {context.task_id}", connect_timeout=10)
    except psycopg.Error:
        # libpq's message repeats the text, and with it a password
        raise Fail(f"connection {name!r} is not a Postgres URL; mend PIPELINE_CONNECTION_{name.upper()}") from None
    try:
        with psycopg.connect(url) as session:
            session.execute("SET timezone = 'UTC'; SET datestyle = 'ISO'; SET intervalstyle = 'postgres'")
            session.commit()
            yield session
    except psycopg.OperationalError as exc:
        raise Retry(f"connection {name!r}: {exc}") from exc
    except psycopg.Error as exc:
        raise Fail(f"connection {name!r}: {exc}") from exc


def _watched(blocks: Iterator[Any] | psycopg.Copy, context: Context) -> Iterator[Any]:
    """The blocks, with a heartbeat each CHUNK bytes."""
    seen = 0
    for block in blocks:
        yield block
        seen += len(block)
        if seen >= CHUNK:
            seen = 0
            context.heartbeat()


def _type_name(session: psycopg.Connection[Any], column: psycopg.Column) -> str:
    info = session.adapters.types.get(column.type_code)
    # an array's code is found under its element's type
    return info.name if info and info.oid == column.type_code else "text"


def _duckdb_type(column: psycopg.Column, name: str) -> str:
    if name == "numeric":
        precision, scale = column.precision, column.scale or 0
        return f"DECIMAL({precision}, {scale})" if precision and 0 <= scale <= precision <= 38 else "DOUBLE"
    return FROM_POSTGRES.get(name, "VARCHAR")


def _read_csv(file: Path, described: Sequence[psycopg.Column], names: Mapping[str, str]) -> str:
    types = {column.name: _duckdb_type(column, names[column.name]) for column in described}
    blobs = [tables.quoted(name) for name, kind in names.items() if kind == "bytea"]
    replaced = f" REPLACE ({', '.join(f'unhex(substr({name}, 3)) AS {name}' for name in blobs)})" if blobs else ""
    return (
        f"SELECT *{replaced} FROM read_csv({tables.literal(file)}, columns = {tables.literal(types)}, header = false,"
        " auto_detect = false, delim = ',', quote = '\"', escape = '\"', nullstr = '\\N', allow_quoted_nulls = false,"
        f" max_line_size = {16 << 20})"
    )


def _write_csv(data: Dataset, file: Path, context: Context) -> dict[str, str]:
    """Writes the rows as COPY takes them; returns the type of Postgres of each column."""
    with tables.connected(context, {"data": data}, [file]) as connection:
        described = connection.execute("DESCRIBE data").fetchall()
        kinds = {str(row[0]): str(row[1]) for row in described}
        values = ", ".join(_csv_value(name, kind) for name, kind in kinds.items())
        how = "FORMAT csv, HEADER false, NULLSTR '\\N', FORCE_QUOTE *"
        connection.execute(f"COPY (SELECT {values} FROM data) TO {tables.literal(file)} ({how})")
    return {name: _postgres_type(kind) for name, kind in kinds.items()}


def _nested(kind: str) -> bool:
    return kind.endswith("]") or kind.startswith(("STRUCT", "MAP", "UNION"))


def _postgres_type(kind: str) -> str:
    if kind.startswith("DECIMAL"):
        return kind.replace("DECIMAL", "numeric")
    return "jsonb" if _nested(kind) else TO_POSTGRES.get(kind, "text")


def _csv_value(name: str, kind: str) -> str:
    column = tables.quoted(name)
    if _nested(kind):
        return f"to_json({column})"
    return f"'\\x' || hex({column})" if kind == "BLOB" else column
