"""Save a live engine as a native checkpoint; place a Source of any topology into a live engine.

    checkpointer = Checkpointer(engine, context, atlas, streams, schedule, description)
    checkpointer.save(Path("runs/source"), progress)       # DeepSpeed's own files + ucp.json, committed by rename
    progress = checkpointer.load(plan)                     # native, direct or universal: one path for all

Saving: every rank writes what it owns under a temporary name; digests are taken from the live state; files are
checksummed and synced; ucp.json is the last file; then one rename, then the pointer. A crash at any moment leaves
the previous checkpoint and its pointer as they were.

Loading never calls DeepSpeed's load_checkpoint: each rank reads the intervals it keeps and writes them into the
optimizer's own tensors; the digest of what then stands in the engine is held against the one in the Source.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import safetensors.torch
import torch
import torch.distributed as dist

import megatron
from megatron.parallel.context import ParallelContext
from megatron.parallel.rng import RandomStreams
from megatron.training.engine_state import EngineState, OwnedInterval
from megatron.training.progress import Progress
from megatron.training.resume import LATEST, ResumePlan
from megatron.training.schedule import LearningRateSchedule
from megatron.training.state_digest import MASTER, state_digests
from megatron.ucp import commit
from megatron.ucp.deepspeed_compat import universal_checkpoint_info
from megatron.ucp.digest import total
from megatron.ucp.execute import gather
from megatron.ucp.layout import Layout
from megatron.ucp.manifest import FileInfo, Manifest, OptimizerInfo, ParameterInfo, write_manifest
from megatron.ucp.sources import Source, open_source

log = logging.getLogger(__name__)

RNG_FILE = "rng_state.safetensors"
LATEST_ITERATION = "latest_checkpointed_iteration.txt"
"""Megatron's own pointer, kept for scripts that read it."""

LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class CheckpointError(RuntimeError):
    """A save or a load failed; the message says on which ranks and why. Raised on every rank."""


class SourceMismatchError(CheckpointError):
    """The Source is of another model, or lacks what this run needs."""


@dataclass(frozen=True)
class Atlas:
    """The whole model's parameters, the same on every rank: how each is cut and which stages hold it."""

    layouts: Mapping[str, Layout]
    pp_stages: Mapping[str, tuple[int, ...]]

    @classmethod
    def gather(cls, layouts: Mapping[str, Layout], context: ParallelContext) -> Atlas:
        """From this stage's layouts. Collective over the world."""
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, (context.pp_rank, dict(layouts)))
        merged: dict[str, Layout] = {}
        stages: dict[str, set[int]] = {}
        for stage, of_stage in everywhere:
            for name, layout in of_stage.items():
                if merged.setdefault(name, layout) != layout:
                    raise CheckpointError(f"stages declare different layouts of {name}: {merged[name]} and {layout}")
                stages.setdefault(name, set()).add(stage)
        names = sorted(merged)
        return cls({n: merged[n] for n in names}, {n: tuple(sorted(stages[n])) for n in names})


@dataclass(frozen=True)
class LoadOptions:
    """Megatron's --finetune and --no-load-*."""

    with_optimizer: bool = True
    with_schedule: bool = True
    with_rng: bool = True
    with_progress: bool = True


