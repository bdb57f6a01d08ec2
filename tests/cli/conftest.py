"""A base model and texts for the command-line tests, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftkern.testing.tiny_model import make_base, make_texts


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(training, held-out)."""
    directory = tmp_path_factory.mktemp("texts")
    return make_texts(directory / "train.jsonl", 40), make_texts(directory / "heldout.jsonl", 4, seed=1)
