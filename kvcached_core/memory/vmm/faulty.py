"""A layer that fails chosen calls, so that tests can see what a failure leaves behind."""

from collections.abc import Callable

from kvcached_core.errors import OutOfMemoryError
from kvcached_core.memory.vmm.backend import Backend, Layer, Result


class FaultyBackend(Layer):
    """Fails the calls that `fails` chooses, before they reach the backend below.

    Args:
        inner: The backend below.
        fails: Called with the verb and its running number, from 0; True makes that call fail.
    """

    def __init__(self, inner: Backend, fails: Callable[[str, int], bool]) -> None:
        super().__init__(inner)
        self.fails = fails
        self.num_calls: dict[str, int] = {}

    def _call(
        self, verb: str, num_bytes: int, function: Callable[..., Result], *args: object
    ) -> Result:
        number = self.num_calls.get(verb, 0)
        self.num_calls[verb] = number + 1
        if self.fails(verb, number):
            raise OutOfMemoryError(verb, f"injected at call {number}", num_bytes, 0)
        return function(*args)
