"""An image as a host copy is taken of it: what its pages are now, and their bytes."""

from collections.abc import Callable, Sequence

from kvcached_core.weights.image import Image
from kvcached_core.weights.leeway import Leeway
from kvcached_core.weights.sums import Sums, begin_page_sums


class CopySource:
    """An image as a host copy is taken of it.

    Args:
        image: Of which the pages that are copied are resident.
        on_page: Called when a page is copied.
    """

    def __init__(self, image: Image, on_page: Callable[[], None]) -> None:
        self._image = image
        self._on_page = on_page
        self._leeway = Leeway(image.pages_tensor(0, 0).device)

    def sums(self, first: int, num_pages: int) -> Sequence[Sums]:
        """Return the sums of a run of pages as they are now; see `begin_sums`."""
        return self.begin_sums(first, num_pages)()

    def begin_sums(self, first: int, num_pages: int) -> Callable[[], Sequence[Sums]]:
        """Begin to take the sums of a run of pages; what this returns waits for them.

        Raises:
            OutOfMemoryError: If the device has not the little memory that it takes.
        """
        return self._leeway.use(lambda: begin_page_sums(self._image, first, num_pages))

    def copy_out(self, page: int, host_address: int) -> None:
        """Copy a page to host memory; return when it is done."""
        image = self._image
        image.backend.copy_out(host_address, image.page_address(page), image.page_bytes)
        image.backend.finish_copies()
        self._on_page()
