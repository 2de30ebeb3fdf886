"""Which implementation runs: Triton on a GPU, torch anywhere, the fp64 reference on request.
An implementation that was asked for by name never falls back to another."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch

from orthrus_triton._triton import HAS_TRITON, is_interpreted

PLAIN = (torch.Tensor, torch.nn.Parameter)
IMPLS = ("auto", "triton", "torch", "reference")


def resolve_impl(impl: str, tensor: torch.Tensor) -> str:
    """Turn `impl` into "triton", "torch" or "reference" for the device that holds `tensor`.

    Raises:
        ValueError: `impl` is not one of "auto", "triton", "torch", "reference".
        RuntimeError: "triton" was asked for where it cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}, but got {impl!r}")
    if impl == "auto":
        return "triton" if HAS_TRITON and tensor.device.type == "cuda" else "torch"
    if impl == "triton":
        if not HAS_TRITON:
            raise RuntimeError("impl='triton' needs Triton, which is not installed: use impl='torch'")
        if tensor.device.type != "cuda" and not is_interpreted():
            raise RuntimeError(
                f"impl='triton' needs a CUDA or ROCm tensor, or TRITON_INTERPRET=1 set before the import; "
                f"got a tensor on {tensor.device}"
            )
    return impl


def runs_directly(impl: str, tensor: torch.Tensor) -> bool:
    """Whether a call with `tensor` may skip the registered op and run the torch implementation itself.

    Registration serves the compiler, autograd and tensors without values: fake ones, which are a subclass, and meta
    ones. In eager inference its bookkeeping costs a CPU about as much as a small op, some ten times in every layer.
    """
    if impl != "torch" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return type(tensor) in PLAIN and not tensor.is_meta


def without_autocast(run: Callable) -> Callable:
    """Decorates torch code whose first argument is a tensor: it computes in the dtypes it names, where autocast would
    multiply fp32 in half precision, and fp16 as bf16."""

    @wraps(run)
    def as_written(tensor: torch.Tensor, *args, **kwargs):
        device = tensor.device.type
        if tensor.is_meta or not torch.is_autocast_enabled(device):
            return run(tensor, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return run(tensor, *args, **kwargs)

    return as_written


def on_its_device(launch: Callable) -> Callable:
    """Decorates what launches kernels and takes a tensor first: Triton launches on the current device, whatever device
    its tensors are on."""

    @wraps(launch)
    def there(tensor: torch.Tensor, *args, **kwargs):
        device = tensor.device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return launch(tensor, *args, **kwargs)
        with torch.cuda.device(device):
            return launch(tensor, *args, **kwargs)

    return there


def require_kernel(config: object | None, impl: str, *inputs: torch.Tensor | None) -> None:
    """Raise a ValueError if a kernel configuration was given to an implementation that has no kernel, or with inputs
    that want a gradient: the kernel is launched past the registered op, which refuses `backward`."""
    if config is None:
        return
    if impl != "triton":
        raise ValueError(f"config belongs to impl='triton', but impl is {impl!r}")
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        raise ValueError("config must be None where an input requires a gradient, for no kernel has one")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which torch implementations compute: fp64 stays, everything else goes to fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def require_size(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is an integer >= 1; True is none."""
    # by the method, so that the sizes that a compiler traces and those of numpy count as integers
    if isinstance(value, (bool, torch.Tensor)) or not hasattr(value, "__index__") or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, but got {value!r}")


def require_head_dim(head_dim: int) -> None:
    """Raise a ValueError unless `head_dim` is the size of a head that can be rotated."""
    require_size("head_dim", head_dim)
    if head_dim % 2:
        raise ValueError(f"head_dim must be even to be rotated by halves, but got {head_dim}")


def require_same(name: str, got: object, expected: object, what: str) -> None:
    """Raise a ValueError that names the argument, what was expected and what came."""
    if got != expected:
        raise ValueError(f"{name} must have {what} {expected}, but got {got}")


def require_both_or_neither(first: str, one: object, second: str, other: object) -> None:
    """Raise a ValueError if only one of two arguments that belong together was given."""
    if (one is None) != (other is None):
        raise ValueError(f"{first} and {second} must be given together: got only one of them")
