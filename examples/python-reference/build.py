"""Write train.jsonl and heldout.jsonl: the English of the Python language reference.

The text comes from `pydoc_data.topics`, the copy of the reference that every CPython carries for `help("topics")`
(PSF licence, see LICENSE-PSF.txt). Grammar, tables, code and sessions are dropped, paragraphs are unwrapped to one line
each, duplicates are removed, and whole topics go either to training or to the held-out part. Needs only the standard
library; the same Python version always writes the same bytes, another version another text.

    python build.py [--output DIR] [--heldout 0.1] [--record-chars 1200]
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

UNDERLINE = re.compile(r"([*=\-~^\"#])\1{2,}$")
LABEL = re.compile(r"(Note|Warning|See also|Notes|Caution|Important|CPython implementation detail|Hint|Tip):$")
NOT_PROSE_LINE = re.compile(r"\s*(>>>|\.\.\. |\(Pdb\)|\$ |\+[-=]{2,}|\||#|Traceback \(most)")
LIST_ITEM = re.compile(r"(\* |\d+\. |\(\d+\) |\[\d+\] )")
SIGNATURE = re.compile(r"((class|exception|async|coroutine|method|static|property) )*[\w.]+(\(.*\))?(\s*->.*)?$")
FUNCTION_WORD = re.compile(
    r"(?i)\b(an?|and|are|as|at|be|been|but|by|can|for|from|has|have|if|in|is|it|its|may|not|of|on|or|that|the"
    r"|then|there|these|this|to|used|using|was|were|when|which|will|with)\b"
)
ASCII = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "-",
        "\u2026": "...",
        "\xa0": " ",
    }
)


@dataclass(frozen=True)
class Block:
    """Lines between two blank lines of a topic, with the smallest indentation among them."""

    lines: tuple[str, ...]

    @property
    def indent(self) -> int:
        return min(len(line) - len(line.lstrip()) for line in self.lines)

    @property
    def text(self) -> str:
        """The lines as one; a line that breaks at a hyphen meets the next without a space."""
        return re.sub(r"(?<=\w)-\n", "-", "\n".join(line.strip() for line in self.lines)).replace("\n", " ")

    @property
    def heading(self) -> str | None:
        """The title where the block is a title over its underline, else None."""
        if len(self.lines) == 2 and UNDERLINE.match(self.lines[1].strip()):
            return self.lines[0].strip()
        return None


def split_blocks(text: str) -> list[Block]:
    """Blocks of a topic, in order."""
    blocks, lines = [], []
    for line in [*text.expandtabs().splitlines(), ""]:
        if line.strip():
            lines.append(line)
        elif lines:
            blocks.append(Block(tuple(lines)))
            lines = []
    return blocks


def parses_as_python(block: Block) -> bool:
    """Whether the block is valid Python once dedented; English practically never is."""
    try:
        ast.parse(textwrap.dedent("\n".join(block.lines)))
    except (SyntaxError, ValueError):
        return False
    return True


def is_prose(block: Block) -> bool:
    """Whether the block reads as English sentences rather than grammar, a table, code or a session."""
    text = block.text
    if "::=" in text or any(NOT_PROSE_LINE.match(line) for line in block.lines) or parses_as_python(block):
        return False
    bare = re.sub(r'"[^"]*"', "", LIST_ITEM.sub("", text, count=1))
    words = re.findall(r"[A-Za-z][A-Za-z'\u2019]*", bare)
    symbols = len(re.findall(r"[=\[\]{}<>;#|\\@%]", bare))
    return len(words) >= 4 and bool(FUNCTION_WORD.search(bare)) and symbols <= 0.03 * len(bare)


def clean(text: str) -> str:
    """Markup, footnote marks and typographic characters removed; runs of spaces collapsed."""
    text = text.translate(ASCII)
    text = re.sub(r"^\[\d+\] ", "", text)
    text = re.sub(r"(?<=[\w.,;:)\"]) \[\d+\]", "", text)
    text = re.sub(r'(?<![\w"*/])(\*{1,2})([A-Za-z_][^*"]*?)\1(?!\*)', r"\2", text)
    return re.sub(r"\s+", " ", text).strip()


def paragraphs(topic: str) -> list[str]:
    """A topic's English paragraphs, one string each.

    A title, a signature (`str.casefold()`) or a label ("Note:") is put in front of the paragraph that follows it, so
    that no paragraph loses its subject; one that no prose follows is dropped, as is a line that only announces code.
    """
    blocks = split_blocks(topic)
    found: list[str] = []
    lead: list[str] = []
    for block, following in zip(blocks, [*blocks[1:], None]):
        deeper = following is not None and following.indent >= block.indent + 2
        if block.heading is not None:
            lead = [clean(block.heading)]
        elif LABEL.match(block.text) and deeper:
            lead.append(block.text)
        elif is_prose(block):
            if block.text.endswith(":") and len(block.text) < 120 and following is not None and not is_prose(following):
                continue
            found.append(" ".join([_closed(part) for part in lead] + [clean(block.text)]))
            lead = []
        elif deeper and is_prose(following) and all(SIGNATURE.match(line.strip()) for line in block.lines):
            lead = [clean(", ".join(line.strip() for line in block.lines))]
        else:
            lead = []
    return found


def _closed(lead: str) -> str:
    return lead if lead[-1] in ".:?" else lead + ":"


def key(paragraph: str) -> str:
    """What two paragraphs share when they differ only in case, spacing or punctuation."""
    return re.sub(r"[\W_]+", " ", paragraph).strip().lower()


def shingles(paragraph: str, words: int = 8) -> set[str]:
    """Every run of `words` words in the paragraph's key (the whole key where it is shorter)."""
    parts = key(paragraph).split()
    return {" ".join(parts[i : i + words]) for i in range(max(1, len(parts) - words + 1))}


