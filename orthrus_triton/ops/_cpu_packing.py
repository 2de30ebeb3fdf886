"""Weights in the layout in which oneDNN multiplies them, kept beside the parameters they were made from.
Without it every product of a few rows first lays out the whole weight anew, which takes half of its time."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from functools import cache, partial

import torch

PACKED_DTYPES = (torch.float32, torch.bfloat16)
LAID_OUT_FOR = 8  # rows; the layout serves any number
MEMORY_SHARE = 0.25  # of the machine's, for all packed weights together
SAMPLES = 1024  # values of a weight by which a change is noticed that left no trace in its version


@dataclass
class _Packed:
    weight: torch.Tensor
    parameter: weakref.ref[torch.nn.Parameter]
    made_from: tuple[int, int]  # address and version of the parameter
    sample: torch.Tensor


_packed: dict[int, _Packed] = {}  # by the parameter's id: a decode step looks some hundred times


def packed_weight(weight: torch.Tensor) -> torch.Tensor | None:
    """The packed form of a parameter [N, K], made when it is first asked for; None where it has none.

    Only parameters have one: other tensors are not there to stay. It lives as long as they do. A parameter that was
    assigned or changed in place since is packed again.
    """
    entry = _packed.get(id(weight))
    if entry is not None and entry.parameter() is weight:
        if entry.made_from == (weight.data_ptr(), weight._version):
            return entry.weight
        _packed.pop(id(weight), None)
    if not isinstance(weight, torch.nn.Parameter) or not has_onednn(weight.dtype):
        return None
    if weight.is_inference():  # such parameters do not tell whether they changed
        return None
    if not weight.is_contiguous() or not _has_room(weight):
        return None
    parameter = weakref.ref(weight, partial(_forget, id(weight)))
    made_from = (weight.data_ptr(), weight._version)
    entry = _packed[id(weight)] = _Packed(pack(weight), parameter, made_from, _sample(weight).clone())
    return entry.weight


def forget_changed() -> None:
    """Drop packed weights whose parameter changed behind its version's back, as `parameter.data.copy_()` does."""
    for key, entry in _packed.copy().items():  # a list of items could collect garbage, and change them, midway
        parameter = entry.parameter()
        if parameter is None or not _is_as_sampled(parameter, entry.sample):
            _packed.pop(key, None)


def _forget(key: int, parameter: weakref.ref[torch.nn.Parameter]) -> None:
    """Drop what was packed for a parameter that is gone, unless another one has its id by now."""
    entry = _packed.get(key)
    if entry is not None and entry.parameter is parameter:
        _packed.pop(key, None)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] in oneDNN's layout: opaque, for its own products alone."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), LAID_OUT_FOR)


@cache
def has_onednn(dtype: torch.dtype) -> bool:
    """Whether torch was built with it, and with the two operations used here, and it multiplies `dtype` on this CPU."""
    names = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    if dtype not in PACKED_DTYPES or not torch.backends.mkldnn.is_available():
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return False
    return dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _sample(weight: torch.Tensor) -> torch.Tensor:
    flat = weight.detach().view(-1)
    return flat[:: max(1, flat.numel() // SAMPLES)]


def _has_room(weight: torch.Tensor) -> bool:
    held = sum(entry.weight.nbytes for entry in _packed.copy().values())
    return held + weight.nbytes <= MEMORY_SHARE * _memory_bytes()


def _is_as_sampled(weight: torch.Tensor, sample: torch.Tensor) -> bool:
    # `parameter.data` may be another tensor by now: on a GPU, of another dtype, transposed
    alike = weight.device == sample.device and weight.dtype == sample.dtype and weight.is_contiguous()
    return alike and torch.equal(_sample(weight), sample)


@cache
def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return 8 << 30
