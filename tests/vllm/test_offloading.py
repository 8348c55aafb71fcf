"""Blocks that vLLM copies to the host come back when the device's memory was given away.

vLLM's connector, scheduler, managers and tiers are its own. Its copier needs a GPU; the one here
copies in a thread, after a delay (`helpers/delayed_copier.py`).
"""

from pathlib import Path
from typing import Any

import pytest
from helpers.engines import VANILLA, Offline, offline_in, report_of
from helpers.offload_plugin import TIERS_SPEC
from helpers.offload_runs import GONE, MIB, check_race, copier, end_of, offloading, race, two_ranks

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

OWN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
# Keys of blocks are hashes, which two processes find alike if they are told the seed.
SAME_HASHES = {"PYTHONHASHSEED": "0"}
PAGE_MIB = 16


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, dict[str, Any]]:
    """Return what an engine and the same engines without us report of the same prompts."""
    folder = tmp_path_factory.mktemp("offloading")
    start = offline_in(folder, model)
    acts = [
        "one_by_one",
        "last_request",
        "give_with_open_jobs",
        "give_beside_open_jobs",
        "reset_with_open_jobs",
        "sleep_with_open_jobs",
        "load_other_blocks",
    ]
    started = {
        "plain": start(VANILLA, "offload_rounds"),
        "ours": start(offloading(folder), "offload_rounds", copier=copier(folder), acts=acts),
        "vanilla": start(
            VANILLA,
            "offload_rounds",
            copier=copier(folder, copier_report=str(folder / "vanilla.json")),
            acts=["stop_and_keep_tier"],
        ),
    }
    return {name: report_of(one) for name, one in started.items()}


class TestOneEngine:
    def test_tokens_are_those_of_vanilla_with_and_without_a_connector(self, reports: Any) -> None:
        assert reports["ours"]["tokens"] == reports["vanilla"]["tokens"]
        assert reports["ours"]["tokens"] == reports["plain"]["tokens"]
        assert len({tuple(tokens) for tokens in reports["ours"]["tokens"][0]}) > 10
        assert reports["ours"]["num_hit_tokens"] >= reports["vanilla"]["num_hit_tokens"] > 0

    def test_tokens_are_others_where_other_blocks_are_loaded(self, reports: Any) -> None:
        report = reports["ours"]
        assert report["spoiled_hits"] > 0
        assert report["spoiled_tokens"] != report["tokens"][0]

    def test_all_full_chunks_come_back_after_the_memory_was_given_away(self, reports: Any) -> None:
        report = reports["ours"]
        assert report["after_trim"]
        assert all(pages == [[0]] for pages in report["after_trim"])
        assert all(found == full > 0 for found, full in report["hits"])

    def test_what_is_loaded_was_stored(self, reports: Any) -> None:
        copied = reports["ours"]["copied"]
        assert copied["loads"] > 0
        assert copied["stored_bytes"] >= copied["loaded_bytes"] / 3 > 0

    def test_no_copy_keeps_pages_of_an_engine_whose_caller_has_its_answers(
        self, reports: Any
    ) -> None:
        report = reports["ours"]
        assert (report["open_after_last"], report["held_after_last"]) == (0, False)
        assert len(report["pages_after_last"][0]) <= 2

    def test_a_reset_that_stops_requests_and_keeps_the_tier_ends_vanilla_too(
        self, reports: Any
    ) -> None:
        assert reports["vanilla"]["ended_by"] == "assert self._jobs[any_jid].is_store"

    def test_memory_is_given_behind_open_copies_and_no_request_stops_for_it(
        self, reports: Any
    ) -> None:
        report = reports["ours"]
        assert report["open_at_give"] > 0
        assert report["num_given"] * PAGE_MIB >= 256
        assert report["num_steps_after_copies"] <= 2
        assert report["num_preempted"] == 0
        assert report["right_after_give"]

    def test_pages_go_with_their_own_copies_while_others_are_always_open(
        self, reports: Any
    ) -> None:
        report = reports["ours"]
        assert report["num_of_first"] > 0
        assert report["num_steps_beside_copies"] <= 2
        assert report["num_jobs_beside"] > 0
        assert report["later_is_kept"]
        assert report["after_beside"] == [[0]]

    def test_a_reset_of_cache_and_connector_waits_for_open_copies(self, reports: Any) -> None:
        report = reports["ours"]
        assert report["open_at_reset"] > 0
        assert report["reset"]
        assert len(report["after_reset"][0]) <= 2
        assert report["right_after_reset"]
        assert report["hits_after_reset"] == 0

    def test_a_reset_of_the_cache_alone_keeps_pages_until_they_are_copied(
        self, reports: Any
    ) -> None:
        report = reports["ours"]
        assert report["open_at_cache_reset"] > 0
        assert len(report["kept_by_copies"][0]) > 2
        assert len(report["after_copies"][0]) <= 2
        assert report["right_after_cache_reset"]
        assert report["hits_after_cache_reset"] > 0

    def test_a_sleep_with_open_copies_leaves_page_0_and_the_next_answer_right(
        self, reports: Any
    ) -> None:
        report = reports["ours"]
        assert report["open_at_sleep"] > 0
        assert report["asleep"] == [[0]]
        assert report["right_after_sleep"]


