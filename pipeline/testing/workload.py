"""Workflows to break: random ones of 5 to 30 tasks, and a wide one for losses in the middle."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from pipeline.definition import WorkflowDefinition

_RETRIES = {"max_retries": 5, "backoff": "fixed", "max_delay": 0.2}


def random_work(rng: random.Random, ledger: Path, count: int) -> list[WorkflowDefinition]:
    """One for each of so many executions: a quarter of them differ, the others are of one that begins with one quick task."""
    alike = count * 3 // 4
    same = random_workflow(rng, ledger, entries=1)
    first = same.tasks[0].model_copy(update={"handler": "testing.note", "params": {"ledger": str(ledger)}})
    same = same.model_copy(update={"tasks": (first, *same.tasks[1:])})
    return [*(random_workflow(rng, ledger) for _ in range(count - alike)), *[same] * alike]


def random_workflow(rng: random.Random, ledger: Path, *, entries: int = 30) -> WorkflowDefinition:
    """A graph of any shape with effects, retries, skips at the rim, and small sleeps; only its first tasks wait for none."""
    count = rng.randint(5, 30)
    tasks: list[dict[str, Any]] = []
    for number in range(count):
        least = int(number >= entries)
        before = rng.sample(range(number), min(number, max(least, rng.choice((0, 1, 1, 2, 2, 3, 5)))))
        handler, params = _job(rng, ledger, rim=number > count * 0.7)
        tasks.append({
            "id": f"t{number:02d}", "handler": handler, "params": params, "retry_policy": _RETRIES,
            "dependencies": [f"t{n:02d}" for n in sorted(before)], "timeout": 20,
        })  # fmt: skip
    return WorkflowDefinition.model_validate({"id": f"crash-{rng.getrandbits(48):012x}", "version": "1", "tasks": tasks})


def _job(rng: random.Random, ledger: Path, *, rim: bool) -> tuple[str, dict[str, Any]]:
    die = rng.random()
    if die < 0.55:
        return "testing.effect", {"ledger": str(ledger), "seconds": round(rng.uniform(0, 0.03), 3)}
    if die < 0.65:
        return "testing.again", {}
    if die < 0.72 and rim:
        return "testing.skip", {}
    return "testing.sleep", {"seconds": round(rng.uniform(0, 0.05), 3)}


def wide_workflow(width: int, ledger: Path, *, seconds: float = 0.0) -> WorkflowDefinition:
    """One entry, `width` effects after it, one join."""
    effect = {"handler": "testing.effect", "params": {"ledger": str(ledger), "seconds": seconds}, "retry_policy": _RETRIES}
    middle = [f"t{n:05d}" for n in range(width)]
    tasks = [
        {"id": "entry", **effect},
        *({"id": name, "dependencies": ["entry"], **effect} for name in middle),
        {"id": "join", "dependencies": middle, **effect},
    ]
    return WorkflowDefinition.model_validate({"id": f"crash-wide-{width}", "version": "1", "tasks": tasks})
