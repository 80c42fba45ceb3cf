"""Reports: one HTML file with text, tables and charts."""

from __future__ import annotations

import base64
import html
from datetime import date, datetime
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from handlers.tables import connected
from pipeline import Artifact, Context, Dataset, Fail, handler

#: longer texts in a cell are cut
_MAX_CELL = 300
#: a picture larger than this is no chart
_MAX_PICTURE = 8 * 1_048_576
_PNG = b"\x89PNG\r\n\x1a\n"


class Chart(BaseModel):
    """What `chart.plot` returns."""

    model_config = ConfigDict(frozen=True)

    png: Artifact
    #: read to those who cannot see the picture
    title: str = ""


class Section(BaseModel):
    """A part of a report, in this order: heading, text, chart, table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    heading: str
    #: paragraphs are parted by empty lines
    text: str = ""
    table: Dataset | None = None
    #: rows of the table that are shown, the first ones
    rows: Annotated[int, Field(ge=1, le=1000)] = 20
    chart: Chart | None = None


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1d21; --soft: #5c616b; --rule: #dcdfe4; --zebra: #f6f7f9; --page: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7e8ec; --soft: #a2a8b4; --rule: #3a3e47; --zebra: #22252b; --page: #181a1f }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
main { max-width: 52rem; margin: 0 auto; padding: 3rem 1.5rem 2rem }
h1 { font-size: 2.1rem; line-height: 1.2; letter-spacing: -.02em; margin: 0 0 .5rem; text-wrap: balance }
h2 { font-size: 1.35rem; line-height: 1.3; letter-spacing: -.01em; margin: 3rem 0 .75rem }
h1, h2, p, td, th { overflow-wrap: break-word }
p { margin: 0 0 1rem; max-width: 42rem }
.origin, .count { color: var(--soft); font-size: .875rem }
figure { margin: 1.25rem 0 }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 6px }
.scroll { overflow-x: auto; margin: 1.25rem 0 .5rem }
table { border-collapse: collapse; width: 100%; font-size: .9rem; line-height: 1.45; font-variant-numeric: tabular-nums }
th, td { padding: .4rem .75rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule) }
th { font-weight: 600; white-space: nowrap; border-bottom: 2px solid var(--rule) }
tbody tr:nth-child(even) { background: var(--zebra) }
.number { text-align: right }
td.number, td.time { white-space: nowrap }
.nothing { color: var(--soft) }
@media print {
  :root { --ink: #000; --soft: #555; --rule: #bbb; --zebra: #f4f4f4; --page: #fff }
  @page { margin: 18mm }
  body { font-size: 10.5pt }
  main { max-width: none; padding: 0 }
  h2 { break-after: avoid; margin-top: 2rem }
  figure, tr { break-inside: avoid }
  thead { display: table-header-group }
  .scroll { overflow: visible }
}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="origin">{origin}</p>
{sections}
</main>
</body>
</html>
"""


@handler("report.html")
def report(title: str, sections: list[Section], *, context: Context) -> Artifact:
    """Write one HTML file with text, tables and charts, which needs nothing else: no network, no scripts.

    It reads well on paper and in the dark. Everything in it is escaped.

    Params:
        title: above everything.
        sections: each `{"heading", "text", "table", "rows", "chart"}`: `text` in paragraphs parted by empty lines,
            `table` a data set of which the first `rows` (20) are shown, `chart` the result of `chart.plot`; all but
            the heading may be left out.

    Result: the artifact, `text/html`.

    Errors: ArtifactError where a data set or picture is not there; Fail where a chart's picture is no PNG.
    """
    page = _PAGE.format(
        title=html.escape(title),
        style=_STYLE,
        origin=html.escape(f"{context.workflow_id} · {context.execution_id}"),
        sections="\n".join(_section(section, context) for section in sections),
    )
    with context.artifacts.write("report.html", "text/html") as writing:
        writing.path.write_text(page, encoding="utf-8", errors="replace")
    assert writing.artifact is not None
    return writing.artifact


def _section(section: Section, context: Context) -> str:
    parts = [f"<h2>{html.escape(section.heading)}</h2>"]
    paragraphs = section.text.replace("\r\n", "\n").split("\n\n")
    parts += [f"<p>{html.escape(text.strip())}</p>" for text in paragraphs if text.strip()]
    if section.chart is not None:
        parts.append(_figure(section.chart, context))
    if section.table is not None:
        parts.append(_table(section.table, section.rows, context))
    return "\n".join(["<section>", *parts, "</section>"])


def _figure(chart: Chart, context: Context) -> str:
    with context.artifacts.read(chart.png.uri) as path, path.open("rb") as stream:
        picture = stream.read(_MAX_PICTURE + 1)
    if not picture.startswith(_PNG) or len(picture) > _MAX_PICTURE:
        raise Fail(f"{chart.png.uri} is no PNG of at most {_MAX_PICTURE} bytes")
    data = base64.b64encode(picture).decode()
    return f'<figure><img alt="{html.escape(chart.title or "Chart")}" src="data:image/png;base64,{data}"></figure>'


def _table(data: Dataset, limit: int, context: Context) -> str:
    with connected(context, {"data": data}) as connection:
        (total,) = connection.execute("SELECT count(*) FROM data").fetchall()[0]
        names = [column[0] for column in connection.execute("FROM data LIMIT 0").description or ()]
        rows = connection.execute(f"FROM data LIMIT {limit}").fetchall()
    numeric = [{_numeric(row[n]) for row in rows if row[n] is not None} == {True} for n in range(len(names))]
    head = "".join(
        f'<th scope="col"{" class=number" if number else ""}>{html.escape(name)}</th>'
        for name, number in zip(names, numeric, strict=True)
    )
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    count = f"{len(rows):,} of {total:,} rows" if len(rows) < total else f"{total:,} row{'s' * (total != 1)}"
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>\n'
        f'<p class="count">{count}</p>'
    )


def _numeric(value: Any) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if value is None:
        return '<td class="nothing">–</td>'
    if _numeric(value):
        digits = "" if not isinstance(value, float) else ".2f" if value == 0 or abs(value) >= 1 else ".3g"
        return f'<td class="number">{value:{digits}}</td>'
    if isinstance(value, datetime):
        return f'<td class="time">{value:%Y-%m-%d %H:%M:%S}</td>'
    if isinstance(value, date):
        return f'<td class="time">{value.isoformat()}</td>'
    text = str(value)
    return f"<td>{html.escape(text if len(text) <= _MAX_CELL else text[: _MAX_CELL - 1] + '…')}</td>"
