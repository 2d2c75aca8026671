"""What a person sees while training runs: one live line on a terminal, whole lines everywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import IO, TYPE_CHECKING, Any

from posttrain_lib.schema.reports import StepReport
from posttrain_lib.tracking.sinks import RunFacts

if TYPE_CHECKING:
    from rich.live import Live


class ProgressLine:
    """A progress bar in lines: Metaflow and log files show whole lines only. One every few seconds, plus events."""

    def __init__(self, every_seconds: float = 5.0) -> None:
        self._every_seconds = every_seconds
        self._last = -every_seconds
        self._started: tuple[float, int] | None = None

    def line(self, report: StepReport) -> str | None:
        """The line to print for this report, or None to stay quiet."""
        now = time.monotonic()
        if not is_notable(report) and now - self._last < self._every_seconds:
            self._begin(report, now)
            return None
        self._last = now
        return self.text(report, now)

    def text(self, report: StepReport, now: float | None = None) -> str:
        """The line of a report, whether it is time for one or not."""
        now = time.monotonic() if now is None else now
        started, first = self._begin(report, now)
        filled = round(20 * report.step / max(1, report.total_steps))
        parts = [f"[{'#' * filled}{'.' * (20 - filled)}] {report.step}/{report.total_steps}"]
        if report.loss is not None:
            parts.append(f"loss {report.loss:.4f}")
        if report.step > 0:
            parts += [f"{report.tokens_per_second:,.0f} tok/s", f"fill {report.fill:.3f}"]
        if report.mfu is not None:
            parts.append(f"MFU {report.mfu:.1%}{_hardware(report)}")
        if (reward := report.figures.get("reward/mean")) is not None:
            parts.append(f"reward {reward:.3f}")
        if report.held_out is not None:
            # of rollouts the value that picks the best checkpoint says nothing that its figures do not
            told = "" if "reward" in report.held_out_figures else f" {report.held_out['all']:.4f}"
            parts.append(f"held-out{told}")
            first_figures = list(report.held_out_figures.items())[:_FIGURES]
            parts += [f"{name.rpartition('/')[2]} {value:.3f}" for name, value in first_figures]
        if first < report.step < report.total_steps:
            left = (now - started) / (report.step - first) * (report.total_steps - report.step)
            parts.append(f"ETA {int(left) // 60}:{int(left) % 60:02d}")
        if report.event:
            parts.append(f"({report.event})")
        return "  ".join(parts)

    def _begin(self, report: StepReport, now: float) -> tuple[float, int]:
        if self._started is None:
            self._started = (now, report.step)
        return self._started


def is_notable(report: StepReport) -> bool:
    """Whether a report has more to say than the next step."""
    return bool(report.event) or report.held_out is not None or report.step == report.total_steps


def _hardware(report: StepReport) -> str:
    """HFU, where more is computed than the trained model needs."""
    if report.hfu is None or report.hardware_flops <= report.model_flops:
        return ""
    return f" (HFU {report.hfu:.1%})"


#: of the loss's own figures on the held-out examples
_FIGURES = 2


class Terminal:
    """Lines through ``say``; on a terminal one line that stays, with what is notable left above it.

    Args:
        say: prints one line. stream: where a live line would go.
    """

    name = "terminal"
    repeats = True

    def __init__(self, say: Callable[[str], None], stream: IO[str]) -> None:
        self._say, self._stream = say, stream
        self._bar = ProgressLine()
        self._live: Live | None = None

    def open(self, facts: RunFacts, earlier: Any) -> None:
        """A live line only where somebody looks at it."""
        if self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=self._stream), auto_refresh=False)
            self._live.start()

    def step(self, report: StepReport) -> None:
        """Show it."""
        if self._live is None:
            line = self._bar.line(report)
            if line:
                self._say(line)
            return
        from rich.text import Text

        text = Text(self._bar.text(report), overflow="ellipsis", no_wrap=True)
        if is_notable(report):
            self._live.console.print(text)
        self._live.update(text, refresh=True)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Give the terminal back."""
        if self._live is not None:
            self._live.stop()
