"""A layer that lets the backend below create only so much memory."""

from kvcached_core.errors import OutOfMemoryError
from kvcached_core.memory.vmm.backend import Backend, Handle, Layer


class LimitedBackend(Layer):
    """Refuses to create more than `limit_bytes` at a time."""

    def __init__(self, inner: Backend, limit_bytes: int) -> None:
        super().__init__(inner)
        self.limit_bytes = limit_bytes
        self.created_bytes = 0

    def create(self, num_bytes: int) -> Handle:
        """Return a handle, if the limit allows it.

        Raises:
            OutOfMemoryError: If the limit would be exceeded.
        """
        available_bytes = self.limit_bytes - self.created_bytes
        if num_bytes > available_bytes:
            raise OutOfMemoryError("create", "limit reached", num_bytes, available_bytes)
        handle = super().create(num_bytes)
        self.created_bytes += num_bytes
        return handle

    def release(self, handle: Handle) -> None:
        """Give the handle back and its bytes to the limit."""
        super().release(handle)
        self.created_bytes -= handle.num_bytes
