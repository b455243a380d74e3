"""The command line: upstream's scripts parse, mistakes are all named at once, nothing is ignored in silence."""

from __future__ import annotations

import re
import shlex

import pytest

from megatron.config.arguments import SECTIONS, build_parser, known_flags, parse
from megatron.config.errors import ConfigError
from megatron.config.flag import flag_fields
from megatron.config.flag_table import flag_table
from megatron.config.upstream_flags import ACCEPTED, REFUSED
from megatron.data.tokenizer import REFUSED as REFUSED_TOKENIZERS

REQUIRED = shlex.split("--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1")

# The options of the universal checkpointing artifact's first example (GPT 125M, PP2, fp16, ZeRO-1).
EX1 = shlex.split("""
    --tensor-model-parallel-size 1 --pipeline-model-parallel-size 2 --ds-sequence-parallel-size 1
    --num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 1024 --loss-scale 12
    --max-position-embeddings 1024 --micro-batch-size 2 --global-batch-size 4 --train-iters 100000
    --lr 6.0e-3 --min-lr 6.0e-4 --lr-decay-style cosine --log-interval 1 --eval-iters 40 --eval-interval 10
    --data-path data/gpt2_text_document --vocab-file data/gpt2-vocab.json --merge-file data/gpt2-merges.txt
    --save-interval 100 --split 98,2,0 --clip-grad 1.0 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95
    --init-method-std 0.006 --fp16 --checkpoint-activations --exit-interval 200 --save run --load run
    --make-vocab-size-divisible-by 256 --tensorboard-dir tb --universal-checkpoint
    --deepspeed --deepspeed_config=ds.json --zero-stage=1 --deepspeed-activation-checkpointing --local_rank=1
""")

# What public Megatron-DeepSpeed pretraining scripts add to that.
OTHERS = shlex.split("""
    --no-query-key-layer-scaling --attention-softmax-in-fp32 --DDP-impl local --no-masked-softmax-fusion
    --no-bias-gelu-fusion --no-bias-dropout-fusion --no-gradient-accumulation-fusion --use-flash-attn-v2
    --log-timers-to-tensorboard --log-batch-size-to-tensorboard --log-validation-ppl-to-tensorboard
    --tensorboard-queue-size 1 --num-workers 0 --data-impl mmap --distributed-backend nccl --repeated-dataloader
    --optimizer adam --override-opt_param-scheduler --no-load-lr-state --lr-warmup-iters 2
    --zero-reduce-scatter --contigious-checkpointing --synchronize-each-layer
    --no-async-tensor-model-parallel-allreduce --remote-device none --hidden-dropout 0 --attention-dropout 0
""")


