"""A compiled workflow as one self-contained SVG: tasks in columns by their longest path, chords as dots between them.

The layout is Sugiyama's: long edges bend in every column they pass, columns are ordered by the barycentre of their
neighbours, and heights come as close to the neighbours' as the order allows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from html import escape
from itertools import pairwise

from pipeline.compiler import CompiledWorkflow
from pipeline.definition import WorkflowDefinition

#: a picture has no more boxes, and no more bends of long edges
BOX_LIMIT, BEND_LIMIT = 400, 20_000

#: ("task", id), ("chord", number of its header) or ("bend", a number)
_Node = tuple[str, str | int]
_Edge = tuple[_Node, ...]

_WIDTH, _HEIGHT, _MARGIN, _TITLE = 188, 44, 32, 92
#: height that a node takes in its column, and half of what it fills
_SPACE = {"task": 60.0, "chord": 34.0, "bend": 16.0}
_HALF = {"task": _HEIGHT / 2, "chord": 9.0, "bend": 0.0}
_SWEEPS = 12
_PALETTE = ("#2563eb", "#0d9488", "#d97706", "#7c3aed", "#db2777", "#4d7c0f", "#0284c7", "#b91c1c", "#64748b")
_STYLE = " ".join(
    f".wf {rule}"
    for rule in (
        "text{font-family:system-ui,'Segoe UI','DejaVu Sans',Helvetica,Arial,sans-serif;fill:#0f172a}",
        ".title{font-size:20px;font-weight:600}",
        ".small{font-size:12px;fill:#64748b}",
        ".name{font-size:13px;font-weight:600}",
        ".handler{font-size:11px;fill:#64748b}",
        ".box{fill:#fff;stroke:#cbd5e1}",
        "path{fill:none;stroke-width:1.5}",
        ".single{stroke:#94a3b8}",
        ".chord{stroke:#6366f1}",
        ".header{stroke:#a5b4fc}",
        ".end{stroke:#cbd5e1;stroke-dasharray:4 4}",
        ".dot{fill:#6366f1;stroke:#f8fafc;stroke-width:2}",
        ".ring{fill:#f8fafc;stroke:#64748b;stroke-width:2}",
        ".core{fill:#64748b}",
    )
)


def summary(compiled: CompiledWorkflow) -> str:
    """How large the workflow is, in words."""
    edges = sum(map(len, compiled.dependencies.values()))
    counts = (
        (len(compiled.order), "task", "tasks"),
        (edges, "dependency", "dependencies"),
        (len(compiled.headers) - 1, "chord", "chords"),
    )
    return ", ".join(f"{count:,} {one if count == 1 else many}" for count, one, many in counts)


def plain(text: str) -> str:
    """The text on one line, without what would steer a terminal or cannot stand in XML."""
    return "".join(c if c.isprintable() else " " for c in text)


def svg(compiled: CompiledWorkflow, definition: WorkflowDefinition) -> str:
    """The picture; beyond 400 boxes like tasks share one, then the last tasks are left out, and the picture says so."""
    boxes = _boxes(compiled)
    columns, edges = _columns(compiled, boxes)
    before, after = _neighbours(edges)
    _uncross(columns, before, after)
    y = _heights(columns, before, after)
    x, right = _widths(columns, edges, y)
    top = min(y[node] - _HALF[node[0]] for node in y) - _TITLE
    height = max(y[node] + _HALF[node[0]] for node in y) - top + 64
    y = {node: value - top for node, value in y.items()}
    width = max(right + _MARGIN, 600)

    families = dict.fromkeys(handler.split(".")[0] for handler in compiled.handlers.values())
    colours = {family: _PALETTE[number % len(_PALETTE)] for number, family in enumerate(families)}
    names = {task.id: task.name for task in definition.tasks}
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    title = f"{definition.id} version {definition.version} · {summary(compiled)}{_left_out(compiled, boxes)}"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="wf" role="img" aria-label="{_text(definition.name)}" {size}>',
        f"<style>{_STYLE}</style>",
        f"<defs>{_arrow('single', '#94a3b8')}{_arrow('chord', '#6366f1')}</defs>",
        '<rect width="100%" height="100%" fill="#f8fafc"/>',
        f'<text class="title" x="{_MARGIN}" y="42">{_text(_cut(definition.name, (width - 2 * _MARGIN) / 20))}</text>',
        f'<text class="small" x="{_MARGIN}" y="62">{_text(title)}</text>',
        *(_curve(edge, x, y) for edge in edges),
    ]
    for node in x:
        kind, name = node
        place = f'transform="translate({x[node]:.1f} {y[node]:.1f})"'
        if name == 0:
            out.append(f'<g {place}><title>end</title><circle class="ring" r="8"/><circle class="core" r="4"/></g>')
        elif kind == "chord":
            out.append(f'<g {place}><title>chord {name}</title><circle class="dot" r="7"/></g>')
        elif isinstance(name, str):
            handler, count = compiled.handlers[name], boxes[name]
            tip = f"{name}: {handler}" + (f" (and {count - 1:,} like it)" if count > 1 else "")
            out.append(f'<g {place} data-task="{name}"><title>{_text(tip)}</title>')
            out.append(_box(names[name], handler, count, colours[handler.split(".")[0]]))
    out += [_legend(height - 24), "</svg>"]
    return "\n".join(out)


def _boxes(compiled: CompiledWorkflow) -> dict[str, int]:
    """The tasks that have a box, each with the number of tasks that the box stands for."""
    if len(compiled.order) <= BOX_LIMIT:
        return dict.fromkeys(compiled.order, 1)
    like: dict[object, list[str]] = defaultdict(list)  # tasks that differ in nothing but their ids
    for t in compiled.order:
        place = compiled.dependencies[t], compiled.memberships.get(t), compiled.releases.get(t)
        like[compiled.handlers[t], place].append(t)
    return {tasks[0]: len(tasks) for tasks in list(like.values())[:BOX_LIMIT]}


def _left_out(compiled: CompiledWorkflow, boxes: dict[str, int]) -> str:
    missing = len(compiled.order) - sum(boxes.values())
    shared = " · like tasks share a box" if max(boxes.values()) > 1 else ""
    return shared + (f" · {missing:,} tasks are not drawn" if missing else "")


def _columns(compiled: CompiledWorkflow, boxes: dict[str, int]) -> tuple[list[list[_Node]], list[_Edge]]:
    """Columns of nodes, tasks in the even ones and chords in the odd ones, and edges with their bends."""
    column: dict[_Node, int] = {}
    for t in compiled.order:
        column["task", t] = 2 + max((column["task", d] for d in compiled.dependencies[t]), default=-2)
    nodes: list[_Node] = [("task", t) for t in boxes]
    end = max(column[node] for node in nodes) + 1
    straight: list[tuple[_Node, _Node]] = []
    for t, following in compiled.releases.items():
        straight += [(("task", t), ("task", f)) for f in following if f in boxes and t in boxes]
    for header in compiled.headers:
        chord: _Node = ("chord", header.number)
        waited, bodies = ([t for t in tasks if t in boxes] for tasks in (header.tasks, header.bodies))
        if waited and (bodies or header.number == 0):
            column[chord] = column["task", bodies[0]] - 1 if bodies else end
            nodes.append(chord)
            straight += [(("task", t), chord) for t in waited] + [(chord, ("task", t)) for t in bodies]

    columns: list[list[_Node]] = [[] for _ in range(end + 1)]
    for node in nodes:
        columns[column[node]].append(node)
    bends = sum(column[target] - column[source] - 1 for source, target in straight)
    if bends > BEND_LIMIT:
        return columns, list(straight)
    edges: list[_Edge] = []
    for number, (source, target) in enumerate(straight):
        passed: list[_Node] = []
        for place in range(column[source] + 1, column[target]):
            passed.append(("bend", number * len(columns) + place))
            columns[place].append(passed[-1])
        edges.append((source, *passed, target))
    return columns, edges


_Neighbours = dict[_Node, list[_Node]]


def _neighbours(edges: Iterable[_Edge]) -> tuple[_Neighbours, _Neighbours]:
    before: _Neighbours = defaultdict(list)
    after: _Neighbours = defaultdict(list)
    for edge in edges:
        for source, target in pairwise(edge):
            after[source].append(target)
            before[target].append(source)
    return before, after


def _uncross(columns: list[list[_Node]], before: _Neighbours, after: _Neighbours) -> None:
    place = {node: n / len(column) for column in columns for n, node in enumerate(column)}
    for sweep in range(_SWEEPS):
        near = after if sweep % 2 else before
        for column in reversed(columns) if sweep % 2 else columns:
            pull = {n: sum(map(place.__getitem__, near[n])) / len(near[n]) if n in near else place[n] for n in column}
            column.sort(key=pull.__getitem__)
            place.update((node, (n + 0.5) / len(column)) for n, node in enumerate(column))


def _heights(columns: list[list[_Node]], before: _Neighbours, after: _Neighbours) -> dict[_Node, float]:
    y: dict[_Node, float] = {}
    for column in columns:
        total = sum(_SPACE[node[0]] for node in column)
        y.update(zip(column, _settle(column, [-total / 2 for _ in column]), strict=True))
    for sweep in range(_SWEEPS):
        for column in reversed(columns) if sweep % 2 else columns:
            wanted = []
            for node in column:
                # The last sweeps listen to both sides, so that a task stands in the middle of what it joins.
                near = [*before.get(node, ()), *after.get(node, ())]
                if sweep < _SWEEPS - 4:
                    near = (after if sweep % 2 else before).get(node) or near
                wanted.append(sum(map(y.__getitem__, near)) / len(near))
            y.update(zip(column, _settle(column, wanted), strict=True))
    return y


def _settle(column: list[_Node], wanted: list[float]) -> list[float]:
    """Heights nearest to the wanted ones (least squares) that keep order and spacing: isotonic regression."""
    offsets: list[float] = []
    down = 0.0
    for node in column:
        offsets.append(down + _SPACE[node[0]] / 2)
        down += _SPACE[node[0]]
    pools: list[tuple[float, int]] = []  # sum and size of neighbours that touch
    for want, offset in zip(wanted, offsets, strict=True):
        total, size = want - offset, 1
        while pools and pools[-1][0] / pools[-1][1] >= total / size:
            total, size = total + pools[-1][0], size + pools[-1][1]
            pools.pop()
        pools.append((total, size))
    levels = [total / size for total, size in pools for _ in range(size)]
    return [level + offset for level, offset in zip(levels, offsets, strict=True)]


def _widths(
    columns: list[list[_Node]], edges: Iterable[_Edge], y: dict[_Node, float]
) -> tuple[dict[_Node, float], float]:
    """The middle of each node, and where the last column ends; steep edges get more room."""
    steepness: dict[_Node, float] = defaultdict(float)
    for edge in edges:
        for source, target in pairwise(edge):
            for node in (source, target):
                steepness[node] = max(steepness[node], abs(y[source] - y[target]))
    x: dict[_Node, float] = {}
    left = float(_MARGIN)
    for number, column in enumerate(columns):
        steep = max(steepness[node] for node in column) if column else 0
        narrow = 76 if any(node[0] == "chord" for node in column) else 52
        wide = _WIDTH if number % 2 == 0 else narrow + min(steep / 8, 240)
        x.update(dict.fromkeys(column, left + wide / 2))
        left += wide
    return x, left


def _curve(edge: _Edge, x: dict[_Node, float], y: dict[_Node, float]) -> str:
    source, target = edge[0], edge[-1]
    points = [(x[source] + (_WIDTH / 2 if source[0] == "task" else 7), y[source])]
    for number, node in enumerate(edge[1:-1], start=source[0] == "task"):
        if number % 2 == 0:  # straight through a column of tasks
            points += [(x[node] - _WIDTH / 2, y[node]), (x[node] + _WIDTH / 2, y[node])]
    points.append((x[target] - (_WIDTH / 2 + 1 if target[0] == "task" else 7), y[target]))
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for (x0, y0), (x1, y1) in pairwise(points):
        middle = (x0 + x1) / 2
        path += f"C{middle:.1f} {y0:.1f} {middle:.1f} {y1:.1f} {x1:.1f} {y1:.1f}"
    if target == ("chord", 0):
        return f'<path class="end" d="{path}"/>'
    if target[0] == "chord":
        return f'<path class="header" d="{path}"/>'
    kind = "chord" if source[0] == "chord" else "single"
    return f'<path class="{kind}" d="{path}" marker-end="url(#wf-{kind})"/>'


def _box(name: str, handler: str, count: int, colour: str) -> str:
    left, top, inner = -_WIDTH / 2, -_HEIGHT / 2, _WIDTH - 24
    frame = f'width="{_WIDTH}" height="{_HEIGHT}" rx="6"'
    behind = number = ""
    if count > 1:
        behind = f'<rect class="box" x="{left + 5}" y="{top + 5}" {frame}/>'
        number = f'<text class="small" x="{-left - 10}" y="13" text-anchor="end">×{count:,}</text>'
    return (
        f'{behind}<rect class="box" x="{left}" y="{top}" {frame}/>'
        f'<rect x="{left}" y="{top + 8}" width="4" height="{_HEIGHT - 16}" rx="2" fill="{colour}"/>'
        f'<text class="name" x="{left + 14}" y="-3">{_text(_cut(name, inner / 13))}</text>'
        f'<text class="handler" x="{left + 14}" y="13">{_text(_cut(handler, (inner - 60 * bool(number)) / 11))}</text>'
        f"{number}</g>"
    )


def _legend(y: float) -> str:
    parts = (
        ('<path class="single" d="M0-4h28" marker-end="url(#wf-single)"/>', "starts after one task"),
        ('<path class="header" d="M0-4h14"/><circle class="dot" cx="14" cy="-4" r="5"/>', "chord: starts after all"),
        ('<path class="end" d="M0-4h14"/><circle class="ring" cx="18" cy="-4" r="5"/>', "end of the execution"),
    )
    return "".join(
        f'<g transform="translate({_MARGIN + 190 * n} {y:.0f})">{drawn}<text class="small" x="36">{says}</text></g>'
        for n, (drawn, says) in enumerate(parts)
    )


def _arrow(kind: str, colour: str) -> str:
    return (
        f'<marker id="wf-{kind}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        f'<polygon points="0 0.5 8 4 0 7.5" fill="{colour}"/></marker>'
    )


def _cut(text: str, room: float) -> str:
    """What fits in `room`, in units of the font's size, by a guess at the width of each character; the middle goes."""
    used = sum(
        0.4 if c in "fijlrt.,:;'|!()[] -" else 1.0 if c in "mwMW@%" or c > "\u2e7f" else 0.8 if c.isupper() else 0.69
        for c in text
    )
    if used <= room:
        return text
    kept = max(2, int(len(text) * room / used) - 1)
    return f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"


def _text(text: str) -> str:
    return escape(plain(text))
