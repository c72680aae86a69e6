"""A progress bar on standard error for long work on a store; silent where that is not a terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)


class Bar:
    """Context manager; `show` is what long work calls as its progress."""

    def __init__(self, *columns: ProgressColumn) -> None:
        """`columns` stand where the count stands by default."""
        console = Console(stderr=True)
        middle = columns or (MofNCompleteColumn(),)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            *middle,
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total)
        self._bar.update(self._tasks[what], completed=done, total=total)
