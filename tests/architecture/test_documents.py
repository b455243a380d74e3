"""Links and paths in the documents lead somewhere."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
PATH = re.compile(
    r"`((?:megatron|tests|tools|examples|benchmarks|docs|gallery|tb_analysis|training_datasets)/[\w./-]+)`"
)


def dead_ends(text: str, folder: Path) -> list[str]:
    """Relative links from `folder` and paths in backticks from the root that are not there."""
    links = [link for link in LINK.findall(text) if "://" not in link and not (folder / link).exists()]
    return links + [path for path in PATH.findall(text) if not (ROOT / path).exists()]


def test_no_dead_ends():
    documents = [
        path
        for pattern in ("*.md", "*/*.md", "megatron/*/*.md", "gallery/**/*.md")
        for path in ROOT.glob(pattern)
        if not path.relative_to(ROOT).parts[0].startswith((".", "runs", "build"))
    ]
    assert {ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs/ARCHITECTURE.md"} <= set(documents)
    assert [
        f"{path.relative_to(ROOT)}: {end}" for path in documents for end in dead_ends(path.read_text(), path.parent)
    ] == []


def test_planted_faults_are_found():
    assert dead_ends("[x](nowhere.md#a) and `megatron/nothing/here.py`", ROOT) == [
        "nowhere.md",
        "megatron/nothing/here.py",
    ]
    assert dead_ends("[x](README.md) [y](https://example.org/z) `megatron/ucp/`", ROOT) == []