@pytest.mark.every_release
def test_contexts_of_four_times_the_memory_are_answered_as_by_vanilla_from_the_tier(
    start_offline: Offline, tmp_path: Path
) -> None:
    acts = ["contexts_beyond_memory"]
    started = [
        start_offline(VANILLA, "offload_rounds", acts=acts),
        start_offline(offloading(tmp_path), "offload_rounds", copier=copier(tmp_path), acts=acts),
    ]
    vanilla, report = map(report_of, started)
    assert report["context_tokens"] >= 4 * report["limit_tokens"]
    assert report["context_answers"] == vanilla["context_answers"]
    assert report["context_preemptions"] > 0
    # What the device kept of the first round is a quarter of it.
    assert report["context_hits"][1] >= report["context_tokens"] / 2
    assert report["context_pages"] <= 5


@pytest.mark.every_release
def test_no_copy_meets_a_page_that_was_given_away(start_offline: Offline, tmp_path: Path) -> None:
    check_race(race(start_offline, tmp_path, seed=0, num_requests=100))


@pytest.mark.every_release
@pytest.mark.parametrize("seed", range(1, 6))
def test_none_does_in_a_long_race(start_offline: Offline, tmp_path: Path, seed: int) -> None:
    check_race(race(start_offline, tmp_path, seed=seed, num_requests=500), min_preemptions=1)


@pytest.mark.every_release
def test_the_race_is_lost_where_no_copy_holds_a_page(
    start_offline: Offline, tmp_path: Path
) -> None:
    lost = 0
    for seed in range(1, 6):
        folder = tmp_path / str(seed)
        folder.mkdir()
        end = end_of(race(start_offline, folder, seed=seed, num_requests=500, holds=False))
        lost += any(word in end for word in GONE)
    assert lost >= 4


@pytest.fixture(scope="module")
def disk_reports(tmp_path_factory: pytest.TempPathFactory, model: Path) -> list[dict[str, Any]]:
    """Return what an engine with a tier on disk reports, and the next one on the same disk."""
    folder = tmp_path_factory.mktemp("disk")
    root = str(folder / "disk")
    tiers = {
        "spec": TIERS_SPEC,
        "num_bytes": 4 * MIB,  # chunks of 1 MiB
        "secondary_tiers": [{"type": "fs", "root_dir": root}],
    }
    environ = offloading(folder) | SAME_HASHES | OWN_PROCESS
    start, options = offline_in(folder, model), {"copier": copier(folder, **tiers), "root": root}
    return [
        report_of(start(environ, "offload_disk", **options, **more))
        for more in ({}, {"remove": True, "kill": True})
    ]


@pytest.mark.every_release
class TestDisk:
    def test_blocks_outlive_the_engine(self, disk_reports: Any) -> None:
        first, again = disk_reports
        assert first["tokens"] == again["tokens"]
        assert first["num_files"] == again["num_files"] > 4
        assert (first["hits"], first["copied"]["loads"]) == (0, 0)
        assert again["hits"] == again["num_files"] * 32
        assert again["copied"]["loads"] > 0
        for report in disk_reports:
            assert report["given"]["resident_bytes"] == report["given"]["page_bytes"]

    def test_what_a_disk_did_is_told_with_bytes_tokens_and_seconds(self, disk_reports: Any) -> None:
        first, again = (report["counted"] for report in disk_reports)
        num_chunks = disk_reports[0]["num_files"]
        assert first["stored_bytes"] == again["loaded_bytes"] == num_chunks * MIB
        assert (first["loaded_bytes"], again["stored_bytes"]) == (0, 0)
        assert again["hit_tokens"] == num_chunks * 32 == disk_reports[1]["hits"]
        assert again["num_chunk_hits"] == num_chunks
        assert first["store_seconds"] > 0
        assert again["load_seconds"] > 0

    def test_what_was_removed_is_written_again_once_host_memory_has_it_no_more(
        self, disk_reports: Any
    ) -> None:
        _, again = disk_reports
        removed = again["removed"]
        assert removed["tokens"] == again["tokens"]
        assert removed["host_hits"] == 96  # all of it, and nothing of it was written
        assert removed["later_hits"] == 0
        assert removed["num_files"] == [again["num_files"] - 3, again["num_files"]]

    def test_host_memory_of_a_killed_engine_is_free_with_its_last_process(
        self, disk_reports: Any
    ) -> None:
        assert not Path(disk_reports[1]["region"]).exists()


@pytest.mark.every_release
def test_holds_of_two_ranks_end_when_both_have_reported(
    start_offline: Offline, tmp_path: Path
) -> None:
    elastic, vanilla = two_ranks(start_offline, tmp_path)
    assert elastic["tokens"] == vanilla["tokens"]
    assert elastic["after_trim"] == [[[0], [0]]]
    assert elastic["num_hit_tokens"] > 0
    assert elastic["kept_by_one_rank"]
    assert all(elastic["kept_by_one_rank"])
    assert elastic["after_both_ranks"] == [[0], [0]]
