"""Linear layers that share one weight: q/k/v or gate/up as one product, under their own names in the state dict."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from orthrus_triton import ops
from orthrus_triton.modules.rms_norm import RMSNorm

_DTYPE_MISMATCH = "dtype mismatch for {}: it must have {}, but the state dict has {}."


def _mistakes_int8(own: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether integers would be taken for what they count, or numbers be cut off to integers."""
    return own.dtype != given.dtype and torch.int8 in (own.dtype, given.dtype)


def require_residual(residual: torch.Tensor | None, next_norm: RMSNorm | None) -> None:
    """Raise a ValueError for a norm of a sum of which one part is missing."""
    if next_norm is not None and residual is None:
        raise ValueError("residual must be given with next_norm, which is the norm of a sum with it, but got None")


class Linear(nn.Module):
    """`orthrus_triton.ops.linear` with nn.Linear's parameters and names.

    `quantize` turns the weight to int8, for good; the state dict then has `weight_scale`, too. With `rounds_rows`, CPUs
    that multiply integers faster then round what it is multiplied with to int8 as well.

    Args:
        in_features, out_features: weight is [out_features, in_features].
        bias: whether there is one.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.rounds_rows = False
        self.register_buffer("weight_scale", None)
        self.register_buffer("draft_weight", None, persistent=False)
        self.register_buffer("draft_scale", None, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """nn.Linear's initialisation."""
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is in int8, with a scale for each of its rows."""
        return self.weight_scale is not None

    def quantize(self, rounds_rows: bool = False) -> None:
        """Keep the weight in int8 alone (`orthrus_triton.ops.quantize_rows`)."""
        self.rounds_rows = rounds_rows
        if self.is_quantized:
            return
        with torch.inference_mode(False):  # what is made in it cannot be loaded into later
            values, self.weight_scale = ops.quantize_rows(self.weight)
            self.weight = nn.Parameter(values, requires_grad=False)
        self.drop_draft_copy()

    def quantize_for_drafts(self) -> None:
        """Keep an int8 copy of the weight, as it is now, beside it: what `draft=True` reads. A weight in int8 needs
        none."""
        if not self.is_quantized:
            self.draft_weight, self.draft_scale = ops.quantize_rows(self.weight)

    def drop_draft_copy(self) -> None:
        """Free the int8 copy: a draft reads the weight again."""
        self.draft_weight = self.draft_scale = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Linear:
        scales = {name: getattr(self, name) for name in ("weight_scale", "draft_scale")}
        super()._apply(fn, recurse)
        for name, scale in scales.items():
            if scale is not None and getattr(self, name).dtype != scale.dtype:  # a cast is meant for the weights
                setattr(self, name, scale.to(getattr(self, name).device))
        return self

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, strict: bool, missing_keys: list,
        unexpected_keys: list, error_msgs: list,
    ) -> None:  # fmt: skip
        given = state_dict.get(f"{prefix}weight", self.weight)
        if _mistakes_int8(self.weight, given):
            error_msgs.append(_DTYPE_MISMATCH.format(f"{prefix}weight", self.weight.dtype, given.dtype))
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.drop_draft_copy()  # it is of other weights

    def factor(self, draft: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor | bool | None]]:
        """The weight to multiply with, which for a `draft` is the copy, if there is one, and what ops have to know of
        it: `weight_scale` and `round_rows`."""
        if draft and self.draft_weight is not None:
            return self.draft_weight, {"weight_scale": self.draft_scale, "round_rows": True}
        return self.weight, {"weight_scale": self.weight_scale, "round_rows": draft or self.rounds_rows}

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        *,
        out_dtype: torch.dtype | None = None,
        impl: str = "auto",
        draft: bool = False,
    ) -> torch.Tensor:
        """x [..., in] -> [..., out], plus `residual` [..., out]."""
        weight, how = self.factor(draft)
        return ops.linear(x, weight, self.bias, residual, out_dtype=out_dtype, impl=impl, **how)

    def add_and_norm(
        self, x: torch.Tensor, residual: torch.Tensor, norm: RMSNorm, *, impl: str = "auto", linear_impl: str = "auto",
        draft: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """(norm of the sum, sum) of this projection of x [..., in] and `residual` [..., out]; in one op where both the
        product (`linear_impl`) and the rest (`impl`) are ours."""
        if impl == linear_impl:
            weight, how = self.factor(draft)
            return ops.linear_norm(
                x, weight, self.bias, residual, norm.weight, norm.eps, norm_offset=norm.offset, impl=impl, **how
            )  # fmt: skip
        return norm(self(x, impl=linear_impl, draft=draft), residual, impl=impl)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class FusedLinear(Linear):
    """Several projections of one input as one product.

    The parameter is one [sum(out), in] tensor. In the parent's state dict it appears as the named parts, views of it:
    `parts={"q_proj": 64, "k_proj": 16}` under the attribute `qkv_proj` reads and writes `q_proj.weight` and
    `k_proj.weight`, never `qkv_proj.weight`. `register_with` installs that; checkpoints keep the published names.
    """

    def __init__(self, in_features: int, parts: dict[str, int], bias: bool = False) -> None:
        super().__init__(in_features, sum(parts.values()), bias)
        self.parts = dict(parts)

    def register_with(self, parent: nn.Module, own_name: str) -> FusedLinear:
        """Make `parent` hold this layer as `own_name` and translate its names in state dicts."""
        setattr(parent, own_name, self)
        parent.register_state_dict_post_hook(partial(_split_names, own_name))
        parent.register_load_state_dict_pre_hook(partial(_merge_names, own_name))
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, parts={self.parts}"


def _split_names(own_name: str, parent: nn.Module, state_dict: dict, prefix: str, _metadata: dict) -> None:
    """State dict hook: the fused tensor leaves under the names of its parts."""
    parts = getattr(parent, own_name).parts
    for parameter in ("weight", "weight_scale", "bias"):
        fused = state_dict.pop(f"{prefix}{own_name}.{parameter}", None)
        if fused is not None:
            for name, rows in zip(parts, fused.split(list(parts.values()))):
                state_dict[f"{prefix}{name}.{parameter}"] = rows


def _merge_names(
    own_name: str, parent: nn.Module, state_dict: dict, prefix: str, _metadata: dict, _strict: bool, _missing: list,
    _unexpected: list, errors: list,
) -> None:  # fmt: skip
    """Load hook: complete sets of parts become the fused tensor; an incomplete one stays and is reported as missing,
    and one whose part has another shape is an error that names the part: others may make up for its rows."""
    fused = getattr(parent, own_name)
    for parameter in ("weight", "weight_scale", "bias"):
        names = [f"{prefix}{name}.{parameter}" for name in fused.parts]
        own = getattr(fused, parameter)
        if own is None or not all(name in state_dict for name in names):
            continue
        parts = [state_dict.pop(name) for name in names]
        wrong = [
            f"size mismatch for {name}: it must have shape {shape}, but the state dict has {tuple(part.shape)}."
            for name, part, rows in zip(names, parts, fused.parts.values())
            if tuple(part.shape) != (shape := (rows, *own.shape[1:]))
        ]
        wrong += [
            _DTYPE_MISMATCH.format(name, own.dtype, part.dtype)
            for name, part in zip(names, parts)
            if _mistakes_int8(own, part)
        ]
        errors += wrong
        state_dict[f"{prefix}{own_name}.{parameter}"] = own if wrong else torch.cat(parts)


@torch.no_grad()
def draw_weight(weight: torch.Tensor, generator: torch.Generator) -> None:
    """nn.Linear's start for a `weight` [out, in], drawn on the host: the same numbers on any device."""
    bound = weight.shape[1] ** -0.5
    weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))


class LowRankDelta(nn.Module):
    """A view's projection as the frozen one plus `up(down(x))` of rank r; `up` starts at zero, so the view starts as
    a copy of the frozen weight.

    Args:
        in_features, out_features: of the frozen projection.
        rank: r >= 1.
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        if type(rank) is not int or rank < 1:
            raise ValueError(f"view_rank must be an integer >= 1 or None, but got {rank!r}")
        self.down = Linear(in_features, rank)
        self.up = Linear(rank, out_features)
        nn.init.zeros_(self.up.weight)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Start anew as the frozen projection, with the next numbers of `generator`."""
        draw_weight(self.down.weight, generator)
        self.up.weight.zero_()

    def forward(self, x: torch.Tensor, frozen: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
        """x [..., in], frozen [..., out] (the frozen projection's output) -> [..., out]."""
        return self.up(self.down(x, impl=impl), frozen, impl=impl)
