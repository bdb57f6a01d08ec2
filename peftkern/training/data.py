"""Text in, blocks of tokens out: reading through `datasets`, chat templates, packing, a held-out part."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftkern.training.errors import UserError, one_line

READERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".text": "text", ".md": "text", ".parquet": "parquet"}
IGNORED = -100  # the label that no loss counts


@dataclass
class Document:
    """One text or conversation as tokens, and which of them the loss counts."""

    tokens: list[int]
    counted: list[bool]


class Blocks(torch.utils.data.Dataset):
    """Packed blocks: item i is {"input_ids", "labels"}, int64 [<= max_length]. Only the last block may be shorter.

    The first label of a block is never counted: nothing precedes it, and methods that put virtual tokens before the
    text would otherwise count one token more than the others.
    """

    def __init__(self, documents: list[Document], max_length: int, eos: int | None) -> None:
        tokens: list[int] = []
        labels: list[int] = []
        for document in documents:
            tokens += document.tokens
            labels += [t if c else IGNORED for t, c in zip(document.tokens, document.counted, strict=True)]
            if eos is not None and document.tokens and document.tokens[-1] != eos:
                tokens.append(eos)
                labels.append(eos)
        self.blocks = []
        for start in range(0, len(tokens), max_length):
            ids = torch.tensor(tokens[start : start + max_length])
            counted = torch.tensor(labels[start : start + max_length])
            counted[0] = IGNORED
            if bool((counted != IGNORED).any()):
                self.blocks.append({"input_ids": ids, "labels": counted})

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.blocks[index]

    @property
    def counted_tokens(self) -> int:
        """Tokens that the loss counts."""
        return sum(int((block["labels"] != IGNORED).sum()) for block in self.blocks)


def collate(blocks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch, padded on the right to its longest block: input_ids, attention_mask and labels, int64 [B, T]."""
    length = max(block["input_ids"].numel() for block in blocks)
    ids = torch.zeros(len(blocks), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, block in enumerate(blocks):
        n = block["input_ids"].numel()
        ids[row, :n], mask[row, :n], labels[row, :n] = block["input_ids"], 1, block["labels"]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass
class Corpus:
    """Training and held-out blocks, the first held-out text, and one-line remarks for the person."""

    train: Blocks
    heldout: Blocks
    first_text: str
    notes: list[str]


def load_corpus(
    data: str,
    eval_data: str | None,
    eval_fraction: float,
    text_field: str | None,
    tokenizer: Any,
    max_length: int,
    seed: int,
) -> Corpus:
    """Reads, tokenizes and packs the training and held-out data.

    Args:
        data, eval_data: local files; without `eval_data` a seeded random `eval_fraction` of the documents is held out,
            or that part of the end of a lone one, such as a .txt file.
        text_field: the field with the text, or with a list of chat messages; None looks for "text", then "messages".
        tokenizer: of the model.
        max_length: block length in tokens.
        seed: of the split.

    Raises:
        UserError: a missing, empty or unreadable file, a field that is not there, or too little text to split.
    """
    notes: list[str] = []
    rows = read_rows(data, text_field)
    if eval_data:
        held = read_rows(eval_data, text_field)
    elif len(rows) == 1:
        rows, held = _cut(rows[0], eval_fraction, data)
    else:
        count = min(len(rows) - 1, max(1, round(eval_fraction * len(rows))))
        chosen = set(random.Random(seed).sample(range(len(rows)), count))
        held = [row for i, row in enumerate(rows) if i in chosen]
        rows = [row for i, row in enumerate(rows) if i not in chosen]
    train_documents = tokenize(rows, tokenizer, notes)
    held_documents = tokenize(held, tokenizer, notes)
    train = Blocks(train_documents, max_length, tokenizer.eos_token_id)
    heldout = Blocks(held_documents, max_length, tokenizer.eos_token_id)
    for blocks, path in ((train, data), (heldout, eval_data or data)):
        if not len(blocks):
            raise UserError(f"{path} holds no token to learn from; give a file with more text")
    first = held[0] if isinstance(held[0], str) else next(m["content"] for m in held[0] if m.get("content"))
    return Corpus(train, heldout, first, list(dict.fromkeys(notes)))


def read_rows(path: str, text_field: str | None) -> list[Any]:
    """The texts (str) or conversations (lists of messages) of a local file, empty ones left out. Raises UserError."""
    file = Path(path)
    if not file.is_file():
        what = "is a directory" if file.is_dir() else "does not exist"
        raise UserError(f"data file {path} {what}; give a .jsonl, .json, .txt or .parquet file")
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise UserError(f"data file {path} has an unknown type; give one of {', '.join(READERS)}")
    if file.stat().st_size == 0:
        raise UserError(f"data file {path} is empty; give a file with text in it")
    import datasets

    datasets.disable_progress_bars()
    # One document per file for plain text: packing cuts it into blocks anyway, and keeps its line breaks.
    options = {"sample_by": "document"} if reader == "text" else {}
    try:
        table = datasets.load_dataset(reader, data_files=str(file), split="train", **options)
    except Exception as error:
        cause = error.__cause__ or error
        raise UserError(f"cannot read {path} as {reader}: {one_line(cause)}") from error
    columns = table.column_names
    if text_field is None:
        text_field = next((name for name in ("text", "messages") if name in columns), None)
        if text_field is None:
            raise UserError(f"{path} has neither 'text' nor 'messages'; name one of {columns} with --text-field")
    if text_field not in columns:
        raise UserError(f"{path} has no field {text_field!r}; name one of {columns} with --text-field")
    rows = []
    for number, row in enumerate(table[text_field], 1):
        if row is None or row == [] or (isinstance(row, str) and not row.strip()):
            continue
        if not isinstance(row, str) and not _is_conversation(row):
            raise UserError(f"{path}, row {number}: {text_field!r} must be text or a list of role/content messages")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} has no text in {text_field!r}; the fields are {columns}")
    return rows


