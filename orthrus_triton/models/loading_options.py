"""What transformers' loaders (AutoModelForCausalLM, pipeline) pass to from_pretrained beside a folder."""

from __future__ import annotations

from typing import Any

import torch

# passed out of habit or by transformers itself: the values that mean what happens here anyway
ACCEPTED = {
    "_from_auto": None, "_from_pipeline": None, "adapter_kwargs": None, "trust_remote_code": (None, False),
    "low_cpu_mem_usage": None, "use_safetensors": (None, True), "attn_implementation": (None, "eager", "sdpa"),
    "quantization_config": (None,), "revision": (None, "main"), "subfolder": (None, ""),
    "weights_only": (None, True), "tp_plan": (None,), "cache_dir": (None,),
}  # fmt: skip


def loading_options(
    dtype: torch.dtype | str | None, device: torch.device | str | None, options: dict[str, Any]
) -> tuple[torch.dtype | None, torch.device | str | None]:
    """(dtype, device) that `from_pretrained` was asked for; what is left in `options` is refused.

    Raises:
        ValueError: an option, or a value of one, that would not be heeded.
    """
    dtype = options.pop("torch_dtype", None) or dtype
    if isinstance(dtype, str):
        named = None if dtype == "auto" else getattr(torch, dtype.removeprefix("torch."), None)
        if dtype != "auto" and not isinstance(named, torch.dtype):
            raise ValueError(f"dtype must be 'auto' or a torch dtype such as 'bfloat16', but got {dtype!r}")
        dtype = named
    device_map = options.pop("device_map", None)
    if device_map is not None and device is None:
        if isinstance(device_map, dict):
            if set(device_map) != {""}:
                raise ValueError(f"device_map must name one device for the whole model, but got {device_map}")
            device_map = device_map[""]
        if device_map == "auto":
            device_map = "cuda" if torch.cuda.is_available() else "cpu"
        device = f"cuda:{device_map}" if isinstance(device_map, int) else device_map
    for name, value in options.items():
        if name not in ACCEPTED or (ACCEPTED[name] is not None and value not in ACCEPTED[name]):
            raise ValueError(f"{name} is not an option of from_pretrained here, but got {value!r}")
    return dtype, device
