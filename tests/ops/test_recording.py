"""A recorder by itself: what a replay of its steps reads and writes."""

from __future__ import annotations

from collections import defaultdict

import torch

from orthrus_triton.ops.cpu.recording import Recorder


def test_a_kernel_finds_a_part_of_a_tensor_where_it_is() -> None:
    seen: list[tuple[int, ...]] = []
    with Recorder() as recorder:
        whole = recorder.empty((2, 4), torch.float32)
        recorder.kernel(lambda *addresses: seen.append(addresses), (whole, whole[1], whole[0, 3:]), ())
    assert recorder.complete
    result = recorder.recording(whole[1], defaultdict(list)).replay()
    ((first, second, last),) = seen
    assert (second - first, last - first, result.data_ptr() - first) == (16, 12, 16) and first != whole.data_ptr()


def test_a_sum_is_done_again_as_it_was() -> None:
    source, other = torch.ones(3), torch.ones(3)
    with Recorder() as recorder:
        result = torch.add(source, other, alpha=3)
    recording = recorder.recording(result, defaultdict(list))
    other.fill_(2)
    assert recorder.complete and recording.replay().tolist() == [7.0] * 3


def test_recordings_that_never_run_at_once_share_their_memory() -> None:
    pool, addresses = defaultdict(list), []
    source = torch.arange(3.0)
    for _ in range(3):
        with Recorder() as recorder:
            result = torch.add(source, source)
        addresses.append(recorder.recording(result, pool).replay().data_ptr())
    assert len(set(addresses)) == 1
