"""Charts of data sets: a PNG for reports, and an HTML page that can be pointed at."""

from __future__ import annotations

import html
import json
import subprocess
import sys
from datetime import datetime, timedelta
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal

import vl_convert
from pydantic import Field

from handlers.tables import connected, quoted
from pipeline import Context, Dataset, Fail, ParamsError, handler

#: more points than this cannot be told apart, and would make the page slow
_MAX_ROWS = 5_000
#: Okabe and Ito's colours, which colour-blind readers can tell apart; the pale yellow and black are left out
_PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
#: a reader cannot match more colours than this with a legend
_MAX_COLORS = 20
_INK, _FAINT = "#333333", "#767676"

_CONFIG: dict[str, Any] = {
    "background": "white",
    "font": "Helvetica Neue, Helvetica, Arial, Liberation Sans, sans-serif",
    "padding": 16,
    "view": {"stroke": None},
    "title": {"fontSize": 18, "fontWeight": 600, "anchor": "start", "frame": "group", "offset": 14, "color": "#1a1a1a"},
    "axis": {
        "labelFontSize": 12,
        "titleFontSize": 13,
        "titleFontWeight": 500,
        "titlePadding": 10,
        "labelColor": _INK,
        "titleColor": _INK,
        "labelLimit": 160,
        "labelOverlap": True,
        "gridColor": "#e8e8e8",
        "domainColor": _FAINT,
        "tickColor": _FAINT,
    },
    "axisX": {"grid": False},
    "axisQuantitative": {"tickCount": 6},
    "legend": {
        "labelFontSize": 12,
        "titleFontSize": 13,
        "titleFontWeight": 500,
        "labelColor": _INK,
        "titleColor": _INK,
    },
    "range": {"category": list(_PALETTE)},
    "mark": {"color": _PALETTE[0]},
    "line": {"strokeWidth": 2.5},
    "area": {"opacity": 0.85},
    "point": {"filled": True, "size": 60, "opacity": 0.8},
    "bar": {"cornerRadiusEnd": 2},
}

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data: blob:; style-src 'unsafe-inline';
 script-src 'unsafe-inline' 'unsafe-eval'">
