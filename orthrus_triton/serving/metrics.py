"""What a Scheduler counts, as text that Prometheus scrapes."""

from __future__ import annotations

from orthrus_triton.serving.scheduler import Scheduler

MEDIA_TYPE = "text/plain; version=0.0.4"
# what each attribute of a scheduler is; only what a counter counts never becomes less
METRICS = (
    ("running", "orthrus_requests_running", "gauge", "Sequences in slots."),
    ("waiting", "orthrus_requests_waiting", "gauge", "Requests without a slot yet."),
    ("requests", "orthrus_requests_total", "counter", "Sequences that have left their slots."),
    ("prompt_tokens", "orthrus_prompt_tokens_total", "counter", "Tokens of their prompts."),
    ("cached_tokens", "orthrus_cached_prompt_tokens_total", "counter", "Those of them that a cache held already."),
    ("tokens", "orthrus_tokens_total", "counter", "Tokens that their cycles gave."),
    ("cycles", "orthrus_cycles_total", "counter", "Cycles they took; tokens over cycles fall where drafts are poor."),
)


def metrics_text(scheduler: Scheduler) -> str:
    """All of them, each with its help and type, in Prometheus' text format."""
    lines = []
    for attribute, name, kind, said in METRICS:
        lines += [f"# HELP {name} {said}", f"# TYPE {name} {kind}", f"{name} {getattr(scheduler, attribute)}"]
    return "\n".join([*lines, ""])
