"""Errors that the terminal shows as one line."""

from __future__ import annotations


class UserError(ValueError):
    """Something the person at the terminal can put right. The message is one line: what is wrong, then the cure."""


class Interrupted(Exception):
    """Ctrl-C ended the training after a step; the message says where the checkpoint is and how to go on."""


def one_line(error: BaseException) -> str:
    """The error's message on one line, without its details; the class's name when it has none."""
    text = " ".join(str(error).split())
    return text or type(error).__name__
