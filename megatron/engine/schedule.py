"""Learning rate and weight decay as a function of the samples seen, and the object that sets them.

Everything is counted in samples, as Megatron counts (optimizer_param_scheduler.py), so the curve
goes on where it was when a run resumes with another number of ranks or another batch size.

    schedule = LearningRateSchedule(config.optimizer, config.length.planned_samples, config.run.global_batch_size)
    schedule.attach(optimizer)               # sets the first learning rate
    schedule.step(global_batch_size)         # after each optimizer step that was not skipped
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.config.optimizer import DECAY_STYLES, WSD_DECAY_STYLES, OptimizerConfig, is_decayed, is_decoupled
from megatron.engine.protocols import HasParamGroups
from megatron.ucp.json_checks import number, record, text, whole


class ScheduleError(ValueError):
    """A schedule that cannot be built, or a saved one that is not this one."""


@dataclass(frozen=True)
class LearningRateCurve:
    """The schedule as numbers; lengths in samples, all counted from the first sample of the run."""

    max_lr: float
    min_lr: float = 0.0
    init_lr: float = 0.0
    """Learning rate at the start of the warm-up."""
    warmup: float = 0
    decay: float = 1
    """Length of warm-up and decay together."""
    style: str = "linear"
    wsd_decay: float = 0
    """Length of the last part of WSD; it ends where `decay` ends."""
    wsd_style: str = "exponential"
    start_weight_decay: float = 0.0
    end_weight_decay: float = 0.0
    weight_decay_length: float = 1
    weight_decay_style: str = "constant"
    decoupled_max_lr: float | None = None
    """Of the parameter group "decoupled" (--decoupled-lr); the curve's shape is the same."""
    decoupled_min_lr: float | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.style not in DECAY_STYLES:
            problems.append(f"style {self.style[:60]!r}, expected one of {', '.join(DECAY_STYLES)}")
        if self.wsd_style not in WSD_DECAY_STYLES:
            problems.append(f"wsd_style {self.wsd_style[:60]!r}, expected one of {', '.join(WSD_DECAY_STYLES)}")
        for prefix in ("", "decoupled_"):
            least, most = getattr(self, f"{prefix}min_lr"), getattr(self, f"{prefix}max_lr")
            if most is not None and not 0 <= least <= most:
                problems.append(f"{prefix}min_lr {least:g}, expected 0 to {prefix}max_lr {most:g}")
        if not 0 <= self.warmup < self.decay:
            problems.append(f"a warm-up of {self.warmup:g} samples, expected less than the decay's {self.decay:g}")
        if self.style == "WSD" and not 0 < self.wsd_decay <= self.decay:
            problems.append(f"a last part of {self.wsd_decay:g} samples, expected 1 to the decay's {self.decay:g}")
        if problems:
            raise ScheduleError("the schedule cannot be built: " + "; ".join(problems))

    @classmethod
    def from_config(cls, config: OptimizerConfig, length: int, global_batch_size: int) -> LearningRateCurve:
        """`length`: of the run, in samples. Lengths in iterations become samples of this global batch size. A resolved
        configuration (Config.validate) has none in tokens."""
        if config.lr is None or config.lr_decay_tokens is not None or config.lr_warmup_tokens is not None:
            raise ScheduleError("the configuration is not resolved. What to do: config = config.validate(world_size)")

        def samples(in_samples: int | None, in_iters: int | None, default: float) -> float:
            if in_samples:
                return in_samples
            return in_iters * global_batch_size if in_iters else default

        decay = samples(config.lr_decay_samples, config.lr_decay_iters, length)
        warmup = samples(config.lr_warmup_samples, config.lr_warmup_iters, 0)
        if config.lr_warmup_fraction is not None:
            warmup = config.lr_warmup_fraction * decay
        is_constant = config.weight_decay_incr_style == "constant"
        decoupled_min_lr = config.min_lr if config.decoupled_min_lr is None else config.decoupled_min_lr
        return cls(
            max_lr=config.lr,
            min_lr=config.min_lr,
            init_lr=config.lr_warmup_init,
            warmup=warmup,
            decay=decay,
            style=config.lr_decay_style,
            wsd_decay=samples(config.lr_wsd_decay_samples, config.lr_wsd_decay_iters, 0),
            wsd_style=config.lr_wsd_decay_style,
            start_weight_decay=config.weight_decay if is_constant else config.start_weight_decay,
            end_weight_decay=config.weight_decay if is_constant else config.end_weight_decay,
            weight_decay_length=length,
            weight_decay_style=config.weight_decay_incr_style,
            decoupled_max_lr=config.decoupled_lr,
            decoupled_min_lr=None if config.decoupled_lr is None else decoupled_min_lr,
        )

    def learning_rate(self, consumed_samples: float, is_decoupled: bool = False) -> float:
        """For the step after `consumed_samples` have been seen; with `is_decoupled` of the group "decoupled"."""
        max_lr, min_lr = self.max_lr, self.min_lr
        if is_decoupled and self.decoupled_max_lr is not None:
            max_lr, min_lr = self.decoupled_max_lr, self.decoupled_min_lr
        if self.warmup > 0 and consumed_samples <= self.warmup:
            return self.init_lr + (max_lr - self.init_lr) * consumed_samples / self.warmup
        if self.style == "constant":
            return max_lr
        if consumed_samples > self.decay:
            return min_lr
        if self.style == "inverse-square-root":
            lr = max_lr * math.sqrt(max(self.warmup, 1)) / math.sqrt(max(consumed_samples, 1))
            return max(min_lr, lr)
        return min_lr + self._height(consumed_samples) * (max_lr - min_lr)

    def weight_decay(self, consumed_samples: float) -> float:
        """The same for weight decay."""
        start, end = self.start_weight_decay, self.end_weight_decay
        if self.weight_decay_style == "constant" or consumed_samples > self.weight_decay_length:
            return end
        ratio = consumed_samples / self.weight_decay_length
        if self.weight_decay_style == "cosine":
            ratio = 0.5 * (math.cos(math.pi * (1 - ratio)) + 1.0)
        return start + ratio * (end - start)

    def _height(self, consumed_samples: float) -> float:
        """Where between min_lr (0) and max_lr (1) the decay is."""
        if self.style == "WSD":
            start = self.decay - self.wsd_decay
            if consumed_samples <= start:
                return 1.0
            return _shape(self.wsd_style, (consumed_samples - start) / self.wsd_decay)
        return _shape(self.style, (consumed_samples - self.warmup) / (self.decay - self.warmup))


