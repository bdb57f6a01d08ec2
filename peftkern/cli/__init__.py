"""The `peftkern` command. Importing this is light: every verb imports what it needs when it runs."""

from __future__ import annotations

import sys
import traceback
from typing import Any

USER_ERROR, FAILURE, INTERRUPTED = 2, 1, 130


def make_app() -> Any:
    """The typer app with every verb. Raises ImportError, with its cure, when typer is missing."""
    try:
        import typer
    except ImportError as error:
        raise ImportError('the peftkern command needs typer and rich; pip install "peftkern[cli]"') from error
    from peftkern.cli import compare, doctor, finetune, merge

    app = typer.Typer(
        name="peftkern",
        help="Parameter-efficient fine-tuning. `peftkern VERB --help` lists the verb's flags; every flag of a training "
        "verb is also a key of its --config file; --debug shows where an error came from.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    for module in (finetune, compare, merge, doctor):
        module.register(app)
    return app


def main(argv: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments after the program's name; default this process's.

    Returns:
        The exit code: 0, 1 for a failed check or a bug, 2 for input that cannot be used, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        app = make_app()
        code = app([a for a in arguments if a != "--debug"], prog_name="peftkern", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        print("peftkern: stopped by Ctrl-C; what was saved before that is whole", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        code, message = explain(error)
        if message is None:
            if not debug:
                traceback.print_exc()
            return code
        print(f"peftkern: {message}", file=sys.stderr)
        return code


def explain(error: Exception) -> tuple[int, str | None]:
    """The exit code and the one line for an error; no line for one that only a programmer can use."""
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # the option parser's own errors
        return USER_ERROR, f"error: {' '.join(error.format_message().split())}"
    from peftkern.training.errors import Interrupted, UserError, one_line

    if isinstance(error, Interrupted):
        return INTERRUPTED, one_line(error)
    if isinstance(error, UserError):
        return USER_ERROR, f"error: {one_line(error)}"
    kind = type(error).__name__
    if kind == "OutOfMemoryError":
        return USER_ERROR, (
            "error: the GPU is out of memory; lower --batch-size (and raise --gradient-accumulation as much), "
            "lower --max-length or add --gradient-checkpointing"
        )
    if isinstance(error, OSError) and error.errno == 28:
        return USER_ERROR, f"error: the disk is full ({one_line(error)}); free space or give another --output"
    if isinstance(error, (ValueError, OSError, ImportError)) or kind == "SafetensorError":
        return USER_ERROR, f"error: {one_line(error)}"
    if isinstance(error, RuntimeError) and "please report this" in str(error):
        return FAILURE, f"failure: {one_line(error)}"
    return FAILURE, None
