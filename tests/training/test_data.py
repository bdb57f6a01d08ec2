"""Data: every reader, packing, what the loss counts, the held-out part, and errors that name the fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftkern.testing.tiny_model import make_base
from peftkern.training.data import IGNORED, Blocks, Document, collate, load_corpus, read_rows, steps_per_epoch, tokenize
from peftkern.training.errors import UserError
from peftkern.training.model import load_tokenizer

MARKING = (
    "{% for m in messages %}{{ m['role'] }} : {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} <eos>{% endgeneration %}{% else %}{{ m['content'] }}{% endif %} {% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
CHAT = [{"role": "user", "content": "the value"}, {"role": "assistant", "content": "is bound"}]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    return load_tokenizer(str(base))


def test_blocks_hold_every_token_once_in_order() -> None:
    documents = [Document([5, 6, 7], [True] * 3), Document([8, 9, 0], [True] * 3), Document([10], [True])]
    blocks = Blocks(documents, 4, eos=0)
    assert [b["input_ids"].tolist() for b in blocks] == [[5, 6, 7, 0], [8, 9, 0, 10], [0]][:2]
    assert [b["labels"].tolist() for b in blocks] == [[IGNORED, 6, 7, 0], [IGNORED, 9, 0, 10]]
    assert blocks.counted_tokens == 6


def test_blocks_without_a_counted_token_are_left_out() -> None:
    blocks = Blocks([Document([5, 6, 7, 8], [True, False, False, True])], 2, eos=None)
    assert [b["input_ids"].tolist() for b in blocks] == [[7, 8]]


def test_collate_pads_on_the_right() -> None:
    blocks = Blocks([Document([5, 6, 7, 8, 9], [True] * 5)], 3, eos=None)
    batch = collate(blocks.blocks)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]


def test_every_reader_gives_the_same_texts(tmp_path: Path) -> None:
    import pandas

    rows = [{"text": "the value\nof a name"}, {"text": "is bound"}]
    jsonl = write(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    expected = [row["text"] for row in rows]
    assert read_rows(jsonl, None) == expected
    assert read_rows(str(tmp_path / "a.json"), "text") == expected
    assert read_rows(str(tmp_path / "a.parquet"), None) == expected
    (tmp_path / "a.txt").write_text("the value\nof a name\n\nis bound")
    assert read_rows(str(tmp_path / "a.txt"), None) == ["the value\nof a name\n\nis bound"]


def test_loss_on_the_assistant_only_where_the_template_marks_it(tmp_path: Path) -> None:
    marking = load_tokenizer(str(make_base(tmp_path / "marking", MARKING)))
    notes: list[str] = []
    (document,) = tokenize([CHAT], marking, notes)
    words = marking.convert_ids_to_tokens(document.tokens)
    assert [w for w, counted in zip(words, document.counted) if counted] == ["is", "bound", "<eos>"]
    assert words[:4] == ["user", ":", "the", "value"]
    assert notes == []

    plain = load_tokenizer(str(make_base(tmp_path / "plain", PLAIN)))
    (document,) = tokenize([CHAT], plain, notes)
    assert all(document.counted)
    assert len(notes) == 1
    assert "counts every token" in notes[0]


def test_messages_without_a_template(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="no chat template"):
        tokenize([CHAT], tokenizer, [])


def test_held_out_part_is_seeded_and_disjoint(tmp_path: Path, tokenizer: Any) -> None:
    words = ["the", "value", "of", "an", "expression", "is", "bound", "to", "a", "name"]
    path = write(tmp_path / "a.jsonl", [{"text": f"{word} {word}"} for word in words])
    held = [load_corpus(path, None, 0.2, None, tokenizer, 8, seed).heldout for seed in (0, 0, 1)]
    tokens = [{t for b in blocks for t in b["input_ids"].tolist()} for blocks in held]
    assert tokens[0] == tokens[1] != tokens[2]
    corpus = load_corpus(path, None, 0.2, None, tokenizer, 8, 0)
    train = {t for b in corpus.train for t in b["input_ids"].tolist()}
    assert train & tokens[0] == {tokenizer.eos_token_id}
    assert len(tokens[0]) == 3  # two words and the end of text


def test_the_end_of_a_lone_text_is_held_out(tmp_path: Path, tokenizer: Any) -> None:
    lines = ["the value\n"] * 7 + ["is bound\n"] * 3
    path = tmp_path / "a.txt"
    for text in ("".join(lines), "".join(lines).rstrip()):
        path.write_text(text)
        corpus = load_corpus(str(path), None, 0.28, None, tokenizer, 64, 0)
        train, held = (tokenizer.decode(blocks[0]["input_ids"]) for blocks in (corpus.train, corpus.heldout))
        assert train.split() == ["the", "value"] * 7 + ["<eos>"]
        assert held.split() == ["is", "bound"] * 3 + ["<eos>"]
        assert corpus.first_text.startswith("is bound")


@pytest.mark.parametrize(
    ("name", "content", "field", "message"),
    [
        ("none.jsonl", None, None, "does not exist"),
        ("empty.jsonl", "", None, "is empty; give a file with text"),
        ("a.csv", "text\nx\n", None, r"unknown type; give one of \.jsonl"),
        ("a.jsonl", '{"body": "x", "id": 1}\n', None, r"neither 'text' nor 'messages'; name one of \['body', 'id'\]"),
        ("a.jsonl", '{"body": "x", "id": 1}\n', "txt", r"no field 'txt'; name one of \['body', 'id'\]"),
        ("a.jsonl", '{"text": "  "}\n{"text": ""}\n', None, "has no text in 'text'"),
        ("a.jsonl", '{"text": 3}\n', None, "row 1: 'text' must be text or a list"),
        ("a.jsonl", '{"text": [{"rule": "x"}]}\n', None, "row 1: 'text' must be text or a list"),
        ("a.jsonl", '{"text": "x"\n', None, "cannot read .* as json"),
        ("a.parquet", "not parquet", None, "cannot read .* as parquet"),
        ("a.jsonl", '{"text": "the value"}\n', None, "a lone text of one line.*give --eval-data"),
        ("a.txt", "\n\nthe value\n", None, "a lone text of one line.*give --eval-data"),
        ("a.jsonl", json.dumps({"messages": CHAT}), None, "a lone conversation.*give --eval-data"),
    ],
)
def test_unusable_data(
    name: str, content: str | None, field: str | None, message: str, tmp_path: Path, tokenizer: Any
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_corpus(str(tmp_path / name), None, 0.5, field, tokenizer, 8, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("blocks", "batch", "accumulation", "processes", "steps"),
    [(10, 4, 1, 1, 3), (10, 4, 2, 1, 2), (1, 8, 4, 1, 1), (10, 4, 1, 2, 2)],
)
def test_steps_per_epoch(blocks: int, batch: int, accumulation: int, processes: int, steps: int) -> None:
    assert steps_per_epoch(blocks, batch, accumulation, processes) == steps
