"""celery-dyrygent with its defaults: a task that looks at all others and sends those that are free, every few seconds.

Graphs are run as they are. Time is until the last task's result is in Redis, looked for every 5 ms.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from celery_dyrygent.workflows import Workflow

from benchmarks.contenders.stock import RedisResults
from benchmarks.shapes import Graph


class Dyrygent(RedisResults):
    """Workflows of signatures with dependencies."""

    acks_late = False
    app_module = "benchmarks.contenders.dyrygent_app"

    def prepare(self, graph: Graph) -> tuple[Any, str]:
        workflow: Any = Workflow()
        nodes: list[Any] = []
        for needs in graph.needs:
            signature = self.noop.si()
            signature.freeze()
            nodes.append(workflow.add_signature(signature, [nodes[need] for need in needs]))
        return workflow, nodes[-1].id

    def run(self, prepared: tuple[Any, str]) -> dict[str, float]:
        workflow, last = prepared
        began = self.begin()
        workflow.apply_async()
        self._await(partial(self._is_done, last))
        return {"seconds": time.time() - began}

    def _submit(self, prepared: tuple[Any, str]) -> str:
        workflow, last = prepared
        workflow.apply_async()
        return last