def unique_topics(source: dict[str, str]) -> dict[str, list[str]]:
    """Paragraphs by topic, each kept once, in the smallest topic that carries it: chapters repeat whole sections."""
    seen: set[str] = set()
    kept: dict[str, list[str]] = {}
    for name in sorted(source, key=lambda n: (len(source[n]), n)):
        own = []
        for paragraph in paragraphs(source[name]):
            if key(paragraph) not in seen:
                seen.add(key(paragraph))
                own.append(paragraph)
        if own:
            kept[name] = own
    return kept


def split(kept: dict[str, list[str]], share: float) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Whole topics into (train, held-out) by the hash of their name; then leaking paragraphs leave the held-out part.

    A held-out paragraph leaks when more than half of its 8-word runs also occur in the training text.
    """
    size = {name: sum(map(len, own)) for name, own in kept.items()}
    room = share * sum(size.values())
    held: set[str] = set()
    for name in sorted(kept, key=lambda n: hashlib.sha256(n.encode()).hexdigest()):
        if size[name] <= room:
            held.add(name)
            room -= size[name]
    train = {name: own for name, own in sorted(kept.items()) if name not in held}
    known = set().union(*(shingles(p) for own in train.values() for p in own)) if train else set()
    heldout = {}
    for name in sorted(held):
        own = [p for p in kept[name] if 2 * len(shingles(p) & known) <= len(shingles(p))]
        if own:
            heldout[name] = own
    return train, heldout


def records(part: dict[str, list[str]], limit: int) -> list[dict[str, str]]:
    """{"topic", "text"} records: successive paragraphs of one topic, joined by blank lines up to `limit` characters."""
    rows: list[dict[str, str]] = []
    for name, own in part.items():
        text = ""
        for paragraph in own:
            if text and len(text) + len(paragraph) + 2 > limit:
                rows.append({"topic": name, "text": text})
                text = ""
            text += ("\n\n" if text else "") + paragraph
        rows.append({"topic": name, "text": text})
    return rows


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Write one JSON object per line through a temporary file, so that `path` is never half-written."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)


def main() -> None:
    """Build both files and print what went into them."""
    parser = argparse.ArgumentParser(description="Write train.jsonl and heldout.jsonl from pydoc_data.topics.")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--heldout", type=float, default=0.1, help="share of the text to hold out (default 0.1)")
    parser.add_argument("--record-chars", type=int, default=1200, help="most characters per record (default 1200)")
    args = parser.parse_args()
    if not 0 < args.heldout < 1:
        parser.error(f"--heldout must lie between 0 and 1, got {args.heldout}")
    if not args.output.is_dir():
        parser.error(f"--output is no directory: {args.output}")
    train, heldout = split(unique_topics(topics), args.heldout)
    print(f"Python {sys.version.split()[0]}: {len(topics)} topics, {sum(map(len, topics.values()))} characters")
    for name, part in (("train", train), ("heldout", heldout)):
        rows = records(part, args.record_chars)
        write(args.output / f"{name}.jsonl", rows)
        text = sum(len(row["text"]) for row in rows)
        print(f"{name}.jsonl: {len(part)} topics, {len(rows)} records, {text} characters")


if __name__ == "__main__":
    main()