def problems_of(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    return str(caught.value)


def test_artifact_command_line() -> None:
    result = parse(EX1)
    config = result.config
    assert (config.parallel.pipeline_model_parallel_size, config.parallel.zero_stage) == (2, 1)
    assert config.parallel.is_pipelined
    assert (config.model.num_layers, config.model.ffn_hidden_size, config.model.num_key_value_heads) == (12, 3072, 12)
    assert (config.model.recompute_granularity, config.model.init_method_std) == ("full", 0.006)
    assert (config.optimizer.precision, config.optimizer.loss_scale) == ("fp16", 12.0)
    assert (config.optimizer.lr, config.optimizer.min_lr) == (6e-3, 6e-4)
    assert config.data.tokenizer_type == "GPT2BPETokenizer"
    assert config.data.data_path == ("data/gpt2_text_document",)
    assert config.checkpoint.universal_checkpoint
    assert (config.run.local_rank, config.run.exit_interval, config.run.deepspeed_config) == (1, 200, "ds.json")
    assert config.train_iters == 100000
    assert [note.split()[0] for note in result.notes] == ["--deepspeed-activation-checkpointing"]


def test_flags_of_public_scripts_parse_with_a_note_each() -> None:
    notes = parse([*EX1, *OTHERS]).notes
    given = [word for word in OTHERS if word in ACCEPTED]
    assert len(given) >= 15
    for name in given:
        assert any(note.startswith(name) for note in notes), name


def test_upstream_defaults() -> None:
    config = parse(REQUIRED).config
    assert (config.model.hidden_dropout, config.model.attention_dropout) == (0.1, 0.1)
    assert (config.model.make_vocab_size_divisible_by, config.model.init_method_std) == (128, 0.02)
    assert (config.optimizer.lr_decay_style, config.optimizer.weight_decay) == ("linear", 0.01)
    assert (config.optimizer.adam_beta1, config.optimizer.adam_beta2, config.optimizer.adam_eps) == (0.9, 0.999, 1e-8)
    assert (config.optimizer.clip_grad, config.optimizer.initial_loss_scale) == (1.0, 2**32)
    assert (config.run.seed, config.run.log_interval, config.run.eval_iters, config.run.eval_interval) == (
        1234,
        100,
        100,
        1000,
    )
    assert config.data.split_weights == (969.0, 30.0, 1.0)
    assert config.run.distributed_backend == "nccl"


def test_every_mistake_is_named_at_once() -> None:
    text = problems_of("--num-layer", "2", "--hidden-size", "big", "--batch-size", "4", "--bf16", "--fp16")
    for part in (
        "unknown flag --num-layer",
        "did you mean --num-layers",
        "--hidden-size has a value",
        "big",
        "--batch-size is refused",
        "--bf16 and --fp16",
        "--micro-batch-size is missing",
        "--num-attention-heads is missing",
    ):
        assert part in text
    assert "9 problems" not in text and text.startswith("the configuration has 8 problems")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--tensor-parallel-size", "--tensor-model-parallel-size"),
        ("--micro-batchsize", "--micro-batch-size"),
        ("--zero_stage", "--zero-stage"),
        ("--universal-checkpoints", "--universal-checkpoint"),
        ("--untie-embeddings", "--untie-embeddings-and-output-weights"),
    ],
)
def test_unknown_flag_names_the_nearest(typed: str, meant: str) -> None:
    text = problems_of(*REQUIRED, typed, "2")
    assert f"unknown flag {typed}" in text
    assert meant in text
    assert "a value belongs to no flag" not in text


def test_a_stray_value_is_a_problem() -> None:
    assert "a value belongs to no flag" in problems_of(*REQUIRED, "--lr", "1e-3", "stray")


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_flag_says_why(name: str) -> None:
    upstream = REFUSED[name]
    text = problems_of(*REQUIRED, name, *(["7"] if upstream.nargs else []))
    assert f"{name} is refused: {upstream.reason}" in text
    assert len(upstream.reason) > 8


@pytest.mark.parametrize("name", sorted(ACCEPTED))
def test_accepted_flag_is_noted(name: str) -> None:
    upstream = ACCEPTED[name]
    notes = parse([*REQUIRED, name, *(["7"] if upstream.nargs else [])]).notes
    assert any(note.startswith(name) and upstream.reason in note for note in notes)


def test_refused_flag_with_a_harmless_value_passes() -> None:
    parse([*REQUIRED, "--remote-device", "none"])
    assert "--remote-device is refused" in problems_of(*REQUIRED, "--remote-device", "cpu")


def test_no_flag_is_declared_twice() -> None:
    names = known_flags()
    assert len(names) == len(set(names))
    assert len(names) > 250  # a floor: the tables were not emptied


def test_every_field_can_be_set_from_the_command_line() -> None:
    """Each flag changes its own field and no other: a planted mix-up of two names would show here."""
    special = {"--zero-stage": "1", "--split": "8,1,1"}
    base = parse([*REQUIRED, "--deepspeed"]).config
    for section, owner in SECTIONS.items():
        for spec in flag_fields(owner):
            for name in spec.names:
                if spec.is_required or name in ("--deepspeed", "--use-checkpoint-args"):  # it reads a checkpoint
                    continue
                argv = [*REQUIRED, "--deepspeed", name]
                if spec.type is not bool:
                    other = [c for c in spec.flag.choices if c != spec.default]
                    argv.append(special.get(name) or str(other[0] if other else 3))
                changed = getattr(parse(argv).config, section)
                assert getattr(changed, spec.name) != getattr(getattr(base, section), spec.name), name


def test_last_of_a_repeated_flag_wins() -> None:
    assert parse([*REQUIRED, "--lr", "1", "--lr", "2"]).config.optimizer.lr == 2.0


