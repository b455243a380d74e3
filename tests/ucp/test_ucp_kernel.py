"""The compiled kernel gives the bits that zlib, zipfile, numpy and the Python versions give, and fails as they fail."""

import errno
import io
import os
import random
import resource
import types
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from ucp.synthetic import make_state, model, write_native

from megatron.ucp import crc32 as crc32_module
from megatron.ucp import execute, native, output_file, zip_layout
from megatron.ucp.commit import checksum_file
from megatron.ucp.convert import convert
from megatron.ucp.digest import digest_tensor, seeds
from megatron.ucp.errors import CorruptFileError, DigestMismatchError, NotEnoughSpaceError
from megatron.ucp.output_file import PlainOutput, SummedFile, open_output
from megatron.ucp.partial_sums import PartialSums
from megatron.ucp.stored import FLOAT32
from megatron.ucp.topology import Topology
from megatron.ucp.torch_file import Record, StreamedTensor, save_streamed
from megatron.ucp.verify import verify
from megatron.ucp.zip_layout import Entry, central_directory, local_header

pytestmark = pytest.mark.skipif(native.kernel is None, reason="installed without a compiler: there is no kernel")

BUFFER, BLOCK, LARGE = 4 << 20, 4096, 64 << 10
"""Of kernel.cpp: where it does something else than before."""


def test_a_kernel_of_other_sources_is_not_used():
    """Whoever takes new sources and builds nothing has the old one."""
    assert native.usable(native.kernel) is native.kernel
    for old in (types.ModuleType("old"), types.SimpleNamespace(VERSION=native.VERSION + 1)):
        with pytest.warns(UserWarning, match="make install"):
            assert native.usable(old) is None


@pytest.mark.parametrize("function", ["crc32", "crc32_by_folding", "crc32_by_table"])
def test_crc32_is_zlibs(function):
    random.seed(0)
    for size in (*range(700), 1000, 4096, 65535, 65536, 65537, 1 << 20):
        content, start = random.randbytes(size), random.getrandbits(32)
        assert getattr(native.kernel, function)(content, start) == zlib.crc32(content, start), size


def test_joined_crcs_are_those_of_the_whole(monkeypatch):
    random.seed(1)
    first, second = random.randbytes(1000), random.randbytes(77777)
    for _ in range(2):  # the kernel's, then Python's
        joined = crc32_module.crc32_join(zlib.crc32(first), zlib.crc32(second), len(second))
        assert joined == zlib.crc32(first + second)
        assert crc32_module.crc32_join(zlib.crc32(first), 0, 0) == zlib.crc32(first)
        monkeypatch.setattr(native, "kernel", None)


# -- the writer ------------------------------------------------------------------------------------------------------

SIZES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, LARGE * 2 - 1, LARGE * 2, BUFFER - 1, BUFFER, BUFFER + 1, 2 * BUFFER + 5]


@pytest.mark.parametrize("size", SIZES)
def test_the_writer_writes_what_the_plain_one_writes(size, tmp_path):
    content = random.Random(size).randbytes(size)
    patches = {(p if p >= 0 else size + p): bytes([i]) * 4 for i, p in enumerate((0, 14, 4093, 5000, BUFFER - 2, -4))}
    patches = {p: value for p, value in patches.items() if 0 <= p <= size - 4}
    for name, make in (("plain", PlainOutput), ("native", open_output)):
        file = make(tmp_path / name)
        for start in range(0, size, 777_777):
            file.write(content[start : start + 777_777])
        assert file.position == size
        for position, value in patches.items():
            file.patch(position, value)
        assert file.close() == size
    assert isinstance(open_output(tmp_path / "other"), native.kernel.Writer)
    written = (tmp_path / "native").read_bytes()
    assert written == (tmp_path / "plain").read_bytes()
    expected = bytearray(content)
    for position, value in patches.items():
        expected[position : position + 4] = value
    assert written == bytes(expected)


def test_an_older_longer_file_is_replaced_whole(tmp_path):
    (tmp_path / "f").write_bytes(bytes(3 * BUFFER))
    file = open_output(tmp_path / "f")
    file.write(b"short")
    file.close()
    assert (tmp_path / "f").read_bytes() == b"short"


