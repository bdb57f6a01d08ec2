"""`peftkern finetune`: train a model on a text with one of the methods."""

from __future__ import annotations

from typing import Any

from peftkern.cli.options import settings_command
from peftkern.training.settings import FinetuneSettings, build, gather


def register(app: Any) -> None:
    """Adds the verb to the app."""
    app.command("finetune", help="Fine-tune a causal language model; --config FILE.yaml takes every flag as a key.")(
        settings_command(FinetuneSettings, run)
    )


def run(config: str | None, given: dict[str, Any]) -> int:
    """Runs one fine-tuning; see `peftkern.training.run.finetune` for what it raises."""
    values = gather(FinetuneSettings, config, given)
    from peftkern.cli.quiet import console, quiet_libraries

    quiet_libraries()
    if values.get("resume"):
        from peftkern.training.output import recall

        values = recall(values)
    settings = build(FinetuneSettings, values)
    from peftkern.training.run import finetune

    finetune(settings, console())
    return 0
