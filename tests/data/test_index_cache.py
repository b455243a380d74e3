"""The cache of indices: many builders at once, damage, staleness."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from megatron.data import index_cache
from megatron.data.errors import IndexCacheError
from megatron.data.index_cache import cached_sample_index, index_key, open_index
from megatron.data.sample_index import build_sample_index

SIZES = np.random.RandomState(0).randint(1, 500, 300).astype(np.int32)
ARGUMENTS = (SIZES, (0, 250), 3000, 32, 9)

RACER = """
import sys, time, hashlib
import numpy as np
from megatron.data.index_cache import cached_sample_index
sizes = np.random.RandomState(0).randint(1, 500, 300).astype(np.int32)
print("ready", flush=True)
sys.stdin.readline()
index = cached_sample_index(sys.argv[1], "train", sizes, (0, 250), 3000, 32, 9)
arrays = (index.document_index, index.sample_index, index.shuffle_index)
print(hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest())
"""


def digest(index):
    arrays = (index.document_index, index.sample_index, index.shuffle_index)
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()


def files(folder):
    return sorted(p for p in folder.iterdir() if p.name != "build.lock")


@pytest.mark.parametrize("locks", ["file-locks", "no-file-locks"])
def test_several_processes_build_at_once(tmp_path, locks):
    # Without locks every process builds and renames: the result must be as good, only slower.
    no_locks = "import fcntl\ndef refuse(*_): raise OSError('no locks here')\nfcntl.flock = refuse\n"
    program = (no_locks if locks == "no-file-locks" else "") + RACER
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(5)
    ]
    assert [racer.stdout.readline().strip() for racer in racers] == ["ready"] * 5
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    results = {racer.communicate(timeout=60)[0].strip() for racer in racers}
    assert all(racer.returncode == 0 for racer in racers)
    assert results == {digest(build_sample_index(*ARGUMENTS))}
    assert len(files(tmp_path)) == 1


def test_second_time_is_read_not_built(tmp_path, monkeypatch):
    first = cached_sample_index(tmp_path, "train", *ARGUMENTS)

    def build(*_):
        raise AssertionError("built again")

    monkeypatch.setattr(index_cache, "build_sample_index", build)
    assert digest(cached_sample_index(tmp_path, "train", *ARGUMENTS)) == digest(first)


DAMAGES = {
    "cut": lambda data: data[:-100],
    "cut-in-header": lambda data: data[:40],
    "empty": lambda data: b"",
    "one-bit": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "other-file": lambda data: b"x" * len(data),
    "header": lambda data: data[:20] + b"\xff" + data[21:],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_mended(tmp_path, caplog, name):
    good = cached_sample_index(tmp_path, "train", *ARGUMENTS)
    expected, (path,) = digest(good), files(tmp_path)
    data = path.read_bytes()
    damaged = DAMAGES[name](data)
    assert damaged != data
    path.unlink()  # a new file: `good` still maps the old one
    path.write_bytes(damaged)
    with pytest.raises(IndexCacheError, match="damaged"):
        open_index(path, index_key(*ARGUMENTS))
    assert digest(cached_sample_index(tmp_path, "train", *ARGUMENTS)) == expected
    assert "building it again" in caplog.text and path.read_bytes() == data


def test_key_holds_everything_that_matters():
    changed = SIZES.copy()
    changed[249] += 1
    keys = [
        index_key(*ARGUMENTS),
        index_key(changed, *ARGUMENTS[1:]),
        index_key(SIZES, (1, 250), 3000, 32, 9),
        index_key(SIZES, (0, 249), 3000, 32, 9),
        index_key(SIZES, (0, 250), 3001, 32, 9),
        index_key(SIZES, (0, 250), 3000, 33, 9),
        index_key(SIZES, (0, 250), 3000, 32, 10),
    ]
    assert len(set(keys)) == len(keys)
    outside = SIZES.copy()
    outside[250] += 1
    assert index_key(outside, *ARGUMENTS[1:]) == keys[0]
