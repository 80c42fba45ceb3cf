"""The results as text: what each contender took, and how many times longer than ours that is."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.field import FIELD
from benchmarks.race import Heat, Outcome, Ratio
from benchmarks.shapes import Shape

_LABELS = {
    "W": "{0:,} wide, joined", "D": "chain of {0:,}", "L": "{0} layers of {1}, all-to-all", "N": "ladder of {0}",
    "S": "{0:,} executions of 5 tasks, 4 clients, a call for each execution",
    "B": "{0:,} executions of 5 tasks, 4 clients, a call for each client's",
    "R": "real graphs of up to {0:,} tasks",
    "submit": "submit of {0:,} tasks", "again": "submit of {0:,} tasks, known definition",
    "start": "start of a worker with {0} processes", "idle": "idle, share of a core", "M": "{0:,} wide, joined: peak MB",
}  # fmt: skip
_BEGIN, _END = "<!-- speed -->", "<!-- /speed -->"


def figure(outcome: Outcome | None) -> str:
    """A median with its spread, a bound, or a named outcome."""
    if outcome is None:
        return ""
    median = outcome.median
    if median is None:
        return outcome.failure
    if outcome.cut is not None:
        return f"> {short(median)}"
    spread = f" ({short(min(outcome.values))}-{short(max(outcome.values))})" if len(outcome.values) > 1 else ""
    return f"{short(median)}{spread}"


def times(ratio: Ratio | None) -> str:
    """How many times, as `4.1 (3.9-4.4)`."""
    if ratio is None:
        return ""
    if ratio.bound:
        return f"> {short(ratio.median)}"
    spread = f" ({short(ratio.least)}-{short(ratio.greatest)})" if ratio.least != ratio.greatest else ""
    return f"{short(ratio.median)}{spread}"


def short(value: float) -> str:
    """Three figures."""
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def label(shape: str) -> str:
    """A shape in words."""
    found = Shape.named(shape)
    return _LABELS[found.kind].format(found.size, found.width)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shapes_of(heat: Heat) -> list[str]:
    """In the order in which they were run."""
    return list(dict.fromkeys(shape for shape, _ in heat.outcomes))


def contenders_of(heat: Heat) -> list[str]:
    """In the order in which they were entered."""
    return [name for name in FIELD if any(entered == name for _, entered in heat.outcomes)]


def heat_table(heat: Heat) -> str:
    """What each took, and its ratio to ours."""
    names = contenders_of(heat)
    others = [name for name in names if name != "ours"] if "ours" in names else []
    rows = []
    for shape in shapes_of(heat):
        cells = [figure(heat.outcomes.get((shape, name))) for name in names]
        rows.append([shape, *cells, *(times(heat.ratio(shape, name)) for name in others)])
    return markdown([heat.name, *names, *(f"{name} / ours" for name in others)], rows)


def speed_table(heats: Sequence[Heat]) -> str:
    """For the README: seconds of ours, and how many times longer each of the others takes."""
    others = [name for name in FIELD if name != "ours" and any(name in contenders_of(heat) for heat in heats)]
    rows = []
    for shape in dict.fromkeys(shape for heat in heats for shape in shapes_of(heat)):
        ours = next((o for heat in heats if (o := heat.outcomes.get((shape, "ours")))), None)
        ratios = [_comparison(heats, shape, name) for name in others]
        if ours is not None and ours.values:
            rows.append([label(shape), figure(ours), *ratios])
    return markdown(["", "Chordal", *(FIELD[name].title for name in others)], rows)


def _comparison(heats: Sequence[Heat], shape: str, name: str) -> str:
    for heat in heats:
        outcome = heat.outcomes.get((shape, name))
        if outcome is not None:
            return times(heat.ratio(shape, name)) or ("" if outcome.failure == "not measured" else outcome.failure)
    return ""


def replace_marked(text: str, inside: str) -> str:
    """The text with what stands between the markers replaced.

    Raises:
        ValueError: it has no markers.
    """
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"there is no {_BEGIN} ... {_END}")
    return f"{before}{begin}\n\n{inside.strip()}\n\n{end}{after}"
