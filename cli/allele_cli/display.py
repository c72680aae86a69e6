"""A run on the terminal: a bar, the reward, what is happening; the same for local mode and `allele watch`."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from allele.protocol import progress as wire


class Display:
    """Context manager; without a terminal it prints one line every tenth of the run."""

    def __init__(self, title: str) -> None:
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._interactive = self._bar.console.is_terminal
        self._task = self._bar.add_task(title, total=None, note="starting")
        self._printed = -1
        self._probes = "ProbesPassed"

    def __enter__(self) -> Display:
        if self._interactive:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._interactive:
            self._bar.stop()

    def say(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, soft_wrap=True)

    def show(self, p: wire.Progress) -> None:
        note = p.phase if p.reward is None else f"reward {p.reward.mean:.3f} (worst {p.reward.worst:.2f})"
        note += f" · {p.committed} revisions, {p.exposed} exposed" if p.committed else ""
        if p.probes is not None and p.probes.reason != self._probes:
            self._probes = p.probes.reason
            self.say(f"step {p.step}/{p.steps}: {p.probes.message}")
        self._bar.update(self._task, completed=p.step, total=p.steps, note=note)
        tenth = 10 * p.step // max(1, p.steps)
        if not self._interactive and tenth > self._printed:
            self._printed = tenth
            self.say(f"step {p.step}/{p.steps}: {note}")
