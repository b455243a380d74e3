"""Which topology a job takes on so many ranks: legal, with the same batch, as near to what was asked for as can be."""

import dataclasses
import itertools
import json
import random
from pathlib import Path

import pytest

from matrix.recording import command_line
from megatron.config.arguments import parse
from megatron.config.config import Config
from megatron.config.errors import ConfigError
from megatron.elastic.policy import Fitted, fit, read_table


def config(**flags) -> Config:
    return parse(command_line(Path("data"), data_path=None, mock_data=None, **flags)).config


@pytest.fixture(autouse=True)
def any_data(monkeypatch):
    """The files of the data set are not what this is about."""
    monkeypatch.setattr("megatron.config.run_checks.data_problems", lambda *args: iter(()))


def shape(fitted: Fitted) -> tuple[int, ...]:
    topology = fitted.config.parallel.topology(fitted.num_ranks)
    return fitted.num_ranks, topology.tp_size, topology.pp_size, topology.dp_size, fitted.config.run.micro_batch_size


CASES = [
    # asked for: tp, pp, micro batch, global batch; world; what is taken: ranks, tp, pp, dp, micro batch
    ((2, 1, 2, 12), 4, (4, 2, 1, 2, 2)),
    ((2, 1, 2, 12), 3, (3, 1, 1, 3, 2)),
    ((2, 1, 2, 12), 2, (2, 2, 1, 1, 2)),
    ((2, 1, 2, 12), 1, (1, 1, 1, 1, 2)),
    ((2, 1, 2, 12), 8, (8, 2, 1, 4, 1)),  # 12 = 4 x 3: the micro batch divides what is each one's
    ((2, 2, 1, 8), 8, (8, 2, 2, 2, 1)),
    ((2, 2, 1, 8), 4, (4, 2, 2, 1, 1)),
    ((2, 2, 1, 8), 2, (2, 2, 1, 1, 1)),  # tp is kept before pp
    ((2, 2, 1, 12), 6, (6, 2, 1, 3, 1)),  # pp goes before tp
    ((1, 4, 1, 12), 6, (6, 1, 3, 2, 1)),  # the next smaller that divides
    ((1, 1, 1, 8), 3, (2, 1, 1, 2, 1)),  # a batch of eight has no thirds: one stands by
    ((1, 1, 4, 8), 7, (4, 1, 1, 4, 2)),
    ((4, 1, 1, 8), 7, (6, 3, 1, 2, 1)),
]


@pytest.mark.parametrize(("asked", "world", "taken"), CASES)
def test_what_is_taken(asked, world, taken):
    tp, pp, micro, batch = asked
    fitted = fit(config(tp=tp, pp=pp, micro_batch=micro, global_batch_size=batch), world)
    assert shape(fitted) == taken
    told = fitted.told(world)
    assert f"{taken[0]} rank(s)" in told and (f"{world - taken[0]} of {world} standing by" in told) == (
        taken[0] < world
    )


def legal(base: Config, ranks: int, limit: tuple[int, int]) -> set[tuple[int, int]]:
    """(tp, pp) up to the limit that so many ranks can have, with any micro batch up to the one asked for: by trying."""
    found = set()
    for tp, pp, micro in itertools.product(
        range(1, limit[0] + 1), range(1, limit[1] + 1), range(1, base.run.micro_batch_size + 1)
    ):
        parallel = dataclasses.replace(base.parallel, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
        run = dataclasses.replace(base.run, micro_batch_size=micro)
        try:
            dataclasses.replace(base, parallel=parallel, run=run).validate(ranks)
        except ConfigError:
            continue
        found.add((tp, pp))
    return found


def test_held_against_trying_everything():
    random.seed(7)
    stood_by = 0
    for _ in range(150):
        tp, pp = random.choice([1, 2, 4]), random.choice([1, 2, 4])
        base = config(
            tp=tp, pp=pp, micro_batch=random.randint(1, 4), global_batch_size=random.choice([4, 6, 8, 12, 20])
        )
        world = random.randint(1, 9)
        fitted = fit(base, world)
        ranks, taken_tp, taken_pp, dp, micro = shape(fitted)
        assert fitted.config == fitted.config.validate(ranks)
        assert fitted.config.run.global_batch_size == base.run.global_batch_size
        assert base.run.global_batch_size % (dp * micro) == 0 and micro <= base.run.micro_batch_size
        assert not any(legal(base, more, (tp, pp)) for more in range(ranks + 1, world + 1)), "more could train"
        possible = legal(base, ranks, (tp, pp))
        assert (taken_tp, taken_pp) == max(possible), "a degree nearer to the one asked for was possible"
        stood_by += ranks < world
    assert stood_by > 10


def test_a_ramp_up_goes_into_the_ranks_too():
    ramped = config(
        global_batch_size=24, train_samples=1000, lr_decay_iters=None, lr_warmup_iters=None, lr_decay_samples=1000,
        iters=None, micro_batch=2,
    )  # fmt: skip
    flags = dataclasses.replace(ramped, run=dataclasses.replace(ramped.run, rampup_batch_size=(4, 4, 100)))
    assert shape(fit(flags, 3))[0] == 2, "the first batch of four has no thirds"
    assert shape(fit(flags, 4)) == (4, 1, 1, 4, 1)


def table(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "topologies.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_table_says_otherwise(tmp_path):
    rows = read_table(
        table(tmp_path, {"3": {"tp": 1, "pp": 3, "zero": 0, "micro_batch": 4}, "5": {"ranks": 4, "tp": 4}})
    )
    base = config(tp=2, micro_batch=2, global_batch_size=12, num_layers=6)
    assert shape(fit(base, 3, rows)) == (3, 1, 3, 1, 4) and fit(base, 3, rows).config.parallel.zero_stage == 0
    assert shape(fit(base, 5, rows)) == (4, 4, 1, 1, 2)
    assert shape(fit(base, 4, rows)) == (4, 2, 1, 2, 2)


def test_a_row_that_is_not_legal_is_an_error_and_not_passed_over(tmp_path):
    rows = read_table(table(tmp_path, {"3": {"tp": 2}}))
    with pytest.raises(ConfigError, match="not a multiple of tp x pp x sp"):
        fit(config(tp=2, global_batch_size=12), 3, rows)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "no object"),
        ({"three": {}}, "no world size"),
        ({"0": {}}, "no world size"),
        ({"²": {}}, "no world size"),
        ({"9" * 400: {}}, "no world size"),
        ({"3": []}, "list where an object is expected"),
        ({"3": {"dp": 3}}, "unknown: dp"),
        ({"3": {"tp": "2"}}, "tp is '2'"),
        ({"3": {"tp": True}}, "tp is True"),
        ({"3": {"tp": 0}}, "tp is 0"),
        ({"3": {"tp": 1.0}}, "tp is 1.0"),
        ({"3": {"tp": 10**30}}, "tp is 1000"),
        ({"3": {"zero": 4}}, "zero is 4"),
        ({"3": {"ranks": 4}}, "ranks is 4"),
    ],
)
def test_what_is_no_table_is_named(content, told, tmp_path):
    with pytest.raises(ConfigError, match=told):
        read_table(table(tmp_path, content))


def test_all_rows_are_named_at_once(tmp_path):
    with pytest.raises(ConfigError, match="2 problems"):
        read_table(table(tmp_path, {"3": {"dp": 1}, "x": {}}))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_table(tmp_path / "none.json")


def test_where_nothing_fits_the_reasons_are_those_of_the_flags():
    with pytest.raises(ConfigError, match="heads"):
        fit(config(num_attention_heads=3, hidden_size=32, global_batch_size=12), 3)