def test_two_names_of_a_field_must_agree() -> None:
    assert "contradict" in problems_of(*REQUIRED, "--encoder-seq-length", "64")
    assert "contradict" in problems_of(*REQUIRED, "--checkpoint-activations", "--recompute-granularity", "selective")
    parse([*REQUIRED, "--encoder-seq-length", "32"])


@pytest.mark.parametrize(("text", "value"), [("200", 200), ("2e2", 200), ("200.0", 200)])
def test_whole_numbers_as_scripts_write_them(text: str, value: int) -> None:
    assert parse([*REQUIRED, "--train-iters", text]).config.run.train_iters == value


def test_a_fraction_is_not_a_whole_number() -> None:
    assert "not a whole number" in problems_of(*REQUIRED, "--train-iters", "1.5")


def test_unknown_choice_lists_the_choices() -> None:
    text = problems_of(*REQUIRED, "--lr-decay-style", "cosin")
    assert "inverse-square-root" in text and "cosin" in text


def test_missing_value_is_a_config_error() -> None:
    assert "expected 1 argument" in problems_of(*REQUIRED, "--lr", "--bf16")


@pytest.mark.parametrize(
    ("argv", "is_pipelined", "note"),
    [
        (["--deepspeed"], True, None),
        (["--deepspeed", "--no-pipeline-parallel"], False, None),
        (["--deepspeed", "--zero-stage", "2"], False, "DeepSpeed's pipeline takes no ZeRO-2"),
        ([], False, "--deepspeed is not given"),
        (["--pipeline-model-parallel-size", "2"], True, "--deepspeed is not given"),
    ],
    ids=["deepspeed", "no-pipeline", "zero2", "no-deepspeed", "no-deepspeed-pp2"],
)
def test_which_model_is_built(argv: list[str], is_pipelined: bool, note: str | None) -> None:
    result = parse([*REQUIRED, *argv])
    assert result.config.parallel.is_pipelined == is_pipelined
    assert any(note in line for line in result.notes) if note else not result.notes


def test_zero_stage_comes_from_the_json_if_no_flag_gives_it(tmp_path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2}}')
    result = parse([*REQUIRED, "--deepspeed", "--deepspeed_config", str(path)])
    assert result.config.parallel.zero_stage == 2
    assert any("ZeRO stage 2 is taken from" in note for note in result.notes)
    kept = parse([*REQUIRED, "--deepspeed", "--deepspeed_config", str(path), "--zero-stage", "1"])
    assert kept.config.parallel.zero_stage == 1  # the contradiction is ds_config's to refuse


@pytest.mark.parametrize(
    ("flag", "condition"),
    [
        (["--topk", "2"], "--num-experts"),
        (["--loss-scale", "2"], "--fp16"),
        (["--sgd-momentum", "0.5"], "--optimizer sgd"),
        (["--rotary-percent", "0.5"], "--use-rotary-position-embeddings"),
        (["--save-interval", "5"], "--save"),
        (["--moe-min-capacity", "8"], "--moe-train-capacity-factor"),
        (
            ["--moe-train-capacity-factor", "1", "--disable-moe-token-dropping"],
            "token dropping (--disable-moe-token-dropping is given)",
        ),
        (["--rope-low-freq-factor", "2"], "--rope-scaling-type llama3"),
    ],
)
def test_flag_that_needs_another_is_noted(flag: list[str], condition: str) -> None:
    assert any(f"{flag[0]} has no effect without {condition}" == note for note in parse([*REQUIRED, *flag]).notes)


def test_help_lists_every_flag_that_sets_something() -> None:
    text = build_parser().format_help()
    for owner in SECTIONS.values():
        for spec in flag_fields(owner):
            assert all(name in text for name in spec.all_names)


def test_flag_table_names_every_flag_and_the_committed_one_is_current(request) -> None:
    table = flag_table()
    assert all(f"`{name}`" in table for name in known_flags())
    committed = request.config.rootpath / "docs" / "flags.md"
    assert committed.read_text() == table, "run: python -m megatron.config > docs/flags.md"


@pytest.mark.parametrize(("kind", "instead"), REFUSED_TOKENIZERS.items())
def test_a_tokenizer_of_megatrons_that_is_not_here_is_told_as_preprocessing_tells_it(kind: str, instead: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(instead)):
        parse([*REQUIRED, "--tokenizer-type", kind])
