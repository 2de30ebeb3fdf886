"""A recorder by itself: what a replay of its steps reads and writes."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch.multiprocessing.reductions import StorageWeakRef

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


def test_a_step_does_not_write_to_what_it_reads() -> None:
    seen: list[tuple[int, ...]] = []
    with Recorder() as recorder:
        read, written = recorder.empty((4,), torch.float32), recorder.empty((4,), torch.float32)
        recorder.kernel(lambda *addresses: seen.append(addresses), (read, written), ())
    recorder.recording(written, defaultdict(list)).replay()
    assert seen[0][0] != seen[0][1]


def test_later_steps_leave_the_result_alone() -> None:
    source = torch.ones(3)
    with Recorder() as recorder:
        result = torch.add(source, source)
        torch.add(source, source, alpha=5)
    assert recorder.recording(result, defaultdict(list)).replay().tolist() == [2.0] * 3


def test_memory_that_kernels_read_is_held_though_its_tensor_is_given_other() -> None:
    source = torch.ones(3)
    with Recorder() as recorder:
        recorder.kernel(lambda address: None, (source,), ())
        result = torch.add(source, source)
    recording = recorder.recording(result, defaultdict(list))
    storage = StorageWeakRef(source.untyped_storage())
    source.data = torch.zeros(5)
    assert not storage.expired() and recording.replay().tolist() == [2.0] * 3
