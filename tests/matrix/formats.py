"""Which formats become which, and what is carried: the table in README, and what test_formats.py holds it to.

python tests/matrix/formats.py            # prints the table
"""

ALL = "weights, masters, moments, steps"
WEIGHTS_IN = "weights (there is no optimizer)"
WEIGHTS_OUT = "weights (there is no place for more)"
VIA = "by way of universal"
NO_NAMES = "no: its weights lie in dicts of dicts"
NO_MODEL = "no: it does not say of which model it is"
NO_FILES = "no: DeepSpeed's files only; its programs load the universal folder"

SOURCES = {
    "native": "DeepSpeed's files, ours, any topology",
    "universal": "universal, ours",
    "stock": "universal, of DeepSpeed's converter",
    "hf": "Hugging Face",
    "dcp": "PyTorch DCP",
    "core": "Megatron-Core",
    "mds": "Megatron-DeepSpeed",
}
TARGETS = {
    "live": "live engine, any topology",
    "universal": "universal",
    "reshaped": "DeepSpeed's files of another stage and dp, of one tp and pp rank",
    "hf": "Hugging Face",
    "dcp": "PyTorch DCP",
}
CELLS = {
    "native": {"live": ALL, "universal": ALL, "reshaped": ALL, "hf": WEIGHTS_OUT, "dcp": ALL},
    "universal": {"live": ALL, "universal": ALL, "reshaped": NO_FILES, "hf": WEIGHTS_OUT, "dcp": ALL},
    "stock": {"live": ALL, "universal": ALL, "reshaped": NO_FILES, "hf": NO_MODEL, "dcp": NO_MODEL},
    "hf": {
        "live": WEIGHTS_IN, "universal": WEIGHTS_IN, "reshaped": NO_FILES, "hf": WEIGHTS_OUT, "dcp": WEIGHTS_IN,
    },
    "dcp": {"live": VIA, "universal": ALL, "reshaped": NO_FILES, "hf": VIA, "dcp": VIA},
    "core": {"live": ALL, "universal": ALL, "reshaped": NO_FILES, "hf": WEIGHTS_OUT, "dcp": ALL},
    "mds": {"live": VIA, "universal": ALL, "reshaped": NO_NAMES, "hf": VIA, "dcp": VIA},
}  # fmt: skip


def table() -> str:
    lines = ["| from \\ to | " + " | ".join(TARGETS.values()) + " |", "|---" * (len(TARGETS) + 1) + "|"]
    for source, title in SOURCES.items():
        lines.append(f"| {title} | " + " | ".join(CELLS[source][target] for target in TARGETS) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
