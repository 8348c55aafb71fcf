"""An event loop whose clock goes on only when nothing is left to do: timers cost no time."""

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


class _Selector(selectors.SelectSelector):
    """Moves its loop's clock on in place of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if ready := super().select(0):
            return ready
        assert timeout is not None, "everybody waits, and nothing will wake anybody"
        self.now += timeout
        return []


class SimulatedLoop(asyncio.SelectorEventLoop):
    """A loop for one thread's coroutines, without sockets."""

    def __init__(self) -> None:
        self._simulated = _Selector()
        super().__init__(self._simulated)

    def time(self) -> float:
        return self._simulated.now


def run_simulated(main: Callable[[], Awaitable[Result]]) -> Result:
    """Run a coroutine function on a simulated loop; time starts at 0."""

    async def run() -> Result:
        return await main()

    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(run())