def _cut(row: Any, share: float, path: str) -> tuple[list[Any], list[Any]]:
    """A lone text, cut at a line break so that about `share` of it is held out. Raises UserError."""
    text = row.rstrip() if isinstance(row, str) else ""
    end = text.rfind("\n", 0, math.ceil((1 - share) * len(text)))
    start = text[:end] if end > 0 else ""
    if not start.strip():
        what = "text of one line" if text else "conversation"
        raise UserError(f"{path} holds a lone {what}, so nothing can be held out; give --eval-data")
    return [start + "\n"], [text[end + 1 :]]


def _is_conversation(row: Any) -> bool:
    return isinstance(row, list) and all(isinstance(m, dict) and "role" in m and "content" in m for m in row)


def tokenize(rows: list[Any], tokenizer: Any, notes: list[str]) -> list[Document]:
    """Texts and conversations as tokens. `notes` gets a line when a chat template cannot mark the assistant's part."""
    documents = []
    texts = [row for row in rows if isinstance(row, str)]
    if texts:
        for ids in tokenizer(texts, add_special_tokens=True, verbose=False)["input_ids"]:
            documents.append(Document(ids, [True] * len(ids)))
    chats = [row for row in rows if not isinstance(row, str)]
    if chats and not tokenizer.chat_template:
        raise UserError("the data holds chat messages but the tokenizer has no chat template; use a chat model or text")
    marks = bool(chats) and "{% generation" in tokenizer.chat_template.replace("{%-", "{%")
    if chats and not marks:
        notes.append("the chat template does not mark the assistant's tokens: the loss counts every token")
    for chat in chats:
        messages = [{key: value for key, value in message.items() if value is not None} for message in chat]
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=marks
        )
        ids = list(encoded["input_ids"])
        documents.append(Document(ids, [bool(m) for m in encoded["assistant_masks"]] if marks else [True] * len(ids)))
    return documents


def steps_per_epoch(blocks: int, batch_size: int, gradient_accumulation: int, processes: int = 1) -> int:
    """Optimizer steps in one pass over the blocks; the last, smaller batch counts."""
    batches = math.ceil(math.ceil(blocks / processes) / batch_size)
    return max(1, math.ceil(batches / gradient_accumulation))
