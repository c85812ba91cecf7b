"""What stands for a CUDA graph where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable

from vlm.training.capture import Graph


class Rerun(Graph):
    """Runs again what it was to record."""

    def capture(self, function: Callable[[], None]) -> None:
        """Keeps the function."""
        self._graph = function

    def replay(self) -> None:
        """Runs it."""
        self._graph()
