"""SQL over data sets, run by DuckDB inside the worker."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import date, time
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from handlers import tables
from pipeline import Context, Dataset, handler

Params = Mapping[str, Any] | None


class Rows(BaseModel):
    """The first rows of a query, as JSON."""

    model_config = ConfigDict(frozen=True)

    rows: list[dict[str, Any]]
    #: of the whole query
    row_count: int
    columns: list[str]


@handler("sql.transform", retry_on=tables.PASSING)
def transform(sql: str, params: Params = None, *, context: Context, **inputs: Any) -> Dataset:
    """Run one SELECT over the data sets of the tasks that this one depends on, and keep its rows as a data set.

    Every input that is a data set is a table of its name: a dependency's id ('-' and '.' may be written '_').
    Values come in as `$name` from `params`; the text itself reaches no file, no network and no setting.
    """
    return tables.save(context, sql, tables.datasets(inputs), params or {})


@handler("sql.rows", retry_on=tables.PASSING)
def rows(
    sql: str,
    limit: Annotated[int, Field(ge=0, le=10_000)] = 1000,
    params: Params = None,
    *,
    context: Context,
    **inputs: Any,
) -> Rows:
    """Run one SELECT over data sets and return its first rows as JSON: for small results that templates look into."""
    with tables.connected(context, tables.datasets(inputs)) as connection:
        text, bound = tables.select(connection, sql, params or {})
        connection.execute(f'CREATE TEMP TABLE "sql.rows" AS ({text}\n)', bound)
        counted = connection.execute('SELECT count(*) FROM "sql.rows"').fetchone()
        found = connection.execute('FROM "sql.rows" LIMIT $n', {"n": limit})
        columns = [column[0] for column in found.description or ()]
        values = [{name: as_json(value) for name, value in zip(columns, row, strict=True)} for row in found.fetchall()]
    return Rows(rows=values, row_count=counted[0] if counted else 0, columns=columns)


def as_json(value: Any) -> Any:
    """A value of DuckDB as JSON has it: times in ISO 8601, decimals as numbers, what is not finite as null."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Decimal():
            return int(value) if value == value.to_integral_value() else float(value)
        case date() | time():
            return value.isoformat()
        case bytes():
            return value.hex()
        case Mapping():
            return {str(name): as_json(item) for name, item in value.items()}
        case list() | tuple():
            return [as_json(item) for item in value]
        case _:
            return str(value)
