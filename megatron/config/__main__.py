"""Print the table of all flags: `python -m megatron.config > docs/flags.md`."""

from __future__ import annotations

from megatron.config.flag_table import flag_table

if __name__ == "__main__":
    print(flag_table(), end="")
