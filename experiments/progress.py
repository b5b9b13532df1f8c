"""Progress of meta-training: a bar on a terminal, a line now and then elsewhere."""

import math
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

_SMOOTHING = 0.95
_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Shows the smoothed meta-loss, inner steps per second and the time left."""

    def __init__(self, *, step: int, num_steps: int, inner: int):
        """Starts at `step` of `num_steps`, with `inner` inner steps per step."""
        self._console = Console()
        self._inner, self._total, self._step = inner, num_steps, step
        self._loss, self._weight, self._last_line = 0.0, 0.0, 0.0
        self._first, self._start = step, time.monotonic()
        self._bar: Bar | None = None

    def start(self, step: int, message: str) -> None:
        """Prints `message` and starts the clock, now that `step` is done."""
        self._console.print(message, highlight=False)
        self._first, self._start = step, time.monotonic()
        self._last_line = self._start
        if self._console.is_terminal:
            columns = [
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[s]}"),
            ]
            self._bar = Bar(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("", total=self._total, completed=step, s="")
            self._bar.start()

    def update(self, step: int, losses: list[float]) -> None:
        """Takes in the meta-losses of the steps up to `step`."""
        for loss in filter(math.isfinite, losses):
            self._loss = _SMOOTHING * self._loss + (1 - _SMOOTHING) * loss
            self._weight = _SMOOTHING * self._weight + (1 - _SMOOTHING)
        self._step = step
        if self._bar:
            self._bar.update(self._task, completed=step, s=self.text())
        elif (now := time.monotonic()) - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(f"step {step}/{self._total}  {self.text()}", flush=True)

    def text(self) -> str:
        """Returns the numbers behind the bar."""
        loss = f"{self._loss / self._weight:.4g}" if self._weight else "-"
        done = self._step - self._first
        rate = done / max(time.monotonic() - self._start, 1e-9)
        left = (self._total - self._step) / rate if rate else math.inf
        return (
            f"meta-loss {loss}  {_thousands(rate * self._inner)} inner steps/s  "
            f"{_clock(left)} left"
        )

    def close(self) -> None:
        """Takes the bar away and leaves one last line, if a step was taken."""
        if self._bar:
            self._bar.stop()
        if self._weight:
            print(f"step {self._step}/{self._total}  {self.text()}", flush=True)


def _thousands(rate: float) -> str:
    return f"{rate / 1000:.1f}k" if rate >= 1000 else f"{rate:.0f}"


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
