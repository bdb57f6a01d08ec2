"""`peftkern merge`: write an adapter into its base model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from peftkern.training.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")


def register(app: Any) -> None:
    """Adds the verb to the app."""
    app.command("merge", help="Merge a LoRA or QLoRA adapter into its base and save the dense model.")(merge)


def merge(
    adapter: Annotated[str, typer.Option(help="Directory of the adapter.", metavar="DIR")],
    output: Annotated[str, typer.Option(help="Directory for the merged model.", metavar="DIR")],
    model: Annotated[
        str | None, typer.Option(help="Base model; default the one the adapter names.", metavar="DIR|ID")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the merged weights; default the base's own.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files in --output.")] = False,
) -> None:
    """Merges and says where; see `peftkern.training.merge.merge_adapter` for what it raises."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    from peftkern.cli.quiet import console, quiet_libraries

    quiet_libraries()
    from peftkern.training.merge import merge_adapter

    saved = merge_adapter(adapter, model, output, dtype, overwrite)
    console().print(f"merged model saved in {saved}", highlight=False)
