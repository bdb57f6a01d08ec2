"""What a person sees of a running training: a progress bar on a terminal, log lines elsewhere; and Ctrl-C."""

from __future__ import annotations

import math
import signal
import threading
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from peftkern.training.errors import UserError
from peftkern.training.memory import megabytes, peak


class ProgressCallback(TrainerCallback):
    """Loss, learning rate, tokens per second and peak memory: a bar on a terminal, a line per log elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.trainer: Any = None  # set by whoever makes the trainer: callbacks are made first
        self.bar: Progress | None = None
        self.status = ""
        self.start = self.last_step = 0.0

    @property
    def seconds(self) -> float:
        """From the start of training to the end of its last step; the save after that does not count."""
        return self.last_step - self.start

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = self.last_step = time.perf_counter()
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self.bar.start()
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last_step = time.perf_counter()
        if self.bar is not None:
            rate = self.trainer.tokens_seen / self.seconds
            self.bar.update(self.task, completed=state.global_step, description=f"{self.status}{rate:,.0f} tokens/s")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        loss = logs["loss"]
        if not math.isfinite(loss):
            raise UserError(f"training diverged: the loss is {loss} at step {state.global_step}; lower --learning-rate")
        self.status = f"loss {loss:.4f}  lr {logs['learning_rate']:.2e}  "
        if self.bar is None:
            rate = self.trainer.tokens_seen / self.seconds
            width = len(str(state.max_steps))
            self.console.print(
                f"  step {state.global_step:>{width}}/{state.max_steps}  {self.status}{rate:,.0f} tokens/s  "
                f"peak {megabytes(peak(args.device))}",
                highlight=False,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Takes the bar away; also after an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class InterruptCallback(TrainerCallback):
    """Ctrl-C lets the step end, saves a checkpoint and stops; a second Ctrl-C stops at once.

    A process that was started with Ctrl-C ignored (by nohup, or in the background of a script) goes on ignoring it.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.interrupted = False
        self.previous: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self.previous = signal.signal(signal.SIGINT, self._handle)

    def _handle(self, signum: int, frame: Any) -> None:
        self.interrupted = True
        self.restore()
        self.console.print("Ctrl-C: finishing this step and saving a checkpoint; once more to stop at once")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Puts the earlier Ctrl-C handler back; also after an error."""
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)
            self.previous = None
