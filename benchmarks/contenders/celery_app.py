"""The Celery app of the stock contenders, with Celery's defaults but for what its variables say."""

from __future__ import annotations

import os
import time

import redis
from celery import Celery

app = Celery("bench", broker=os.environ["BENCH_BROKER"], backend=os.environ.get("BENCH_RESULTS") or None)
app.conf.update(
    task_acks_late=os.environ.get("BENCH_ACKS_LATE") == "1",
    task_ignore_result=not os.environ.get("BENCH_RESULTS"),
    broker_connection_retry_on_startup=True,
)


@app.task
def noop() -> None:
    """Do nothing."""


@app.task
def mark(key: str) -> None:
    """Write down when this ran."""
    client = redis.Redis.from_url(os.environ["BENCH_BROKER"])
    client.set(key, time.time())
    client.close()
