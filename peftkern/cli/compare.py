"""`peftkern compare`: every method on the same data, in one table."""

from __future__ import annotations

from typing import Any

from peftkern.cli.options import settings_command
from peftkern.training.settings import CompareSettings, build, gather


def register(app: Any) -> None:
    """Adds the verb to the app."""
    app.command("compare", help="Run full fine-tuning and every method on the same budget and compare them.")(
        settings_command(CompareSettings, run)
    )


def run(config: str | None, given: dict[str, Any]) -> int:
    """Runs the comparison; see `peftkern.training.compare.compare` for what it raises."""
    settings = build(CompareSettings, gather(CompareSettings, config, given))
    from peftkern.cli.quiet import console, quiet_libraries

    quiet_libraries()
    from peftkern.training.compare import compare

    compare(settings, console())
    return 0
