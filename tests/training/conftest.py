"""A base model and texts for the training tests, made once."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from peftkern.testing.tiny_model import make_base, make_texts
from peftkern.training.settings import FinetuneSettings


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(training, held-out)."""
    directory = tmp_path_factory.mktemp("texts")
    return make_texts(directory / "train.jsonl", 40), make_texts(directory / "heldout.jsonl", 4, seed=1)


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=500)


@pytest.fixture
def make_settings(base: Path, texts: tuple[Path, Path], tmp_path: Path) -> Callable[..., FinetuneSettings]:
    """FinetuneSettings for a run of 8 steps over two epochs, with any field replaced."""

    def make(**fields: object) -> FinetuneSettings:
        values = {
            "model": str(base),
            "data": str(texts[0]),
            "eval_data": str(texts[1]),
            "output": str(tmp_path / "out"),
            "max_length": 32,
            "max_steps": 8,
            "learning_rate": 1e-2,
            "sample_tokens": 0,
            "save_steps": 0,
        }
        settings = FinetuneSettings(**{**values, **fields})
        settings.validate()
        return settings

    return make