def _shape(style: str, ratio: float) -> float:
    """From 1 at ratio 0 to 0 at ratio 1."""
    if style == "linear":
        return 1.0 - ratio
    if style == "cosine":
        return 0.5 * (math.cos(math.pi * ratio) + 1.0)
    if style == "minus_sqrt":
        return 1.0 - math.sqrt(ratio)
    return 2.0 * 0.5**ratio - 1.0  # exponential: halves along the way, shifted to end at 0


def _relevant(curve: LearningRateCurve) -> dict[str, Any]:
    """The values that shape this curve; two curves that agree in them are the same."""
    values = dataclasses.asdict(curve)
    irrelevant = set()
    if curve.warmup == 0:
        irrelevant |= {"init_lr"}
    if curve.style == "constant":
        irrelevant |= {"min_lr", "decoupled_min_lr", "decay"}
    if curve.style != "WSD":
        irrelevant |= {"wsd_decay", "wsd_style"}
    if curve.weight_decay_style == "constant":
        irrelevant |= {"weight_decay_length", "start_weight_decay"}
    return {name: value for name, value in values.items() if name not in irrelevant}


_OF_TYPE = {"float": number(), "str": text, "float | None": number(optional=True)}
_SAVED = record(
    {"num_samples": whole(), **{f.name: _OF_TYPE[str(f.type)] for f in dataclasses.fields(LearningRateCurve)}},
    required=("num_samples", "max_lr"),  # the others have defaults: an older version did not know all
)


