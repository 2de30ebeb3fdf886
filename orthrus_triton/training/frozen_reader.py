"""The frozen model's pass over whole rows inside the training loop.
On a single GPU it is replayed as a CUDA graph, one for each batch shape."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from orthrus_triton.modules import SharedKVCache
from orthrus_triton.modules.cuda_graph import CudaGraphCapture, Step
from orthrus_triton.training.student import BlockStudent, LayerContext

LENGTH_QUANTUM = 64  # rows are padded to a multiple of it, for graphs and kernels of few different shapes


class FrozenReader:
    """Rows of text -> the frozen model's K/V and final states, in buffers that the next batch overwrites.

    A pass is a few hundred kernels, each of which takes the host longer to launch than a GPU to run: launched one by
    one they are a third of a training step.

    Args:
        student: whose frozen layers read.
        capture: turns a step into its replay; by default a CUDA graph on a single GPU, else nothing is captured.
    """

    def __init__(self, student: BlockStudent, capture: Callable[[Step], Step] | None = None) -> None:
        self.student, self._capture = student, capture
        self._cache: SharedKVCache | None = None
        self._replays: dict[tuple[int, int], tuple[Step, torch.Tensor, torch.Tensor, list[torch.Tensor]]] = {}

    def __call__(self, input_ids: torch.Tensor, prompt_len: torch.Tensor) -> tuple[list[LayerContext], torch.Tensor]:
        """input_ids [B, L], prompt_len [B] -> each layer's K/V, and final hidden states [B, at least L, H]."""
        ids = F.pad(input_ids, (0, -input_ids.shape[1] % LENGTH_QUANTUM))
        if not torch.is_grad_enabled():
            # evaluation has few batches, of a shape of its own: training's buffers and graphs outlive it
            cache = self.student.new_cache(*ids.shape, 1)
            return cache.layers, self.student.read(ids, prompt_len, cache)
        cache, capture = self._reserve(*ids.shape), self._capture_on(ids.device)
        if capture is None:
            return cache.layers, self.student.read(ids, prompt_len, cache)
        key = tuple(ids.shape)
        if key not in self._replays:
            own_ids, own_len, states = ids.clone(), prompt_len.clone(), []

            def step() -> None:
                states[:] = [self.student.read(own_ids, own_len, cache)]

            self._replays[key] = (capture(step), own_ids, own_len, states)
        replay, own_ids, own_len, states = self._replays[key]
        own_ids.copy_(ids)
        own_len.copy_(prompt_len)
        replay()
        return cache.layers, states[0]

    def _reserve(self, batch: int, length: int) -> SharedKVCache:
        cache = self._cache
        if cache is None or cache.batch_size != batch or cache.capacity < length:
            self._replays.clear()
            cache = self._cache = self.student.new_cache(batch, length, 1)
        return cache

    def _capture_on(self, device: torch.device) -> Callable[[Step], Step] | None:
        # FSDP gathers weights around each layer, which no graph can
        if self._capture is None and device.type == "cuda" and not torch.distributed.is_initialized():
            self._capture = CudaGraphCapture(device)
        return self._capture
