"""The Celery app of celery-dyrygent: the stock one, with its workflow processor."""

from __future__ import annotations

from celery_dyrygent.tasks import register_workflow_processor

from benchmarks.contenders.celery_app import app, mark, noop

__all__ = ["app", "mark", "noop"]

register_workflow_processor(app)
