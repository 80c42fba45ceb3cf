"""How a compiled workflow is shown: text and a picture for people, JSON and Mermaid for tools.

Text is cut where it grows long and says so; JSON and Mermaid are complete.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html import escape
from typing import Literal

from pipeline.compiler import END, CompiledWorkflow
from pipeline.definition import WorkflowDefinition
from pipeline.picture import plain, summary, svg

Format = Literal["text", "json", "mermaid", "svg"]

#: where the text cuts a group, a header, and itself
LIST_LIMIT, HEADER_LIMIT, LINE_LIMIT = 20, 12, 400


def draw(compiled: CompiledWorkflow, definition: WorkflowDefinition, format: Format) -> str:  # noqa: A002 - the word on the command line
    """The workflow in one of the formats."""
    drawers: dict[Format, Callable[[CompiledWorkflow, WorkflowDefinition], str]] = {
        "text": _text,
        "json": _json,
        "mermaid": _mermaid,
        "svg": svg,
    }
    return drawers[format](compiled, definition)


def _json(compiled: CompiledWorkflow, definition: WorkflowDefinition) -> str:
    end, *joins = compiled.headers
    shown = {
        "id": definition.id,
        "version": definition.version,
        "digest": compiled.digest,
        "order": compiled.order,
        "entry": compiled.roots,
        "fan_outs": compiled.releases,
        "joins": [{"number": j.number, "header": j.tasks, "bodies": j.bodies} for j in joins],
        "end": {"header": end.tasks, "body": END},
        "handlers": {task_id: compiled.handlers[task_id] for task_id in compiled.order},
    }
    return json.dumps(shown, indent=2, ensure_ascii=False)


def _text(compiled: CompiledWorkflow, definition: WorkflowDefinition) -> str:
    lines = [f"{plain(definition.name)} ({definition.id} version {definition.version}): {summary(compiled)}", ""]
    width = min(40, max(map(len, compiled.order))) + 9

    def add(before: str, task_id: str) -> None:
        lines.append(f"{before} {task_id}".ljust(width) + f"  {plain(compiled.handlers[task_id])}")

    def tree(members: Sequence[str], prefix: str) -> None:
        stack: list[tuple[Sequence[str], int, str]] = [(members, 0, prefix)]
        while stack and len(lines) <= LINE_LIMIT:
            siblings, number, prefix = stack.pop()
            if number == len(siblings):
                continue
            if number == LIST_LIMIT and len(siblings) > LIST_LIMIT + 1:
                lines.append(f"{prefix}└─ ... and {len(siblings) - number:,} more")
                continue
            stack.append((siblings, number + 1, prefix))
            last = number + 1 == len(siblings)
            task_id = siblings[number]
            add(prefix + ("└─" if last else "├─"), task_id)
            prefix += "   " if last else "│  "
            following = compiled.releases.get(task_id, ())
            while len(following) == 1:  # a chain goes straight down, not ever deeper
                add(prefix + "└>", following[0])
                following = compiled.releases.get(following[0], ())
                if len(lines) > LINE_LIMIT:
                    return
            stack.append((following, 0, prefix))

    lines.append("entry: group")
    tree(compiled.roots, "")
    for header in compiled.headers[1:]:
        if len(lines) > LINE_LIMIT:
            break
        lines += ["", f"chord {header.number}", f"├─ header: {_listed(header.tasks)}"]
        lines.append("└─ body:" if len(header.bodies) == 1 else "└─ body: group")
        tree(header.bodies, "   ")
    if len(lines) > LINE_LIMIT:
        lines[LINE_LIMIT:] = ["...", "(cut here; the format json gives everything)"]
    lines += ["", "end: chord", f"├─ header: {_listed(compiled.headers[0].tasks)}", f"└─ body: {END}"]
    return "\n".join(lines)


def _listed(task_ids: Sequence[str]) -> str:
    shown = task_ids if len(task_ids) <= HEADER_LIMIT + 1 else task_ids[:HEADER_LIMIT]
    more = f" ... and {len(task_ids) - len(shown):,} more" if len(shown) < len(task_ids) else ""
    return ", ".join(shown) + more


def _mermaid(compiled: CompiledWorkflow, definition: WorkflowDefinition) -> str:
    node = {task_id: f"t{number}" for number, task_id in enumerate(compiled.order)}
    names = {task.id: task.name for task in definition.tasks}
    lines = ["flowchart LR"]

    def members(task_ids: Sequence[str], name: str) -> None:
        boxes = [
            f'{node[t]}["{_quoted(names[t])}<br/><small>{_quoted(compiled.handlers[t])}</small>"]' for t in task_ids
        ]
        if len(boxes) == 1:
            lines.append(f"  {boxes[0]}")
        else:
            lines.extend([f'  subgraph {name}["group"]', *(f"    {box}" for box in boxes), "  end"])

    members(compiled.roots, "entry")
    for task_id, following in compiled.releases.items():
        members(following, f"after_{node[task_id]}")
        lines.extend(f"  {node[task_id]} --> {node[t]}" for t in following)
    for header in compiled.headers[1:]:
        members(header.bodies, f"after_c{header.number}")
        lines.append(f'  c{header.number}{{{{"chord {header.number}"}}}}')
        lines.extend(f"  {node[t]} -.-> c{header.number}" for t in header.tasks)
        lines.extend(f"  c{header.number} ==> {node[t]}" for t in header.bodies)
    lines.append(f'  c0(["{END}"])')
    lines.extend(f"  {node[t]} -.-> c0" for t in compiled.headers[0].tasks)
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """Mermaid's own escapes are HTML's, with # for &."""
    escaped = escape(plain(text).replace("#", "\0"), quote=False).replace('"', "&quot;")
    return escaped.replace("&", "#").replace("\0", "#35;")