<title>{title}</title>
<style>body {{ margin: 0; padding: 1rem; background: white }} #chart {{ display: flex; justify-content: safe center }}</style>
</head>
<body>
<div id="chart"></div>
<script>{library}</script>
<script>
vegaEmbed("#chart", {spec}, {{actions: {{export: true, source: false, compiled: false, editor: false}}}});
</script>
</body>
</html>
"""


@handler("chart.plot")
def plot(
    data: Dataset,
    mark: Literal["bar", "line", "point", "area", "heatmap"],
    x: str,
    y: str,
    color: str | None = None,
    title: str = "",
    sort: Literal["ascending", "descending", "x", "-x", "y", "-y", "data"] | None = None,
    x_title: str | None = None,
    y_title: str | None = None,
    color_title: str | None = None,
    tooltip: list[str] | None = None,
    width: Annotated[int, Field(ge=100, le=3000)] = 680,
    height: Annotated[int, Field(ge=100, le=3000)] = 380,
    *,
    context: Context,
) -> dict[str, Any]:
    """Draw a data set of at most 5,000 rows as a chart: a PNG and an HTML page that needs no network.

    Params:
        data: the data set, one row a mark.
        mark: bar, line, point, area, or heatmap (which needs `color`).
        x, y, color: columns; numbers, dates and names each get the scale that suits them.
        title: above the chart.
        sort: order of the names along the axis: ascending (the default), descending, by a channel (`-y`: largest
            first), or as in the data.
        x_title, y_title, color_title: instead of the columns' names; "" for none.
        tooltip: columns shown at the pointer in the page; x, y and color by default.
        width, height: pixels of the plot; the PNG has twice as many.

    Result: `{"png": artifact, "html": artifact, "title": title}`.

    Errors: ParamsError where a column is not there; Fail where the data set has more than 5,000 rows, or `color` more
    than 20 names.
    """
    if mark == "heatmap" and color is None:
        raise ParamsError("a heatmap shows a third column: name it in color")
    channels = {"x": x, "y": y} | ({"color": color} if color is not None else {})
    hints = channels if tooltip is None else {f"tooltip{n}": name for n, name in enumerate(tooltip)}
    rows, kinds = _read(context, data, channels | hints)
    titles = {"x": x_title, "y": y_title, "color": color_title}
    encoding: dict[str, Any] = {
        channel: _scale(channel, mark, kinds, rows)
        | {"field": channel, "title": (name.replace("_", " ") if titles[channel] is None else titles[channel]) or None}
        for channel, name in channels.items()
    }
    names = "y" if kinds["y"] == "nominal" and kinds["x"] != "nominal" else "x"
    if sort is not None and encoding[names]["type"] in ("nominal", "ordinal"):
        encoding[names]["sort"] = None if sort == "data" else sort
    encoding["tooltip"] = [
        {"field": key, "title": name, "type": kinds[key]}
        | ({"format": ",.4~f"} if kinds[key] == "quantitative" else {})
        for key, name in hints.items()
    ]
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "data": {"values": rows},
        "mark": {
            "type": "rect" if mark == "heatmap" else mark,
            **({"point": len(rows) <= 60} if mark == "line" else {}),
        },
        "encoding": encoding,
        "width": width,
        "height": height,
        "config": _CONFIG,
    } | ({"title": title} if title else {})
    page = _PAGE.format(
        title=html.escape(title or f"{y} by {x}"),
        library=_library(),
        # a value may hold "</script>"
        spec=json.dumps(spec, allow_nan=False).replace("<", "\\u003c"),
    )
    image = _drawn(spec)
    with context.artifacts.write("chart.png", "image/png") as png:
        png.path.write_bytes(image)
    with context.artifacts.write("chart.html", "text/html") as document:
        document.path.write_text(page, encoding="utf-8")
    return {"png": png.artifact, "html": document.artifact, "title": title}


def _drawn(spec: dict[str, Any]) -> bytes:
    """A PNG, made by a process of its own: the library stops all threads, also the one that keeps the task's lease."""
    program = (
        "import json, sys, vl_convert\n"
        "image = vl_convert.vegalite_to_png(json.load(sys.stdin.buffer), scale=2, allowed_base_urls=[])\n"
        "sys.stdout.buffer.write(image)"
    )
    given = json.dumps(spec, allow_nan=False).encode()
    done = subprocess.run([sys.executable, "-P", "-c", program], input=given, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the chart cannot be drawn: {done.stderr.decode(errors='replace')[-2000:]}")
    return done.stdout


@cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script; making it takes a second."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def _read(context: Context, data: Dataset, columns: dict[str, str]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows with `columns`' keys for names, and the kind of each: quantitative, temporal or nominal.

    Columns are renamed because Vega-Lite reads dots and brackets in a field's name as a path.
    """
    with connected(context, {"data": data}) as connection:
        types = {c[0]: str(c[1]) for c in connection.execute("FROM data LIMIT 0").description or ()}
        if absent := sorted(set(columns.values()) - types.keys()):
            raise ParamsError(
                f"no column {', '.join(map(repr, absent))}; the data set has {', '.join(map(repr, types))}"
            )
        kinds = {key: _kind(types[name]) for key, name in columns.items()}
        terms = {
            # without a zone, so that every reader sees the time that the data says; JSON knows no infinity
            "temporal": "strftime(CAST({} AS TIMESTAMP), '%Y-%m-%dT%H:%M:%S.%g')",
            "quantitative": "CASE WHEN isfinite(CAST({0} AS DOUBLE)) THEN CAST({0} AS DOUBLE) END",
            "nominal": "CAST({} AS VARCHAR)",
        }
        chosen = ", ".join(f"{terms[kinds[key]].format(quoted(name))} AS {key}" for key, name in columns.items())
        found = connection.query(f"FROM data SELECT {chosen} LIMIT {_MAX_ROWS + 1}").fetchall()
    if len(found) > _MAX_ROWS:
        raise Fail(f"a chart shows at most {_MAX_ROWS} rows and the data set has {data.rows}: aggregate first")
    return [dict(zip(columns, row, strict=True)) for row in found], kinds


def _kind(type_name: str) -> str:
    if type_name == "DATE" or type_name.startswith("TIMESTAMP"):
        return "temporal"
    numeric = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "FLOAT", "DOUBLE", "DECIMAL")
    return "quantitative" if type_name.removeprefix("U").startswith(numeric) and "[" not in type_name else "nominal"


def _scale(channel: str, mark: str, kinds: dict[str, str], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Type of a channel and what its scale needs besides."""
    kind = kinds[channel]
    values = [row[channel] for row in rows if row[channel] is not None]
    if channel == "color":
        if kind == "nominal":
            count = len(set(values))
            if count > _MAX_COLORS:
                raise Fail(f"color has {count} names and at most {_MAX_COLORS} can be told apart: aggregate first")
            return {"type": kind, **({"scale": {"scheme": "tableau20"}} if count > len(_PALETTE) else {})}
        if kind == "quantitative" and values and min(values) < 0 < max(values):
            return {"type": kind, "scale": {"scheme": "blueorange", "domainMid": 0}}
        return {"type": kind, "scale": {"scheme": "viridis"}}
    if kind == "temporal" and mark in ("bar", "heatmap"):
        return {"type": kind, "timeUnit": _time_unit(values)}
    if kind == "quantitative" and (mark == "heatmap" or (mark == "bar" and channel == "x" and kinds["y"] == kind)):
        return {"type": "ordinal", "axis": {"labelAngle": 0}}
    if kind == "nominal" and channel == "x":
        return {"type": kind, "axis": {"labelAngle": -40 if sum(len(name) + 2 for name in set(values)) > 90 else 0}}
    return {"type": kind}


def _time_unit(values: list[str]) -> str:
    """The unit that makes one bar or cell of each distinct time."""
    times = sorted({datetime.fromisoformat(value) for value in values})
    gap = min((later - earlier for earlier, later in pairwise(times)), default=timedelta(days=1))
    units = {timedelta(days=365): "year", timedelta(days=28): "yearmonth", timedelta(days=1): "yearmonthdate"}
    units |= {timedelta(hours=1): "yearmonthdatehours", timedelta(minutes=1): "yearmonthdatehoursminutes"}
    return next((unit for least, unit in units.items() if gap >= least), "yearmonthdatehoursminutesseconds")
