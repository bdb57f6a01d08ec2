"""The output directory: who may write into it, what a run leaves there, and how a later run goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, TypeVar

from peftkern.formats.atomic import atomic_write_text
from peftkern.training.errors import UserError
from peftkern.training.model import read_json
from peftkern.training.settings import FinetuneSettings, TrainSettings, flag

S = TypeVar("S", bound=TrainSettings)

SETTINGS = "settings.json"
REPORT = "report.json"
# Settings that may differ between a run and its continuation: they change nothing that is trained.
_FREE = {"output", "resume", "overwrite", "prompt", "sample_tokens", "save_steps", "save_total_limit", "logging_steps"}


def prepare(settings: TrainSettings, kind: str, resume: bool = False) -> Path:
    """Makes the output directory and proves that it can be written, before anything costly happens.

    Args:
        settings: of the verb.
        kind: what will be saved there: "adapter", "model" or "report".
        resume: whether an earlier run goes on there.

    Raises:
        UserError: it is a file, cannot be written, holds something and neither --resume nor --overwrite was given, or
            holds what would be loaded together with the results: the base, or results of the other kind.
    """
    assert settings.output is not None
    directory = Path(settings.output)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--output {directory} is a file; give a directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".peftkern-"):
            pass
    except OSError as error:
        raise UserError(f"--output {directory} cannot be written: {error.strerror}; give another directory") from None
    if any(directory.iterdir()) and not (resume or settings.overwrite):
        raise UserError(f"--output {directory} is not empty; add --resume or --overwrite, or give another directory")
    if settings.model and Path(settings.model).is_dir() and os.path.samefile(settings.model, directory):
        raise UserError(f"--output {directory} is the base model itself; give another directory")
    # Transformers loads an adapter_config.json beside a model along with it.
    other = {"adapter": "config.json", "model": "adapter_config.json"}.get(kind)
    if other is not None and (directory / other).exists():
        raise UserError(f"--output {directory} holds {other} of other results; delete them or give another directory")
    return directory


def discard_checkpoints(directory: Path) -> None:
    """Removes the checkpoints of an earlier run; its results stay until the new ones replace them."""
    for path in directory.glob("checkpoint-*"):
        if path.is_dir() and path.name.removeprefix("checkpoint-").isdigit():
            shutil.rmtree(path)


def remember(settings: TrainSettings, directory: Path) -> None:
    """Keeps the settings beside the results, for --resume and for the curious."""
    atomic_write_text(directory / SETTINGS, json.dumps(dataclasses.asdict(settings), indent=2) + "\n")


def recall(new: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run that --resume goes on with, so that only --output needs to be repeated.

    Args:
        new: what the command line and the --config file set now.

    Returns:
        The earlier run's values for every setting, with those that change nothing in training taken from `new`.

    Raises:
        UserError: no earlier run there, or a setting that would make it another training.
    """
    directory = new.get("output")
    if not directory:
        raise UserError("--resume needs --output, the directory of the run to go on with")
    stored = read_json(Path(directory) / SETTINGS)
    if not isinstance(stored, dict):
        raise UserError(f"--resume: {directory} holds no run to go on with; start one without --resume")
    names = {f.name for f in dataclasses.fields(FinetuneSettings)}
    stored = {name: value for name, value in stored.items() if name in names}
    for name, value in new.items():
        if name in names - _FREE and name in stored and _differs(stored[name], value):
            raise UserError(
                f"--resume: the run in {directory} had {flag(name)} {stored[name]}, not {value}; "
                "leave it out, or start anew in another directory"
            )
    return {**stored, **{k: v for k, v in new.items() if k in _FREE}, "resume": True, "overwrite": False}


def _differs(old: Any, new: Any) -> bool:
    if isinstance(old, str) and isinstance(new, str) and os.path.exists(old) and os.path.exists(new):
        return not os.path.samefile(old, new)
    return old != new
