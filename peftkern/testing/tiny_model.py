"""A tiny random Llama with its own tokenizer, and small texts: tests of whole trainings run on them in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WORDS = ["the", "value", "of", "an", "expression", "is", "bound", "to", "a", "name", "in", "this", "scope"]


def make_base(directory: Path, template: str | None = None, seed: int = 0) -> Path:
    """Saves a random two-layer Llama of 64 positions and a word-level tokenizer that belongs to it.

    Args:
        directory: made by the save.
        template: the tokenizer's chat template.
        seed: of the weights.

    Returns:
        The directory.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    vocabulary = {word: index for index, word in enumerate(["<eos>", "<unk>", "user", "assistant", ":", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = template
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=True,
        )
    )
    logging.disable_progress_bar()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_texts(path: Path, count: int, seed: int = 0) -> Path:
    """Writes `count` documents as JSON lines. Every word follows from the one before: there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            start = int(torch.randint(len(WORDS), (1,), generator=generator))
            words = [WORDS[(start + 5 * i) % len(WORDS)] for i in range(24)]
            file.write(json.dumps({"topic": "t", "text": " ".join(words)}) + "\n")
    return path
