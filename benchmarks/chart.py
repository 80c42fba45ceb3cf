"""One chart: how many times longer than ours everybody else takes, by shape, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import vl_convert

from benchmarks.field import FIELD
from benchmarks.race import Heat
from benchmarks.shapes import Shape
from benchmarks.table import label


def points(heats: Sequence[Heat]) -> list[dict[str, Any]]:
    """A point for each shape and contender that can be compared."""
    found = []
    for heat in heats:
        for shape, name in heat.outcomes:
            ratio = heat.ratio(shape, name)
            if name != "ours" and ratio is not None and Shape.named(shape).measure == "seconds":
                found.append({
                    "shape": label(shape), "who": FIELD[name].title, "ratio": ratio.median, "least": ratio.least,
                    "greatest": ratio.greatest, "known": "at least" if ratio.bound else "median",
                })  # fmt: skip
    return found


def draw(heats: Sequence[Heat], caption: str) -> str:
    """The chart."""
    values = points(heats)
    who = [entry.title for entry in FIELD.values() if any(value["who"] == entry.title for value in values)]
    shapes = list(dict.fromkeys(value["shape"] for value in values))
    y = {"field": "shape", "type": "nominal", "sort": shapes, "title": None, "axis": {
        "grid": True, "tickBand": "extent", "ticks": False, "labelLimit": 240}}  # fmt: skip
    offset = {"field": "who", "type": "nominal", "sort": who}
    colour = {**offset, "title": None, "scale": {"scheme": "tableau10"}}
    x = {"type": "quantitative", "scale": {"type": "log", "nice": False, "padding": 12}, "axis": {"format": "~g"},
         "title": "times as long as Chordal (logarithmic); right of 1: Chordal is faster"}  # fmt: skip
    known = {"field": "known", "type": "nominal", "title": None,
             "scale": {"domain": ["median", "at least"], "range": ["circle", "triangle-right"]}}  # fmt: skip
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "background": "white",
        "title": {"text": "Graphs of no-ops against Chordal, side by side", "subtitle": caption, "anchor": "start"},
        "data": {"values": values},
        "width": 560,
        "height": {"step": max(24, 9 * len(who)), "for": "position"},
        "layer": [
            {"mark": {"type": "rule", "color": "#0f172a", "strokeWidth": 1.5}, "encoding": {"x": {"datum": 1, **x}}},
            {"mark": "rule", "encoding": {
                "x": {"field": "least", **x}, "x2": {"field": "greatest"}, "y": y, "yOffset": offset, "color": colour}},
            {"mark": {"type": "point", "filled": True, "size": 46, "opacity": 1}, "encoding": {
                "x": {"field": "ratio", **x}, "y": y, "yOffset": offset, "color": colour, "shape": known}},
        ],
        "config": {"font": "sans-serif", "legend": {"labelLimit": 260}},
    }  # fmt: skip
    return str(vl_convert.vegalite_to_svg(spec))
