"""Command lines: exit codes, text, JSON, and the import rule of the library."""

import argparse
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from ucp.synthetic import make_state, model, write_native

from megatron.ucp import cli
from megatron.ucp import verify as verify_module
from megatron.ucp.convert_command import convert_as_told, main
from megatron.ucp.disk_rates import Rates
from megatron.ucp.errors import OutputExistsError
from megatron.ucp.progress_line import ProgressLine
from megatron.ucp.topology import Topology

ROOT = Path(__file__).resolve().parents[2]
STATE = make_state(model(), seed=5)


@pytest.fixture
def native(tmp_path):
    write_native(tmp_path / "run/global_step5", STATE, Topology(tp_size=2, dp_size=2), 1)
    (tmp_path / "run/latest").write_text("global_step5")
    return tmp_path / "run/global_step5"


def ucp(capsys, *arguments):
    code = cli.main([str(a) for a in arguments])
    return code, capsys.readouterr()


def test_inspect(native, capsys):
    code, shown = ucp(capsys, "inspect", native.parent)
    assert code == 0
    for text in (
        "native, ZeRO-1",
        "tp2 pp1 dp2",
        "iteration   5",
        "embedding.word_embeddings.weight",
        "37x16",
        "shard_nc",
    ):
        assert text in shown.out
    code, shown = ucp(capsys, "inspect", native, "--json")
    assert json.loads(shown.out)["topology"]["tp_size"] == 2


