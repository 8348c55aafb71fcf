"""A rank's weights on a real device: the same bytes after they went and came, changed or not."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.weight_ranks import NUM_PAGES, WeightedRank

from kvcached_core.memory.vmm.cuda import CudaBackend
from kvcached_core.units import MIB
from kvcached_core.weights.sums import begin_page_sums, begin_sums_of

pytestmark = pytest.mark.gpu

PAGE = 16 * MIB
WORDS = PAGE // 8
# Torch takes small tensors, such as the sums of pages, from segments of 2 MiB, and may take or give
# back some while pages go. A page is eight segments, so a page too many or too few still shows.
OF_TORCH_BYTES = 2 * 2 * MIB


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[WeightedRank]:
    made = WeightedRank(CudaBackend(), tmp_path, page_bytes=PAGE)
    made.weights._current_stream = lambda: int(torch.cuda.current_stream().cuda_stream)
    yield made.start()
    made.close()


def test_weights_are_the_same_after_a_drop_at_every_page(ours: WeightedRank) -> None:
    for num_pages in range(NUM_PAGES + 1):
        torch.cuda.empty_cache()  # it may go with the last page, and is no page of the weights
        free_bytes = torch.cuda.mem_get_info()[0]
        ours.weights.hold(num_pages)
        given_bytes = torch.cuda.mem_get_info()[0] - free_bytes
        assert abs(given_bytes - (NUM_PAGES - num_pages) * PAGE) <= OF_TORCH_BYTES
        ours.check(num_pages)
        ours.weights.hold(NUM_PAGES)
        ours.check(NUM_PAGES)  # it is launched while the copies are under way


def test_what_another_stream_is_given_waits_for_the_weights(ours: WeightedRank) -> None:
    for _ in range(5):
        ours.weights.hold(0)
        with torch.cuda.stream(torch.cuda.Stream()):
            ours.weights.hold(NUM_PAGES)
            found = ours.words().clone()
        torch.cuda.synchronize()
        assert found.equal(ours.content)


def test_a_page_that_a_kernel_has_just_changed_is_written_back(ours: WeightedRank) -> None:
    for page in (0, 7, NUM_PAGES - 1):
        ours.change(page * WORDS + 11, page)
        ours.weights.hold(0)
        ours.weights.hold(NUM_PAGES)
        ours.check(NUM_PAGES)
    assert ours.done.count("copy_out") == 3


def test_a_device_and_a_host_find_the_same_sums(ours: WeightedRank) -> None:
    there = begin_page_sums(ours.image, 0, NUM_PAGES)()
    assert there == begin_sums_of(ours.content.cpu().view(torch.int8), NUM_PAGES)()
    assert there == ours.copy.sums
