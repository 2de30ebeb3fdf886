"""What a training step consists of: host and device time of the forward and the backward pass, and a table of kernels.
Of a trainer whose run has ended: the step is not taken, only timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def profile_step(trainer: Any) -> str:
    """How long host and device take for the forward and the backward pass of one step, and its kernels by time."""
    on_gpu = trainer.args.device.type == "cuda"
    wait: Callable[[], None] = torch.cuda.synchronize if on_gpu else (lambda: None)
    trainer.args.dataloader_num_workers, trainer.args.dataloader_prefetch_factor = 0, None
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    lines = []
    for _ in range(2):  # the first one warms up
        wait()
        started = time.monotonic()
        loss = trainer.compute_loss(trainer.model, batch)
        launched = time.monotonic()
        wait()
        forward_done = time.monotonic()
        loss.backward()
        back_launched = time.monotonic()
        wait()
        ended = time.monotonic()
    for name, first, middle, last in (
        ("forward", started, launched, forward_done), ("backward", forward_done, back_launched, ended),
    ):  # fmt: skip
        lines.append(f"{name}: host {1000 * (middle - first):.1f} ms, done after {1000 * (last - first):.1f} ms")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        trainer.compute_loss(trainer.model, batch).backward()
        wait()
    events = profiler.key_averages()
    if on_gpu:
        launches = sum(event.count for event in events if "aunchKernel" in event.key)
        on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        busy = sum(event.self_device_time_total for event in on_device) / 1000
        lines.append(f"{launches} launches, device busy {busy:.1f} ms (forward and backward, no optimizer)")
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return "\n".join([*lines, events.table(sort_by=order, row_limit=24, max_name_column_width=70)])
