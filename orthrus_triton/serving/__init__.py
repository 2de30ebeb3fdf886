"""Serving: many requests over one decoder, batched cycle by cycle, and an OpenAI-compatible HTTP endpoint for them."""

from orthrus_triton.serving.scheduler import QueueFullError, Request, Scheduler

__all__ = ["QueueFullError", "Request", "Scheduler"]
