"""Device buffers by which the slots of a run sample and process their logits.
Made when a run first needs them; they keep their addresses, as all buffers of a captured cycle do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from orthrus_triton.modules.sampling_params import Choosing, Processor, SamplingParams
from orthrus_triton.ops import ProcessorTensors, SamplingTensors
from orthrus_triton.ops.process_logits import IN_PROMPT


@dataclass
class SamplingState:
    """Parameters of B slots.

    sampling: [B] tensors. processors: None until a run processes logits. absorbed [B] int32: output tokens that the
    history in `processors` counts already. hosts: by slot, the prompt and the function that processes its logits on
    the host; shared by all views of one state, in which slot 0 is number `first`.
    """

    sampling: SamplingTensors
    absorbed: torch.Tensor
    processors: ProcessorTensors | None = None
    hosts: dict[int, tuple[torch.Tensor, Processor]] = field(default_factory=dict)
    first: int = 0

    @classmethod
    def allocate(cls, batch_size: int, device: torch.device) -> SamplingState:
        """Buffers of greedy slots."""

        def full(value: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((batch_size,), value, dtype=dtype, device=device)

        fp32, int32 = torch.float32, torch.int32
        sampling = SamplingTensors(
            full(0.0, fp32), full(0, int32), full(1.0, fp32), full(0.0, fp32), full(0, torch.int64), full(0, int32)
        )
        return cls(sampling, full(0, int32))

    def prepare(self, choosing: Choosing, vocab_size: int) -> None:
        """Make what `choosing` needs and is not there yet."""
        self.hosts.clear()
        if not choosing.processed or self.processors is not None:
            return
        (batch_size,), device = self.absorbed.shape, self.absorbed.device
        on = {"dtype": torch.float32, "device": device}
        zeros = (torch.zeros(batch_size, **on) for _ in range(2))
        self.processors = ProcessorTensors(
            torch.ones(batch_size, **on), *zeros, torch.zeros_like(self.absorbed),
            torch.zeros(batch_size, vocab_size, **on),
            torch.zeros(batch_size, vocab_size + 1, dtype=torch.int32, device=device),
        )  # fmt: skip

    def slots(self, first: int, count: int) -> SamplingState:
        """The buffers of `count` slots in a row, as views."""
        only = slice(first, first + count)
        processors = None if self.processors is None else ProcessorTensors(*(t[only] for t in self.processors))
        sampling = SamplingTensors(*(tensor[only] for tensor in self.sampling))
        return SamplingState(sampling, self.absorbed[only], processors, self.hosts, self.first + first)

    def start(self, params: SamplingParams, prompt: torch.Tensor) -> None:
        """Set up this slot (a view of one) for a new sequence."""
        for name, tensor in self.sampling._asdict().items():
            tensor.fill_(getattr(params, name))
        self.hosts.pop(self.first, None)
        if params.logits_processor is not None:
            self.hosts[self.first] = (prompt, params.logits_processor)
        if self.processors is None:
            return
        processors, device = self.processors, self.absorbed.device
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
            getattr(processors, name).fill_(getattr(params, name))
        processors.min_position.fill_(prompt.numel() + params.min_new_tokens)
        processors.bias.zero_()
        if params.logit_bias:
            tokens = torch.tensor(list(params.logit_bias), device=device)
            processors.bias[0, tokens] = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32).to(device)
        processors.history.zero_()
        processors.history[0, prompt.to(device)] = IN_PROMPT
        self.absorbed.zero_()

    def start_together(self, slots: Sequence[int], params: Sequence[SamplingParams]) -> None:
        """Set up several slots, whose logits nothing processes, for new sequences."""
        where = torch.tensor(slots, device=self.absorbed.device)
        for name, tensor in self.sampling._asdict().items():
            values = torch.tensor([getattr(of_slot, name) for of_slot in params], dtype=tensor.dtype)
            tensor[where] = values.to(tensor.device)

    def absorb(self, output_ids: torch.Tensor, output_len: torch.Tensor, width: int) -> None:
        """Count what was committed since the last time, at most `width` tokens per slot, in the history."""
        history = self.processors.history
        nowhere = history.shape[1] - 1
        columns = self.absorbed[:, None] + torch.arange(width, dtype=torch.int32, device=history.device)
        fresh = columns < output_len[:, None]
        tokens = output_ids.gather(1, columns.clamp(max=output_ids.shape[1] - 1).long())
        tokens = torch.where(fresh & (tokens >= 0), tokens, nowhere)
        history.scatter_add_(1, tokens, fresh.to(torch.int32))
        self.absorbed.copy_(output_len)
