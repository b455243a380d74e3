"""A save in two steps, pickle first and values later, is the file that torch.save writes of it, as far as torch.load
can tell."""

from __future__ import annotations

import sys
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.checkpoint.live_memory import LiveMemory
from megatron.checkpoint.snapshot import file_to_write
from megatron.checkpoint.staging_memory import StagingMemory, bytes_to_copy
from megatron.ucp.digest import digest_tensor
from megatron.ucp.manifest import FileInfo
from megatron.ucp.runs import whole_runs
from megatron.ucp.save_job import CopiedMemory, DigestRow, write_files
from megatron.ucp.save_worker import Answer, SaveWorker, SaveWorkerError, WriteOrder


def _contents() -> dict[str, object]:
    flat = torch.arange(100, dtype=torch.float32)
    shared = torch.ones(3, 4)
    return {
        "views of one buffer": {"a": flat[:10].view(2, 5), "b": flat[50:60], "c": flat[7:7]},
        "two names": {"embedding": shared, "head": shared.detach()},
        "not contiguous": {"t": torch.arange(12.0).view(3, 4).t()},
        "parameter": OrderedDict(weight=torch.nn.Parameter(torch.randn(4)), step=torch.tensor(3.0)),
        "types": [torch.zeros(2, dtype=d) for d in (torch.bfloat16, torch.half, torch.int64, torch.bool, torch.double)],
        "values": {"shape": torch.Size([2, 3]), "dtype": torch.bfloat16, "none": None, "device": torch.device("cpu")},
        "needs grad": {"x": torch.ones(2, requires_grad=True)},
        "sparse": {"s": torch.eye(3).to_sparse()},
        "expanded": {"e": torch.ones(1).expand(5)},
        "storage": {"raw": torch.ones(2).storage()},
        "empty": {},
    }


@pytest.mark.parametrize("kind", _contents())
@pytest.mark.parametrize("is_copied", [False, True], ids=["live", "copied"])
def test_as_torch_save_writes_it(kind: str, is_copied: bool, tmp_path):
    content = _contents()[kind]
    torch.save(content, tmp_path / "torch.pt")
    memory = LiveMemory()
    file = file_to_write("ours.pt", content, memory)
    written = write_files([file], tmp_path, _copied(memory) if is_copied else memory)
    expected, found = (torch.load(tmp_path / name, weights_only=False) for name in ("torch.pt", "ours.pt"))
    assert _same(expected, found)
    size = (tmp_path / "ours.pt").stat().st_size
    assert written["ours.pt"] == FileInfo(size, f"{_crc(tmp_path / 'ours.pt'):08x}")


def _crc(path: Path) -> int:
    import zlib

    return zlib.crc32(path.read_bytes())


def _same(one: object, other: object) -> bool:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor)
        is_same = (one.dtype, one.shape, one.requires_grad) == (other.dtype, other.shape, other.requires_grad)
        return is_same and torch.equal(one.to_dense(), other.to_dense())
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)  # type: ignore[index, call-overload]
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))  # type: ignore[arg-type, call-overload]
    if isinstance(one, torch.storage.TypedStorage):
        return one.tolist() == other.tolist()  # type: ignore[attr-defined]
    return one == other


def test_two_names_stay_one_tensor_and_take_its_room_once(tmp_path):
    memory = LiveMemory()
    write_files([file_to_write("x.pt", _contents()["two names"], memory)], tmp_path, memory)
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert found["embedding"].data_ptr() == found["head"].data_ptr() and len(memory.tensors) == 1


def _copied(live: LiveMemory) -> CopiedMemory:
    staging = StagingMemory()
    placed, rest = staging.begin_copy(live.tensors, ())
    assert rest is None
    return CopiedMemory(placed, np.frombuffer(staging._bytes.numpy().copy(), dtype=np.uint8))


def test_what_overlaps_is_copied_once():
    flat = torch.arange(1000, dtype=torch.float32)
    live = LiveMemory()
    for view in (flat[:400], flat[300:600], flat[900:], flat, flat[:0], torch.ones(3, dtype=torch.float64)):
        live.hold(view)
    assert 4000 + 24 <= bytes_to_copy(live.tensors) < 4000 + 24 + 128
    copied = _copied(live)
    for number, tensor in enumerate(live.tensors):
        assert np.array_equal(copied.array(number), tensor.numpy())


