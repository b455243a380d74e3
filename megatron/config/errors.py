"""What is wrong with a configuration, all of it at once.

A check returns a Problem and goes on; only the end raises, so that a user mends a command
line once and not once per mistake.

    problem = Problem("heads do not divide", found="5", expected="a multiple of 2", flags=("--num-layers",))
    raise ConfigError([problem])
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, in the words of the flags that the user typed."""

    what: str
    found: str = ""
    expected: str = ""
    flags: tuple[str, ...] = ()
    fix: str = ""

    def __str__(self) -> str:
        lines = [self.what]
        labels = (
            ("found", self.found),
            ("expected", self.expected),
            ("where", ", ".join(self.flags)),
            ("what to do", self.fix),
        )
        lines += [f"    {label}: {text}" for label, text in labels if text]
        return "\n".join(lines)


class ConfigError(ValueError):
    """A configuration that cannot be run. `problems` holds every reason."""

    def __init__(self, problems: Iterable[Problem] | Problem) -> None:
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__(str(self))

    def __str__(self) -> str:
        count = len(self.problems)
        title = "1 problem" if count == 1 else f"{count} problems"
        body = "\n".join(f"{i}. {problem}" for i, problem in enumerate(self.problems, 1))
        return f"the configuration has {title}:\n{body}"
