"""Flags made from a settings dataclass, so that flags, YAML keys and help have one source."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from peftkern.training.settings import TrainSettings, flag, parse_mapping


def settings_command(cls: type[TrainSettings], run: Callable[[str | None, dict[str, Any]], int | None]) -> Callable:
    """A typer command with a flag for each setting and --config.

    Args:
        cls: the verb's settings; the help of each field comes from it.
        run: called with the --config path and what the command line set; returns the exit code.
    """
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}

    def command(**flags: Any) -> int | None:
        config = flags.pop("config")
        given: dict[str, Any] = {}
        for name, value in flags.items():
            if _is(hints[name], dict):
                given[name] = parse_mapping(value, name)
            elif isinstance(value, list):
                given[name] = [part for item in value for part in _split(item)]
            else:
                given[name] = value
        return run(config, given)

    config_help = "YAML file with any of these settings; flags win over it."
    parameters = [_parameter("config", str | None, typer.Option("--config", help=config_help, metavar="FILE"))]
    for name, field in fields.items():
        kind, names = _flag_type(hints[name]), [flag(name)]
        if hints[name] is bool:
            names = [f"{flag(name)}/--no-{flag(name)[2:]}"]
        option = typer.Option(*names, help=_help(field), metavar=_metavar(field, kind), show_default=False)
        parameters.append(_parameter(name, kind, option))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])


def _flag_type(hint: Any) -> Any:
    """The type the option parser sees: everything optional, so that "not given" can be told from a value."""
    if _is(hint, list) or _is(hint, dict):
        return list[str] | None
    plain = next((kind for kind in get_args(hint) if kind is not type(None)), hint)
    return plain | None


def _is(hint: Any, container: type) -> bool:
    return any(get_origin(kind) is container for kind in (hint, *get_args(hint)))


def _metavar(field: dataclasses.Field, kind: Any) -> str | None:
    if field.metadata["choices"]:
        return "|".join(field.metadata["choices"])
    return field.metadata["metavar"]


def _help(field: dataclasses.Field) -> str:
    default = field.default
    if default is dataclasses.MISSING or default is None or isinstance(default, bool):
        return field.metadata["help"]
    return f"{field.metadata['help']} [default: {default}]"


def _split(item: str) -> list[str]:
    """`q_proj,v_proj` is two names; anything that could be a regular expression stays whole."""
    return [part for part in item.split(",") if part] if re.fullmatch(r"[\w.,-]+", item) else [item]
