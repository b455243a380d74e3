"""Do the files of one folder tell the same story? For folders without the checksums of a ucp.json.

Files of one save give equal answers to questions such as "how many ranks?" and "which step?". Where they
do not, most of them are taken to be right and the others are named; with no majority all are, by answer.

    require_one_save(folder, cache, list_files(folder), tp_size=2)
    # SourceError: c.pt: global_steps is 7, in 2 other files 5

What it cannot see: a file of another run that had the same shapes, configuration and step.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.ucp.affine_maps import AffineMaps
from megatron.ucp.errors import CorruptFileError, SourceError, listed
from megatron.ucp.sources.deepspeed_files import Files
from megatron.ucp.sources.optimizer_file import PARTITION_COUNT, OptimizerFile
from megatron.ucp.sources.source import FileCache

_CONFIGURED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
)
"""Of DeepSpeed's configuration. Not all of it: paths may well differ between machines."""


def require_one_save(folder: Path, cache: FileCache, files: Files, tp_size: int) -> None:
    """Raises SourceError with every file that tells another story, CorruptFileError for one that tells none."""
    answers: dict[str, dict[str, Any]] = {}
    models = set(files.models.values())
    for (_, mp_rank), path in (*files.models.items(), *files.zeros.items()):
        content, is_model = cache.load(path), path in models
        try:
            if is_model:
                answers[path.name] = model_answers(content, mp_rank, tp_size)
            else:
                answers[path.name] = optimizer_answers(content, OptimizerFile.open(cache, path), mp_rank)
        except (KeyError, TypeError, AttributeError) as error:
            raise CorruptFileError("not a file of DeepSpeed's", found=repr(error), where=path) from error
    if odd := disagreements(answers):
        raise SourceError(
            "the files are not of one save",
            found=odd,
            where=folder,
            do="bring together the files of one save of one run",
        )


def disagreements(answers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """`answers`: file -> question -> answer. One line per file, or per question without a majority."""
    lines = []
    for question in dict.fromkeys(question for said in answers.values() for question in said):
        files: dict[str, list[str]] = {}
        for file, said in answers.items():
            if question in said:
                files.setdefault(str(said[question]), []).append(file)
        if len(files) < 2:
            continue
        usual = max(files, key=lambda answer: len(files[answer]))
        num_usual = len(files[usual])
        if 2 * num_usual > sum(map(len, files.values())):
            lines += [
                f"{file}: {question} is {answer}, in {num_usual} other files {usual}"
                for answer, odd in files.items()
                if answer != usual
                for file in odd
            ]
        else:
            lines.append(f"{question}: " + "; ".join(f"{answer} in {listed(odd)}" for answer, odd in files.items()))
    return lines


def model_answers(content: Mapping[str, Any], mp_rank: int, tp_size: int) -> dict[str, Any]:
    """What a file of model states says of its save."""
    counters = ("global_steps", "global_samples", "skipped_steps", "iteration", "dp_world_size", "mp_world_size")
    tables = content.get("param_shapes") or []
    shapes = [[(name, tuple(shape)) for name, shape in table.items()] for table in tables]
    empty = _empty_somewhere(content)
    names = [[name for name, _ in table if name not in empty] for table in shapes]
    return {
        **_common_answers(content),
        **{key: content[key] for key in counters if isinstance(content.get(key), int)},
        f"the list of parameters of pipeline stage {mp_rank // tp_size}": _short(names),
        f"the table of shapes of mp_rank {mp_rank}": _short(shapes),
    }


def _empty_somewhere(content: Mapping[str, Any]) -> set[str]:
    """Parameters of which a tensor-parallel rank holds nothing, so that its file does not list them."""
    maps = AffineMaps.of(content.get("universal_checkpoint_info") or {})
    ranks = {rank for entry in maps.by_name.values() for rank in entry["ranks"]}
    return {name for rank in ranks for name in maps.empty_shards(rank)}


def optimizer_answers(content: Mapping[str, Any], file: OptimizerFile, mp_rank: int) -> dict[str, Any]:
    """What a file of optimizer states says of its save. `content`: all of it, `file`: what is inside."""
    steps = [float(state["step"]) for state in file.states() if state.get("step") is not None]
    values = [{key: str(value) for key, value in group.items() if key != "params"} for group in file.param_groups()]
    counts = file.partition_counts()
    return {
        **_common_answers({**file.content, **content}),
        "zero_stage": file.zero_stage,
        PARTITION_COUNT: sorted(set(counts)) if isinstance(counts, (list, tuple)) else [counts],
        "the optimizer's step": max(steps, default=None),
        f"the number of flat groups of mp_rank {mp_rank}": len(file.states()),
        f"the hyper-parameters of mp_rank {mp_rank}": _short(values),
    }


def _common_answers(content: Mapping[str, Any]) -> dict[str, Any]:
    config = content.get("ds_config")
    config = config if isinstance(config, Mapping) else {}
    return {
        **({"ds_version": content["ds_version"]} if content.get("ds_version") else {}),
        **{f"ds_config.{key}": json.dumps(config[key], default=str) for key in _CONFIGURED if key in config},
    }


def _short(value: list[Any]) -> str:
    """Long answers as their number and checksum."""
    crc = zlib.crc32(json.dumps(value, default=str).encode())
    return f"{sum(map(len, value))} entries with checksum {crc:08x}"
