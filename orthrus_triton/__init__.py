"""orthrus_triton: lossless parallel decoding with a dual-view Transformer, on Triton kernels.
Importing touches no GPU and no environment variable."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orthrus_triton.models import OrthrusForCausalLM
    from orthrus_triton.modules import ConsensusDecoder, DualViewAttention, OrthrusDecoderLayer, SharedKVCache

__version__ = "0.1.0"

__all__ = [
    "ConsensusDecoder",
    "DualViewAttention",
    "OrthrusDecoderLayer",
    "OrthrusForCausalLM",
    "SharedKVCache",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import an export when it is first used: `import orthrus_triton` alone loads neither torch nor transformers."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "models" if name == "OrthrusForCausalLM" else "modules"
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
