"""The frozen LM head and the distillation loss in one op: logits exist for a chunk of rows at a time, never in full."""

from orthrus_triton.ops.linear_kl.api import HiddenTeacher, LabelTeacher, LinearKL, TopKTeacher, linear_kl

__all__ = ["HiddenTeacher", "LabelTeacher", "LinearKL", "TopKTeacher", "linear_kl"]