class LearningRateSchedule:
    """Sets lr (and, if it rises, weight decay) of an optimizer's groups. May be given to DeepSpeed as its
    lr_scheduler, or stepped by the caller; not both.

    A group's `lr_mult` scales its learning rate; its `wd_mult` scales a rising weight decay (without one: 0
    for a group named no_decay or built without decay, else 1). A constant weight decay is left as built.
    """

    def __init__(self, config: OptimizerConfig, length: int, global_batch_size: int) -> None:
        """`length`: of the run, in samples."""
        self.curve = LearningRateCurve.from_config(config, length, global_batch_size)
        self.global_batch_size = global_batch_size
        self.num_samples = 0
        self._takes_flags = config.override_opt_param_scheduler
        self._takes_checkpoint = config.use_checkpoint_opt_param_scheduler
        self._optimizer: HasParamGroups | None = None
        self._decay_multipliers: list[float] = []

    def attach(self, optimizer: HasParamGroups) -> LearningRateSchedule:
        """Drive `optimizer.param_groups` (torch's or DeepSpeed's) from now on; sets them at once."""
        self._optimizer = optimizer
        self._decay_multipliers = [_decay_multiplier(group) for group in optimizer.param_groups]
        self.apply()
        return self

    def step(self, increment: int | None = None) -> None:
        """`increment` samples were trained on; default: one global batch."""
        self.num_samples += self.global_batch_size if increment is None else increment
        self.apply()

    def get_lr(self) -> list[float]:
        """The learning rate of each group, for the next step."""
        groups = self._optimizer.param_groups if self._optimizer is not None else [{}]
        return [self._learning_rate(group) * group.get("lr_mult", 1.0) for group in groups]

    def _learning_rate(self, group: Mapping[str, Any]) -> float:
        return self.curve.learning_rate(self.num_samples, is_decoupled(group.get("name", "")))

    @property
    def learning_rate(self) -> float:
        """For the next step, of all groups but "decoupled"."""
        return self.curve.learning_rate(self.num_samples)

    def get_last_lr(self) -> list[float]:
        return self.get_lr()

    def state_dict(self) -> dict[str, Any]:
        return {"num_samples": self.num_samples, **dataclasses.asdict(self.curve)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved schedule, exactly. Raises what `curve_of` raises."""
        saved_curve = self.curve_of(state)
        if self._takes_checkpoint:
            self.curve = saved_curve
        self.num_samples = state["num_samples"]
        self.apply()

    def curve_of(self, state: Mapping[str, Any]) -> LearningRateCurve:
        """A saved schedule's. Where it is not this one's, ScheduleError names every difference, unless the flags say
        which to take. Changes nothing."""
        faults: list[str] = []
        _SAVED(lambda place, what: faults.append(f"{place}: {what}"), "schedule", state)
        if faults:
            raise ScheduleError(
                f"the checkpoint's schedule cannot be read: {'; '.join(faults[:20])}. What to do: go on without it, by "
                "--no-load-lr-state, or use another checkpoint"
            )
        saved_curve = LearningRateCurve(**{key: value for key, value in state.items() if key != "num_samples"})
        saved, mine = _relevant(saved_curve), _relevant(self.curve)
        # A value that only one of the curves depends on says nothing where both have the same.
        different = [name for name in {**saved, **mine} if getattr(saved_curve, name) != getattr(self.curve, name)]
        if different and not (self._takes_flags or self._takes_checkpoint):
            listed = "; ".join(
                f"{name}: saved {str(getattr(saved_curve, name))[:60]}, now {getattr(self.curve, name)}"
                for name in different
            )
            raise ScheduleError(
                f"the schedule differs from the checkpoint's (lengths in samples): {listed}. What to do: give the "
                "flags of the saved run, or --use-checkpoint-opt_param-scheduler to go on with its curve, or "
                "--override-opt_param-scheduler to take the curve of these flags"
            )
        return saved_curve

    @property
    def takes_flags(self) -> bool:
        """--override-opt_param-scheduler: what the flags say goes before what a checkpoint says."""
        return self._takes_flags

    def apply(self) -> None:
        """Set the groups' learning rates (and a rising weight decay) anew, after something else has written them."""
        if self._optimizer is None:
            return
        decay = self.curve.weight_decay(self.num_samples)
        for group, lr, multiplier in zip(self._optimizer.param_groups, self.get_lr(), self._decay_multipliers):
            group["lr"] = lr
            if self.curve.weight_decay_style != "constant":
                group["weight_decay"] = decay * multiplier


def _decay_multiplier(group: Mapping[str, Any]) -> float:
    if "wd_mult" in group:
        return group["wd_mult"]
    if "name" in group:
        return 1.0 if is_decayed(group["name"]) else 0.0
    return 1.0 if group.get("weight_decay") else 0.0
