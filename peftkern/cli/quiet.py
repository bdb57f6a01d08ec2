"""Keeps other libraries' notices out of the terminal: what matters is in our own lines."""

from __future__ import annotations

import logging
import os
import warnings

from rich.console import Console


def console() -> Console:
    """The terminal, or plain text that no width breaks where the output goes to a file."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=100_000, soft_wrap=True)


def quiet_libraries() -> None:
    """Errors only from Transformers, datasets and what they import; must run before they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    for name in ("datasets", "bitsandbytes", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|torch")