class Checkpointer:
    """Saves and loads one engine. Methods are collective over the world unless they say otherwise."""

    def __init__(
        self,
        engine: Any,
        context: ParallelContext,
        layouts: Mapping[str, Layout],
        streams: RandomStreams,
        schedule: LearningRateSchedule,
        model: Mapping[str, Any],
        train_order: Mapping[str, Any],
        padded_vocab_size: int,
    ) -> None:
        """`layouts` is this stage's; `model` is what a Source must agree on (ModelConfig as plain values);
        `train_order` says which samples come in which order (`Batches.train_order`): a Source's other one is told."""
        self.engine = engine
        self.context = context
        self.streams = streams
        self.schedule = schedule
        self.model = dict(model)
        self.train_order = dict(train_order)
        self.atlas = Atlas.gather(layouts, context)
        self.state = EngineState(engine, self.atlas.layouts, context, self.atlas.pp_stages)
        # Where DeepSpeed's own converter looks for it (engine._save_checkpoint).
        engine.module.universal_checkpoint_info = universal_checkpoint_info(
            self.atlas.layouts,
            tp_size=context.tp_size,
            padded_vocab_size=padded_vocab_size,
            tied=[name for name, stages in self.atlas.pp_stages.items() if len(stages) > 1],
        )

    # -- save ---------------------------------------------------------------------------------------------------

    def save(self, folder: Path, progress: Progress) -> Path:
        """Write `folder`/global_step<iteration> and point `latest` to it. Returns the checkpoint's folder."""
        started = time.perf_counter()
        final = folder / f"global_step{progress.iteration}"
        # A fresh optimizer (saved before its first step) has no states yet; DeepSpeed would save none.
        self.state.make_states()
        digests = state_digests(self.state)
        with _all_ranks_or_none("saving", final):
            staging = _on_rank_0(lambda: commit.stage(final, replace=True))
        with _all_ranks_or_none("saving", final):
            self.engine.save_checkpoint(
                str(folder),
                tag=staging.name,
                client_state={"iteration": progress.iteration, **dataclasses.asdict(progress)},
                save_latest=False,
            )
            self._save_rng(staging)
        with _all_ranks_or_none("checksumming", final):
            files = self._file_table(staging)
            manifest = self._manifest(progress, digests, files)
        with _all_ranks_or_none("committing", final):
            _on_rank_0(lambda: self._commit(staging, final, manifest))
        num_bytes = sum(entry.bytes for entry in files.values())
        seconds = time.perf_counter() - started
        log.info(
            "saved %s: %.1f MiB in %.2f s (%.2f GiB/s), state digest %s",
            final, num_bytes / 2**20, seconds, num_bytes / 2**30 / seconds, total(digests),
        )  # fmt: skip
        return final

    def _commit(self, staging: Path, final: Path, manifest: Manifest) -> None:
        write_manifest(staging, manifest)
        commit.commit(staging, final, replace=True)
        commit.point_to(final.parent, LATEST, final.name)
        commit.point_to(final.parent, LATEST_ITERATION, str(manifest.common["iteration"]))

    def _save_rng(self, folder: Path) -> None:
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, self.streams.state_dict())
        if dist.get_rank() == 0:
            tensors = {f"rank{rank}/{key}": value for rank, state in enumerate(states) for key, value in state.items()}
            safetensors.torch.save_file(tensors, folder / RNG_FILE)

    def _file_table(self, folder: Path) -> dict[str, FileInfo]:
        """Sizes and checksums of all files, each read by one rank."""
        dist.barrier()
        paths = commit.data_files(folder)
        entries = {
            path: commit.checksum_file(folder / path) for path in paths[dist.get_rank() :: dist.get_world_size()]
        }
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, entries)
        return dict(sorted((name, entry) for part in everywhere for name, entry in part.items()))

    def _manifest(
        self, progress: Progress, digests: Mapping[str, Mapping[str, str]], files: Mapping[str, FileInfo]
    ) -> Manifest:
        steps: dict[str, float | None] = {}
        groups: dict[str, str] = {}
        order: list[str] = []
        for interval in self.state.intervals:
            steps[interval.name] = self.state.step_of(interval.flat)
            groups[interval.name] = interval.group
            order.append(interval.name)
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, (steps, groups, self.state.hyper_parameters(), order))
        for other_steps, other_groups, _, _ in everywhere:
            for name, step in other_steps.items():
                if steps.setdefault(name, step) != step:
                    raise CheckpointError(f"ranks hold {name} at different optimizer steps: {steps[name]} and {step}")
            groups.update(other_groups)
        hyper_parameters = {name: values for part in everywhere for name, values in part[2].items()}
        states = (MASTER, *self.state.state_names)
        parameters = {
            name: ParameterInfo(
                layout=layout,
                group=groups[name],
                is_trainable=True,
                pp_stages=self.atlas.pp_stages[name],
                states=states,
                step=steps[name],
            )
            for name, layout in self.atlas.layouts.items()
        }
        topology = self.context.topology
        is_pipelined = self.engine.pipeline_parallelism
        return Manifest(
            kind="native",
            saved_by={
                "framework": "megatron-deepspeed-ucp",
                "version": megatron.__version__,
                "deepspeed": deepspeed.__version__,
                "torch": torch.__version__,
            },
            topology=topology,
            zero_stage=self.engine.zero_optimization_stage(),
            is_pipelined=is_pipelined,
            parameters=parameters,
            optimizer=OptimizerInfo(
                kind=type(self.state.base).__name__, wrapper=self.state.wrapper, groups=hyper_parameters
            ),
            model=self.model,
            common=self._common(progress),
            digests={name: dict(values) for name, values in digests.items()},
            files=dict(files),
            zero0_order=self._zero0_order([part[3] for part in everywhere]) if self.state.is_replicated else [],
            pipeline_layers=list(self.engine.module.entry_paths) if is_pipelined else [],
        )

    def _zero0_order(self, orders: list[list[str]]) -> list[list[str]]:
        """By mp_rank: names in the order of the torch optimizer's indices."""
        topology = self.context.topology
        return [
            orders[topology.rank_of(pp=pp, tp=tp)] for pp in range(topology.pp_size) for tp in range(topology.tp_size)
        ]

    def _common(self, progress: Progress) -> dict[str, Any]:
        scaler = self.state.loss_scaler
        return {
            **dataclasses.asdict(progress),
            "schedule": self.schedule.state_dict(),
            "loss_scaler": None
            if scaler is None
            else {key: getattr(scaler, key) for key in LOSS_SCALER_FIELDS if hasattr(scaler, key)},
            "rng": {"file": RNG_FILE, "world_size": dist.get_world_size()},
            "global_batch_size": self.engine.train_batch_size(),
            "train_order": self.train_order,
            "engine": {
                "global_samples": self.engine.global_samples,
                "skipped_steps": self.engine.skipped_steps,
            },
        }

    # -- load ---------------------------------------------------------------------------------------------------

    def load(self, plan: ResumePlan, options: LoadOptions | None = None) -> Progress:
        """Place the planned Source into the engine; returns how far it had come. The engine is freshly built.

        Raises SourceMismatchError before anything is written, CheckpointError where a digest does not match.
        """
        options = options or LoadOptions()
        started = time.perf_counter()
        folder = plan.folder
        with _all_ranks_or_none("opening", folder):
            source = open_source(folder)
            self._check_source(source, options)
        if options.with_optimizer:
            self.state.make_states()
        with _all_ranks_or_none("loading", folder):
            num_elements = self._place(source, options)
        self.state.refresh_weights()
        self._check_digests(source, options, plan)
        progress = self._restore_common(source, options, is_same_topology=plan.kind == "native")
        seconds = time.perf_counter() - started
        log.info(
            "loaded %s in %.2f s: rank 0 read %.1f MiB; iteration %d, consumed samples %d",
            folder, seconds, num_elements * 4 / 2**20, progress.iteration, progress.consumed_train_samples,
        )  # fmt: skip
        return progress

    def _check_source(self, source: Source, options: LoadOptions) -> None:
        """Everything that does not fit, at once, before anything is written. Local."""
        problems = compare_models(source.manifest.model, self.model)
        there, wanted = source.manifest.parameters, self.atlas.layouts
        if missing := sorted(set(wanted) - set(there)):
            problems.append(f"parameters the Source lacks: {_some(missing)}")
        if unexpected := sorted(set(there) - set(wanted)):
            problems.append(f"parameters only the Source has: {_some(unexpected)}")
        for name in sorted(set(there) & set(wanted)):
            if there[name].layout.shape != wanted[name].shape:
                problems.append(f"{name}: shape {there[name].layout.shape} in the Source, {wanted[name].shape} here")
        if options.with_optimizer:
            self.state.make_states()
            ours = set(self.state.state_names)
            theirs = {state for info in there.values() for state in info.states} - {MASTER}
            if not ours <= theirs:
                problems.append(
                    f"optimizer states {sorted(ours)} are needed, the Source has {sorted(theirs)} "
                    f"({source.manifest.optimizer.kind}); use the same optimizer, or --no-load-optim"
                )
            lacking = {g["name"] for g in self.state.base.param_groups} - set(source.manifest.optimizer.groups)
            if lacking:
                problems.append(f"parameter groups the Source lacks: {sorted(lacking)}")
        if problems:
            raise SourceMismatchError(
                f"{source.folder} does not fit this run; nothing was loaded:\n  " + "\n  ".join(problems)
            )

    def _place(self, source: Source, options: LoadOptions) -> int:
        """Read this rank's intervals into the optimizer's tensors; returns the number of elements. Local."""
        num_elements = 0
        steps: dict[int, float] = {}
        for interval in self.state.intervals:
            self._read(source, interval, MASTER, interval.master)
            num_elements += interval.numel
            if not options.with_optimizer:
                continue
            for state in self.state.state_names:
                self._read(source, interval, state, interval.state(self.state.base, state))
                num_elements += interval.numel
            step = source.step(interval.name)
            if step is not None and steps.setdefault(id(interval.flat), step) != step:
                raise CheckpointError(f"{interval.name} is at step {step}, others of its group at another")
        if options.with_optimizer:
            # A rank may own only padding of a group; its step must be set all the same.
            by_group = {source.manifest.parameters[i.name].group: steps.get(id(i.flat)) for i in self.state.intervals}
            known = [step for step in by_group.values() if step is not None]
            for group in self.state.base.param_groups:
                for flat in group["params"]:
                    step = steps.get(id(flat), known[0] if known else source.manifest.common["iteration"])
                    self.state.set_step(flat, step)
            self.state.set_hyper_parameters(source.manifest.optimizer.groups)
        return num_elements

    @staticmethod
    def _read(source: Source, interval: OwnedInterval, state: str, out: torch.Tensor) -> None:
        gather(source, interval.name, state, source.pieces(interval.name, state), interval.runs, out)

    def _check_digests(self, source: Source, options: LoadOptions, plan: ResumePlan) -> None:
        placed = state_digests(self.state)
        saved = source.manifest.digests
        if not saved:
            log.warning("%s carries no state digest: the load could not be proven", source.folder)
            return
        states = (MASTER, *self.state.state_names) if options.with_optimizer else (MASTER,)
        wrong = [
            f"{name} ({state})"
            for name in placed
            for state in states
            if saved.get(name, {}).get(state) != placed[name].get(state)
        ]
        if wrong:
            raise CheckpointError(
                f"what was placed in the engine is not what was saved in {source.folder}; "
                f"{len(wrong)} digests differ: {_some(wrong)}. The files were changed since the save, or this is a "
                "defect: run `python -m megatron.ucp verify` on the folder."
            )
        if options.with_optimizer:
            log.info("state digest %s equals the one at save (%s resume)", total(placed), plan.kind)
        else:
            log.info("weight digests equal those at save; optimizer states were not loaded")

    def _restore_common(self, source: Source, options: LoadOptions, is_same_topology: bool) -> Progress:
        common = source.manifest.common
        known = {field.name for field in dataclasses.fields(Progress)}
        progress = Progress(**{key: common[key] for key in known if key in common})
        engine = self.engine
        if not options.with_progress:
            return Progress()
        for line in changed_order(common.get("train_order"), self.train_order):
            log.warning("warning: %s", line)
        engine.global_steps = progress.iteration
        engine.global_samples = common.get("engine", {}).get("global_samples", progress.consumed_train_samples)
        engine.skipped_steps = common.get("engine", {}).get("skipped_steps", 0)
        # Not the saved number: the accumulation boundary is counted in this run's micro batches.
        engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
        if options.with_schedule and common.get("schedule"):
            self.schedule.load_state_dict(common["schedule"])
        scaler = self.state.loss_scaler
        if scaler is not None and options.with_optimizer and common.get("loss_scaler"):
            for key, value in common["loss_scaler"].items():
                if hasattr(scaler, key):
                    setattr(scaler, key, value)
        if options.with_rng:
            self._restore_rng(source, progress, is_same_topology)
        return progress

    def _restore_rng(self, source: Source, progress: Progress, is_same_topology: bool) -> None:
        """Bit-equal for the same topology; otherwise reseeded from the seed and the iteration, by rule."""
        path = source.folder / source.manifest.common.get("rng", {}).get("file", RNG_FILE)
        if is_same_topology and path.is_file():
            prefix = f"rank{dist.get_rank()}/"
            tensors = safetensors.torch.load_file(path)
            self.streams.load_state_dict(
                {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            )
            return
        self.streams.reseed(progress.iteration)
        log.info("random streams start anew at iteration %d: the topology changed", progress.iteration)


def compare_models(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """One line for every value of the model that differs; values only one side knows are not compared."""
    return [
        f"model.{key}: {saved[key]!r} in the Source, {wanted[key]!r} here"
        for key in sorted(set(saved) & set(wanted))
        if saved[key] != wanted[key]
    ]


def changed_order(saved: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> list[str]:
    """Empty if the samples go on in the Source's order; otherwise why they do not, one line each. Not an error:
    people do change their data on purpose."""
    if not saved or saved["order_crc32"] == wanted["order_crc32"]:
        return []
    reasons = [
        f"{key} was {saved[key]}, is {wanted[key]}"
        for key in wanted
        if key != "order_crc32" and saved.get(key) != wanted[key]
    ]
    return [
        "the training samples come in another order than the Source's: some may be seen twice, some never",
        *(reasons or ["the dataset's documents have changed"]),
    ]


def _some(names: list[str], limit: int = 20) -> str:
    rest = f", ... and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _on_rank_0(action: Callable[[], Any]) -> Any:
    """Run on rank 0; its result, or its error, on every rank. Collective."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise CheckpointError(outcome[1])
    return outcome[0]


@contextlib.contextmanager
def _all_ranks_or_none(what: str, folder: Path) -> Iterator[None]:
    """Ends with an error on every rank where one rank failed, instead of a hang in the next collective."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, None if failure is None else f"{type(failure).__name__}: {failure}")
    failed = {rank: text for rank, text in enumerate(told) if text is not None}
    if not failed:
        return
    by_text: dict[str, list[int]] = {}
    for rank, text in failed.items():
        by_text.setdefault(text, []).append(rank)
    lines = [f"ranks {ranks[:8]}{'...' if len(ranks) > 8 else ''}: {text}" for text, ranks in by_text.items()]
    kind = SourceMismatchError if isinstance(failure, SourceMismatchError) else CheckpointError
    raise kind(f"{what} {folder} failed on {len(failed)} of {len(told)} ranks\n" + "\n".join(lines)) from failure