def test_two_files_at_once_keep_apart(tmp_path):
    files = [open_output(tmp_path / str(i)) for i in range(3)]
    for _ in range(5):
        for i, file in enumerate(files):
            file.write(bytes([i]) * 1_000_003)
    for i, file in enumerate(files):
        file.close()
        assert (tmp_path / str(i)).read_bytes() == bytes([i]) * 5_000_015


@pytest.mark.parametrize("make", [PlainOutput, open_output])
def test_what_the_disk_does_not_take_is_an_error_with_its_reason(make, tmp_path):
    def write() -> None:
        file = make(tmp_path / "f")
        try:
            for _ in range(40):
                file.write(bytes(1 << 18))
            file.close()
        finally:
            file.abandon()

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            write()
        assert caught.value.errno == errno.EFBIG
        with pytest.raises(NotEnoughSpaceError, match="no file may be longer"):
            save_streamed({"x": torch.zeros(4 << 20)}, tmp_path / "x.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(OSError) as caught:
        make(tmp_path / "no such folder/f")
    assert caught.value.errno == errno.ENOENT


def test_a_file_system_without_direct_writes_is_written_all_the_same(tmp_path):
    shared = Path("/dev/shm")
    if not shared.is_dir():
        pytest.skip("no tmpfs here")
    path = shared / f"ucp-test-{os.getpid()}"
    try:
        file = open_output(path)
        content = random.Random(0).randbytes(BUFFER + 100)
        file.write(content)
        file.patch(10, b"abcd")
        file.close()
        assert path.read_bytes() == content[:10] + b"abcd" + content[14:]
    finally:
        path.unlink(missing_ok=True)


def test_a_summed_file_has_the_sum_of_what_is_in_it(tmp_path, monkeypatch):
    content = {"a": torch.arange(3_000_000.0), "b": [torch.ones(7), "text"]}
    for number in range(2):  # the kernel's, then Python's
        path = tmp_path / str(number)
        with SummedFile(path) as file:
            torch.save(content, file)
        assert file.info == checksum_file(path)
        assert torch.equal(torch.load(path, weights_only=True, mmap=True)["a"], content["a"])
        monkeypatch.setattr(native, "kernel", None)
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
    with pytest.raises(KeyError), SummedFile(tmp_path / "2"):
        raise KeyError


# -- one pass from files into a file ---------------------------------------------------------------------------------


def pieces_of(values: np.ndarray, lengths: list[int], folder: Path) -> tuple[list[Path], np.ndarray]:
    """Values dealt to three files in pieces of these lengths by turns, each piece behind 8 bytes of something else."""
    contents, rows, start = [bytearray() for _ in range(3)], [], 0
    while start < len(values):
        for turn, length in enumerate(lengths):
            part = values[start : start + length]
            content = contents[turn % 3]
            content += b"--------"
            rows.append((turn % 3, len(content), part.nbytes))
            content += part.tobytes()
            start += length
    paths = [folder / f"source{i}" for i in range(3)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths, np.array([row for row in rows if row[2]], dtype=np.int64)


LENGTHS = [[1], [3, 5, 1000], [LARGE // 4], [LARGE // 4 - 1, 2], [40_000, 10, 300_000], [2_500_000, 7]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_what_is_gathered_is_digested_summed_and_written(lengths, tmp_path):
    numel = min(3_000_000, 3_000 * sum(lengths))
    values = np.random.default_rng(0).standard_normal(numel).astype(np.float32)
    paths, rows = pieces_of(values, lengths, tmp_path)
    output = open_output(tmp_path / "out")
    output.write(b"head")
    record = Record(output, FLOAT32)
    handles = [os.open(path, os.O_RDONLY) for path in paths]
    half = len(rows) // 2
    index = int(rows[:half, 2].sum()) // 4
    lanes = seeds("w", "fp32", (numel,))
    sums, digest = PartialSums(), None
    for part, first in ((rows[:half], 0), (rows[half:], index)):
        of_part, crcs = record.gather(handles, part, first, lanes)
        digest = of_part if digest is None else digest + of_part
        sums.add(paths, part, crcs)
        for (file, start, size), crc in zip(part.tolist(), crcs.tolist(), strict=True):
            held = paths[file].read_bytes()[start : start + size] if len(rows) < 1000 else None
            assert crc == -1 if size < LARGE else held is None or crc == zlib.crc32(held)
    output.close()
    assert (tmp_path / "out").read_bytes() == b"head" + values.tobytes()
    assert digest == digest_tensor(torch.from_numpy(values), name="w", state="fp32")
    assert record.crc == zlib.crc32(values.tobytes()) and record.num_bytes == values.nbytes
    for path in paths:
        with open(path, "rb") as file:
            assert sums.checksum_of(path, file) == checksum_file(path)
    for handle in handles:
        os.close(handle)


def test_stretches_that_were_read_twice_count_once_in_a_files_sum(tmp_path):
    path = tmp_path / "f"
    content = random.Random(2).randbytes(500_000)
    path.write_bytes(content)
    sums = PartialSums()
    rows = np.array([[0, 1000, 100_000], [0, 50_000, 100_000], [0, 1000, 100_000], [0, 300_000, 200_000]])
    crcs = np.array([zlib.crc32(content[start : start + size]) for _, start, size in rows.tolist()])
    sums.add([path], rows, crcs)
    with open(path, "rb") as file:
        assert sums.checksum_of(path, file) == checksum_file(path)
    # A stretch that was other bytes when it was read is seen, though the file is right again.
    wrong = PartialSums()
    wrong.add([path], rows[3:], crcs[3:] ^ 1)
    with open(path, "rb") as file:
        assert wrong.checksum_of(path, file) != checksum_file(path)


def test_a_source_that_ends_too_early_is_named_and_does_not_kill(tmp_path, monkeypatch):
    write_native(tmp_path / "n", make_state(model()), Topology(dp_size=2), 1)
    victim = tmp_path / "n/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    size = victim.stat().st_size
    rows = execute._rows

    def cut_before_reading(*args):
        os.truncate(victim, 100)
        return rows(*args)

    monkeypatch.setattr(execute, "_rows", cut_before_reading)
    with pytest.raises(CorruptFileError, match="became shorter|claims more|bytes") as caught:
        convert(tmp_path / "n", tmp_path / "u")
    assert victim.name in str(caught.value) and size > 100
    assert not (tmp_path / "u").exists()


DP2, TP2 = Topology(dp_size=2), Topology(tp_size=2)
CASES = [(DP2, 0), (DP2, 1), (DP2, 3), (TP2, 0), (TP2, 1), (Topology(tp_size=2, dp_size=2), 1)]


@pytest.mark.parametrize(("topology", "zero_stage"), CASES, ids=str)
def test_with_and_without_the_kernel_a_conversion_writes_the_same_bytes(topology, zero_stage, tmp_path, monkeypatch):
    write_native(tmp_path / "n", make_state(model()), topology, zero_stage)
    convert(tmp_path / "n", tmp_path / "native")
    monkeypatch.setattr(native, "kernel", None)
    convert(tmp_path / "n", tmp_path / "plain")
    folders = [tmp_path / name for name in ("native", "plain")]
    contents = [{p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders]
    assert contents[0] == contents[1] and len(contents[0]) > 20
    assert verify(folders[0]).is_sound


def test_one_pass_is_taken_where_values_are_copied_as_they_lie(tmp_path, monkeypatch):
    """Else the comparison above would hold Python against itself."""
    gathered, gather = [], Record.gather
    monkeypatch.setattr(Record, "gather", lambda self, *args: gathered.append(1) or gather(self, *args))
    write_native(tmp_path / "n", make_state(model()), Topology(dp_size=3), 1)
    manifest = convert(tmp_path / "n", tmp_path / "u").manifest
    assert len(gathered) == sum(len(info.states) for info in manifest.parameters.values() if info.layout.numel)


def test_a_pass_that_mixes_up_two_bytes_is_found_by_the_digest(tmp_path, monkeypatch):
    gather = Record.gather

    def wrong(self, handles, rows, *rest):
        rows = rows.copy()
        rows[0, 1] += 4 if len(rows) == 1 and rows[0, 2] > 64 else 0
        return gather(self, handles, rows, *rest)

    write_native(tmp_path / "n", make_state(model()), Topology(), 1)
    monkeypatch.setattr(Record, "gather", wrong)
    with pytest.raises(DigestMismatchError):
        convert(tmp_path / "n", tmp_path / "u")


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_tensors_that_are_not_their_elements_are_written_as_torch_writes_them(tmp_path):
    shared = torch.arange(6).to(torch.uint16)
    content = {
        "float8": torch.arange(5.0).to(torch.float8_e4m3fn),
        "unsigned": [shared, shared[2:5], shared.view(2, 3).t()],
        "sparse": torch.eye(3).to_sparse(),
        "rows": torch.eye(3).to_sparse_csr(),
        "meta": torch.ones(3, device="meta"),
        "beside": torch.ones(3),
        "endless": torch.arange(2.0)[1:].expand(1 << 40),
        "endless bytes": torch.ones(1).to(torch.float8_e4m3fn).expand(1 << 40),
    }
    info = save_streamed(content, tmp_path / "x.pt")
    assert info == checksum_file(tmp_path / "x.pt")
    torch.save(content, tmp_path / "y.pt")
    ours, theirs = (torch.load(tmp_path / name, weights_only=True) for name in ("x.pt", "y.pt"))
    assert ours["float8"].dtype == torch.float8_e4m3fn and torch.equal(ours["float8"].float(), theirs["float8"].float())
    for one, other in zip(ours["unsigned"], theirs["unsigned"], strict=True):
        assert one.dtype == torch.uint16 and torch.equal(one.int(), other.int()) and one.stride() == other.stride()
    assert len({tensor.untyped_storage().data_ptr() for tensor in ours["unsigned"]}) == 1
    for kind in ("sparse", "rows"):
        assert ours[kind].layout == theirs[kind].layout and torch.equal(ours[kind].to_dense(), theirs[kind].to_dense())
    for kind in ("endless", "endless bytes"):
        assert ours[kind].shape == theirs[kind].shape and float(ours[kind][7]) == float(theirs[kind][7]) == 1
    assert info.bytes < 8192
    assert ours["meta"].is_meta and torch.equal(ours["beside"], theirs["beside"])


# -- the zip around it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [(1 << 31) - 1, 1000], ids=["small", "zip64"])
def test_the_zip_is_byte_for_byte_what_zipfile_writes(limit, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    monkeypatch.setattr(zip_layout, "ZIP64_LIMIT", limit)
    contents = [("a/data.pkl", b"x" * 10, b""), ("a/data/0", b"y" * 3000, b"FB\3\0ZZZ"), ("a/ä", b"z" * 5, b"")]
    contents += [("a/data/1", b"", b"FB\0\0"), ("a/data/2", b"w" * 1001, b"FB\1\0Z")]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content, extra in contents:
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.extra, info.file_size = extra, len(content)
            with file.open(info, "w", force_zip64=len(content) > limit) as record:
                record.write(content)
    ours, entries = b"", []
    for name, content, extra in contents:
        entry = Entry(name, len(ours), len(content), zlib.crc32(content), extra)
        entries.append(entry)
        ours += local_header(entry) + content
    ours += central_directory(entries, len(ours))
    assert ours == buffer.getvalue()
    assert zipfile.ZipFile(io.BytesIO(ours)).testzip() is None


def test_a_large_archive_of_several_tensors_is_the_same_in_both_writers(tmp_path, monkeypatch):
    """Headers beyond the first buffer are filled in later."""

    def content() -> dict:
        def write(record: Record) -> None:
            for start in range(0, 1_500_000, 999):
                record.write(np.arange(start, min(start + 999, 1_500_000), dtype=np.float32))

        return {str(i): StreamedTensor((1_500_000,), FLOAT32, write) for i in range(3)}

    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    info = save_streamed(content(), tmp_path / "a/x.pt")
    assert info == checksum_file(tmp_path / "a/x.pt")
    monkeypatch.setattr(native, "kernel", None)
    assert save_streamed(content(), tmp_path / "b/x.pt") == info
    assert (tmp_path / "a/x.pt").read_bytes() == (tmp_path / "b/x.pt").read_bytes()
    assert isinstance(output_file.open_output(tmp_path / "c"), PlainOutput)
    assert torch.equal(torch.load(tmp_path / "a/x.pt", weights_only=True)["2"], torch.arange(1_500_000.0))