def test_a_reader_that_has_seen_enough_is_no_error(native):
    """As `ucp inspect ... | head -1`, and of more than a pipe holds."""
    command = [sys.executable, "-m", "megatron.ucp", "inspect", str(native), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0


def test_convert_verify_diff_plan(native, capsys):
    output = native.parent / "u"
    assert ucp(capsys, "convert", native, output, "--json")[0] == 0
    for folder in (native, output):
        code, shown = ucp(capsys, "verify", folder)
        assert code == 0 and "sound" in shown.out and "NOT" not in shown.out
    code, shown = ucp(capsys, "diff", native, output, "--full")
    assert code == 0 and "equal" in shown.out
    code, shown = ucp(capsys, "plan", native, "--dp", 3, "--json")
    assert code == 0 and len(json.loads(shown.out)["ranks"]) == 3


def test_plan_predicts_what_the_disk_takes(native, capsys, monkeypatch):
    code, shown = ucp(capsys, "plan", native, "--dp", 4, "--json", "--bandwidth", "2KB/s", "--nodes", 2)
    said = json.loads(shown.out)
    states = sum(4 * tensor.numel() for states in STATE.values() for tensor in states.values())
    saved = sum(path.stat().st_size for path in native.iterdir() if path.name != "ucp.json")
    ranks = [rank["num_bytes"] for rank in said["ranks"]]
    assert code == 0 and said["predicted_seconds"] == pytest.approx(
        {"save": saved / 4e3, "convert": (saved + states) / 4e3, "load": max(sum(ranks[:2]), sum(ranks[2:])) / 2e3}
    )
    code, shown = ucp(capsys, "plan", native, "--bandwidth", "5GB/s")
    assert code == 0 and "predicted for 1 node(s) of 5 GB/s: save 0.0 s" in shown.out
    asked = []
    monkeypatch.setattr(cli, "measured_rates", lambda *given: asked.append(given) or Rates(1e3, 2e3, 4e3))
    code, shown = ucp(capsys, "plan", native, "--dp", 4, "--bandwidth", "measured", "--json")
    said = json.loads(shown.out)
    assert asked == [(native.parent, min(4, len(os.sched_getaffinity(0))), 1 << 28)]
    assert said["rates"] == {"save": 1e3, "convert": 2e3, "load": 4e3}
    assert code == 0 and said["predicted_seconds"] == pytest.approx(
        {"save": saved / 1e3, "convert": (saved + states) / 2e3, "load": sum(ranks) / 4e3}
    )
    code, shown = ucp(capsys, "plan", native, "--bandwidth", "measured")
    assert "1 node(s) of 0.00 GB/s of save, 0.00 GB/s of convert, 0.00 GB/s of load: save " in shown.out
    for wrong in ("5", "5 GB", "0GB/s", "-1GB/s", "fast"):
        with pytest.raises(SystemExit):
            cli.main(["plan", str(native), f"--bandwidth={wrong}"])


def test_latest_names_the_newest(native, capsys):
    code, shown = ucp(capsys, "latest", native.parent)
    assert code == 0 and shown.out == f"{native}\n"
    code, shown = ucp(capsys, "latest", native.parent, "--json")
    assert json.loads(shown.out) == {"folder": str(native), "passed_over": []}
    (native.parent / "latest").write_text("global_step7")
    code, shown = ucp(capsys, "latest", native.parent)
    assert (code, shown.out) == (0, f"{native}\n")  # which a resume would take, and why
    assert shown.err == "latest names global_step7, which is not there\n"


def test_a_quick_look_reads_no_data_and_says_so(native, capsys, monkeypatch):
    with monkeypatch.context() as patch:

        def refuse(*args):
            raise AssertionError("it reads")

        patch.setattr(verify_module, "chunks", refuse)
        patch.setattr(verify_module, "file_faults", refuse)
        code, shown = ucp(capsys, "verify", native, "--quick")
    assert code == 0 and "unverified: only looked at quickly" in shown.out and "digest" not in shown.out
    victim = native / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = victim.read_bytes()
    victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert ucp(capsys, "verify", native, "--quick")[0] == 0 and ucp(capsys, "verify", native)[0] == 1
    victim.write_bytes(content[:-1])
    code, shown = ucp(capsys, "verify", native, "--quick")
    assert code == 1 and victim.name in shown.out
    victim.unlink()
    code, shown = ucp(capsys, "verify", native, "--quick", "--json")
    assert code == 1 and victim.name in " ".join(json.loads(shown.out)["findings"])


def test_not_sound_and_not_equal_are_1(native, tmp_path, capsys):
    other = {n: {s: t.clone() for s, t in states.items()} for n, states in STATE.items()}
    other["final_norm.weight"]["fp32"][1] += 0.5
    write_native(tmp_path / "other", other, Topology(), 2)
    code, shown = ucp(capsys, "diff", native, tmp_path / "other")
    assert code == 1 and "final_norm.weight  fp32" in shown.out and "5.000e-01" in shown.out
    (native / "mp_rank_00_model_states.pt").unlink()
    code, shown = ucp(capsys, "verify", native, "--json")
    assert code == 1 and not json.loads(shown.out)["is_sound"]
    code, shown = ucp(capsys, "verify", native)
    assert code == 1 and "NOT sound" in shown.out and "carries no digests" not in shown.out


def test_usage_is_2(tmp_path, capsys):
    assert ucp(capsys, "verify", tmp_path)[0] == 2
    for arguments in ([], ["verify"], ["frobnicate", "x"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2


def test_tool_takes_deepspeeds_namespace(native, capsys):
    arguments = argparse.Namespace(
        input_folder=str(native),
        output_folder=str(native.parent / "u"),
        num_extract_workers=2,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    assert main(arguments) == 0
    assert "state digest" in capsys.readouterr().out
    assert main(arguments) == 1
    assert "already there" in capsys.readouterr().err


class _Slots:
    __slots__ = ("input_folder", "output_folder")

    def __init__(self, input_folder, output_folder):
        self.input_folder, self.output_folder = input_folder, output_folder


@pytest.mark.parametrize("kind", [types.SimpleNamespace, dict, _Slots])
def test_arguments_of_any_kind_and_a_function_that_raises(kind, native, capsys):
    arguments = kind(input_folder=str(native), output_folder=str(native.parent / "u"))
    assert convert_as_told(arguments).output == native.parent / "u"
    with pytest.raises(OutputExistsError, match="already there"):
        convert_as_told(arguments)
    assert main(arguments) == 1 and "already there" in capsys.readouterr().err


def test_arguments_without_a_folder_are_named():
    with pytest.raises(TypeError, match="lack output_folder"):
        convert_as_told(types.SimpleNamespace(input_folder="a"))


def test_tool_and_module_run_as_programs(native):
    tool = [sys.executable, ROOT / "tools/ds_to_universal.py"]
    done = subprocess.run(
        [*tool, "--input_folder", native.parent, "--output_folder", native.parent / "u", "--num_workers", "1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "converting its latest one" in done.stdout, done.stderr
    done = subprocess.run([sys.executable, "-m", "megatron.ucp", "verify", native.parent / "u"], cwd=ROOT)
    assert done.returncode == 0


def test_importing_the_library_imports_no_deepspeed_and_nothing_else_of_ours():
    code = (
        "import sys, megatron.ucp, megatron.ucp.cli; "
        "bad = [m for m in sys.modules if m.split('.')[0] == 'deepspeed' or "
        "m.startswith('megatron.') and not m.startswith('megatron.ucp')]; sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Terminal:
    def __init__(self, is_terminal):
        self.text, self.is_terminal = "", is_terminal

    def isatty(self):
        return self.is_terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_progress_on_a_terminal_and_in_a_log():
    terminal, log = Terminal(True), Terminal(False)
    for stream in (terminal, log):
        line = ProgressLine(stream)
        line._shown -= 60
        line(1 << 20, 4 << 20)
        line(4 << 20, 4 << 20)
    assert "\r" in terminal.text and "100%" in terminal.text and "4.00M/4.00M" in terminal.text
    assert terminal.text.endswith("\n")
    assert log.text.count("\n") == 1 and "\r" not in log.text
    assert log.text.startswith("1 / 4 MiB") and "s left" in log.text


def test_state_is_made_of_different_tensors():
    """The truth these tests compare with is not trivially equal to itself."""
    tensors = [t for states in STATE.values() for t in states.values() if t.numel() > 8]
    assert all(not torch.equal(a.flatten()[:8], b.flatten()[:8]) for a, b in zip(tensors, tensors[1:]))
