"""What a person sees while it runs: one line a step under a live bar, or plain lines where stdout is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

console = Console(highlight=False, soft_wrap=True)  # of a run; a path is not broken in the middle
HEADER_EVERY = 25  # lines, so that a header is always in sight


@dataclass(frozen=True)
class Column:
    """One column of the step line. names: metrics joined by arrows; keep: the highest goes last when it is tight."""

    title: str
    names: tuple[str, ...]
    width: int
    form: str
    keep: int
    style: str = ""


COLUMNS = (
    Column("pass", ("reward/pass_rate",), 5, "{:.3f}", 9, "bold"),
    Column("reward", ("reward/mean",), 6, "{:.3f}", 4),
    Column("failed→sel→acc", ("scope/failed", "scope/selected", "scope/accepted"), 14, "{:.0f}", 8, "green"),
    Column("loss rl", ("loss/rl",), 8, "{:+.4f}", 7),
    Column("loss nll", ("loss/nll",), 8, "{:+.4f}", 6),
    Column("grad", ("grad/norm",), 6, "{:.3f}", 3),
    Column("entropy", ("sampling/entropy",), 7, "{:.3f}", 5),
    Column("gap", ("sampling/logprob_gap",), 7, "{:.1e}", 1),
    Column("tok/s", ("perf/tokens_per_s",), 7, "{:,.0f}", 2),
    Column("s", ("time/step_s",), 6, "{:.1f}", 10),
)


def fit_columns(step_width: int, width: int | None) -> tuple[Column, ...]:
    """The columns that fit into `width` characters (None: all) beside the step, the least important dropped first."""
    columns = list(COLUMNS)
    while width is not None and step_width + sum(c.width + 2 for c in columns) > width and len(columns) > 1:
        columns.remove(min(columns, key=lambda c: c.keep))
    return tuple(columns)


def cell(column: Column, metrics: Mapping[str, float]) -> str:
    """A column's text, right-aligned; a metric that is undefined in this step shows as a dash."""
    parts = [column.form.format(metrics[name]) if name in metrics else "-" for name in column.names]
    text = "-" if set(parts) == {"-"} else "→".join(parts)
    return text.rjust(column.width)


class StepDisplay:
    """Prints a line for each training step; on a terminal, a progress bar with the time left stays below it.

    total_steps: of the whole run; done: steps already trained when a run is resumed. A context manager.
    """

    def __init__(self, total_steps: int, method: str, done: int = 0, console: Console | None = None) -> None:
        self.total_steps, self.method = total_steps, method
        self.console = console or Console(highlight=False)
        self.live = self.console.is_terminal
        self.step_width = max(4, 2 * len(str(total_steps)) + 1)
        self.columns = fit_columns(self.step_width, self.console.width if self.live else None)
        self.printed = 0
        self.progress = _bar(self.console)
        self.task = self.progress.add_task(method, total=total_steps, completed=done, note="")

    def __enter__(self) -> StepDisplay:
        if self.live:
            self.progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live:
            self.progress.stop()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Prints the line of `step` and moves the bar there."""
        if self.printed % HEADER_EVERY == 0:
            titles = [("step".rjust(self.step_width), "dim")]
            self._print(titles + [(c.title.rjust(c.width), "dim") for c in self.columns])
        self.printed += 1
        cells = [(f"{step}/{self.total_steps}".rjust(self.step_width), "cyan")]
        self._print(cells + [(cell(c, metrics), c.style) for c in self.columns])
        self.progress.update(self.task, completed=step)

    def _print(self, cells: list[tuple[str, str]]) -> None:
        if self.live:
            self.progress.console.print(Text("  ").join(Text(*c) for c in cells), no_wrap=True, crop=True)
        else:
            _plain_line(self.console, "  ".join(text for text, _ in cells))


@contextmanager
def progress_bars(console: Console | None = None) -> Iterator[Callable[..., None]]:
    """Bars for work before the first step (the warm start): yields report(what, done, total, note="").

    Each new `what` gets a bar of its own. Where stdout is no terminal, a plain line is printed at each tenth.
    """
    console = console or Console(highlight=False)
    if not console.is_terminal:
        yield _plain_report(console)
        return
    bars: dict[str, int] = {}
    with _bar(console) as progress:

        def report(what: str, done: int, total: int, note: str = "") -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=total, note=note)
            progress.update(bars[what], completed=done, note=note)

        yield report


def _plain_report(console: Console) -> Callable[..., None]:
    started: dict[str, float] = {}
    tenths: dict[str, int] = {}

    def report(what: str, done: int, total: int, note: str = "") -> None:
        begun = started.setdefault(what, time.perf_counter())
        tenth = 10 * done // total
        if tenth > tenths.get(what, 0):
            tenths[what] = tenth
            end = f"  {note}" if note else ""
            seconds = time.perf_counter() - begun
            _plain_line(console, f"{what}: {done}/{total} ({10 * tenth} %), {seconds:.0f} s{end}")

    return report


def _plain_line(console: Console, line: str) -> None:
    # not console.print, which wraps; and an arrow must not end a run whose log is ASCII
    encoding = console.encoding or "utf-8"
    console.file.write(line.encode(encoding, "replace").decode(encoding) + "\n")
    console.file.flush()


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=console,
        speed_estimate_period=300,  # seconds: steps may take minutes, and rich forgets after 30 s by default
    )
