"""`cuda.bindings.driver` on one device, and points in the work of its streams."""

import threading
from types import ModuleType
from typing import Any

from kvcached_core.errors import BackendError, OutOfMemoryError


class Driver:
    """`cuda.bindings.driver` on one device: one context, one error checker.

    Args:
        ordinal: The device's index among those that this process sees.
        api: The module; tests give another one.

    Raises:
        BackendError: If cuda-python, the driver or the device is missing.
    """

    def __init__(self, ordinal: int, api: ModuleType | None) -> None:
        self.api: Any = _load() if api is None else api
        self._success = self.api.CUresult.CUDA_SUCCESS
        self._threads = threading.local()
        self._context: Any = None
        self._run("cuInit", 0)
        (self.device,) = self._run("cuDeviceGet", ordinal)
        (self._context,) = self._run("cuDevicePrimaryCtxRetain", self.device)

    def call(self, name: str, *args: Any, num_bytes: int = 0) -> tuple[Any, ...]:
        """Call a function of the driver in the device's context and return what it returned.

        Raises:
            OutOfMemoryError: If the device has no memory left.
            BackendError: For any other error; both name the call, the code and `num_bytes`.
        """
        if not hasattr(self._threads, "is_current"):
            self._run("cuCtxSetCurrent", self._context)
            self._threads.is_current = True
        return self._run(name, *args, num_bytes=num_bytes)

    def _run(self, name: str, *args: Any, num_bytes: int = 0) -> tuple[Any, ...]:
        code, *values = getattr(self.api, name)(*args)
        if code != self._success:
            raise self._error(name, code, num_bytes)
        return tuple(values)

    def _error(self, name: str, code: Any, num_bytes: int) -> BackendError:
        results = self.api.CUresult
        text = getattr(code, "name", str(code))
        if code != results.CUDA_ERROR_OUT_OF_MEMORY:
            return BackendError(name, text, num_bytes)
        failed, free_bytes, _ = self.api.cuMemGetInfo()
        return OutOfMemoryError(
            name, text, num_bytes, free_bytes if failed == self._success else None
        )


class CudaFence:
    """An event behind the work that a stream had been given."""

    def __init__(self, driver: "Driver", stream: int) -> None:
        self._driver = driver
        flags = driver.api.CUevent_flags
        both = flags.CU_EVENT_BLOCKING_SYNC | flags.CU_EVENT_DISABLE_TIMING
        (self._event,) = driver.call("cuEventCreate", both)
        try:
            driver.call("cuEventRecord", self._event, stream)
        except BackendError:
            driver.call("cuEventDestroy", self._event)
            raise

    def wait(self) -> None:
        """Return when the work is done; without the interpreter's lock meanwhile."""
        if self._event is not None:
            self._driver.call("cuEventSynchronize", self._event)
            self.close()

    def join(self, stream: int) -> None:
        """Let later work on `stream` wait for the work; the host does not."""
        self._driver.call("cuStreamWaitEvent", stream, self._event, 0)

    def is_done(self) -> bool:
        """Return whether the work is done; nobody waits for it."""
        try:
            self._driver.call("cuEventQuery", self._event)
        except BackendError as error:
            if error.code != "CUDA_ERROR_NOT_READY":
                raise
            return False
        return True

    def close(self) -> None:
        """Give the event back; streams that wait for it go on waiting."""
        event, self._event = self._event, None
        if event is not None:
            self._driver.call("cuEventDestroy", event)


class StreamFence:
    """All work of a stream, also what it is given until somebody waits.

    It takes nothing of the driver, so it is there where an event is refused.
    """

    def __init__(self, driver: "Driver", stream: int) -> None:
        self._driver, self._stream = driver, stream

    def wait(self) -> None:
        """Return when all of that work is done."""
        self._driver.call("cuStreamSynchronize", self._stream)


def _load() -> ModuleType:
    try:
        from cuda.bindings import driver  # noqa: PLC0415  a host without a GPU does without it
    except ImportError as error:
        raise BackendError(
            "import cuda.bindings", f"{error}; install kvcached-elastic[cuda]", 0
        ) from error
    module: ModuleType = driver
    return module
