"""Serving: many requests over one decoder, batched cycle by cycle, and an OpenAI-compatible HTTP endpoint for them."""

from orthrus_triton.serving.request import Request
from orthrus_triton.serving.scheduler import QueueFullError, Scheduler

__all__ = ["QueueFullError", "Request", "Scheduler"]