def test_what_stays_as_it_is_may_be_copied_later():
    """Only that, and only what is large."""
    large, small, other = torch.ones(1 << 19), torch.ones(100), torch.ones(1 << 19)
    live, staging = LiveMemory(), StagingMemory()
    for tensor in (large, small, other):
        live.hold(tensor)
    placed, rest = staging.begin_copy(live.tensors, {t.untyped_storage().data_ptr() for t in (large, small)})
    for tensor in (large, small, other):
        tensor.fill_(2.0)
    assert rest is not None
    rest()
    copied = CopiedMemory(placed, staging._bytes.numpy())
    assert [set(copied.array(number).tolist()) for number in range(3)] == [{2.0}, {1.0}, {1.0}]


def test_the_copy_is_aligned_as_the_tensors_are():
    """A view that begins in the middle of a buffer, after one of odd bytes."""
    live = LiveMemory()
    live.hold(torch.ones(3, dtype=torch.uint8))
    live.hold(torch.arange(64, dtype=torch.float64)[5:])
    live.hold(torch.ones(5, dtype=torch.bfloat16)[1:])
    copied = _copied(live)
    assert all(copied.values(n).start % t.element_size() == 0 for n, t in enumerate(live.tensors))


def _order(folder: Path, memory: StagingMemory, weight: torch.Tensor, share: float = 1.0) -> WriteOrder:
    live = LiveMemory()
    file = file_to_write("x.pt", {"weight": weight}, live)
    row = DigestRow("w", "fp32", tuple(weight.shape), live.hold(weight), whole_runs(weight.numel()), None, False)
    placed, _ = memory.begin_copy(live.tensors, ())
    return WriteOrder(folder, memory.num_bytes, (file,), (row,), placed, share)


def test_a_worker_writes_and_digests_what_was_copied(tmp_path):
    """Also after the memory has grown, which the worker maps anew; and loads nothing for it that it does not need."""
    memory = StagingMemory()
    worker = SaveWorker.start(memory.handle)
    try:
        for size in (1000, 3_000_000):
            weight = torch.randn(size)
            worker.send(_order(tmp_path, memory, weight))
            answer = worker.receive()
            assert answer.error == ""
            assert answer.digests[0].held == digest_tensor(weight, name="w", state="fp32")
            assert torch.equal(torch.load(tmp_path / "x.pt")["weight"], weight)
        if sys.platform == "linux":
            mapped = Path(f"/proc/{worker.pid}/maps").read_text()
            assert "torch" not in mapped and "numpy" in mapped
    finally:
        worker.close()


def test_a_worker_that_cannot_write_says_why(tmp_path):
    memory = StagingMemory()
    worker = SaveWorker.start(memory.handle)
    try:
        (tmp_path / "x.pt").mkdir()
        worker.send(_order(tmp_path, memory, torch.ones(3)))
        assert "IsADirectoryError" in worker.receive().error
        (tmp_path / "x.pt").rmdir()
        worker.send(_order(tmp_path, memory, torch.ones(3)))  # and goes on
        assert worker.receive().error == ""
    finally:
        worker.close()


def test_a_slow_worker_hurries_and_ends_with_its_parent(tmp_path):
    memory, weight = StagingMemory(), torch.randn(3_000_000)
    worker = SaveWorker.start(memory.handle)
    worker.send(_order(tmp_path, memory, weight, share=1e-5))
    assert not worker.has_answer(1.0)
    worker.hurry()
    assert worker.has_answer(30.0) and worker.receive() != Answer()
    worker.send(_order(tmp_path, memory, weight, share=1e-5))
    started = time.monotonic()
    worker.close()  # in the middle of it
    assert time.monotonic() - started < 9
    assert worker._process.returncode == 0 and not worker.is_running


def test_a_worker_that_was_killed_is_told(tmp_path):
    memory = StagingMemory()
    worker = SaveWorker.start(memory.handle)
    worker.send(_order(tmp_path, memory, torch.randn(3_000_000), share=1e-5))
    worker._process.kill()
    with pytest.raises(SaveWorkerError, match="is gone: signal 9"):
        worker.receive()
    with pytest.raises(SaveWorkerError, match="is gone"):
        worker.send(_order(tmp_path, memory, torch.ones(3)))
    worker.close()
