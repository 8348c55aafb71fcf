"""Changes that wait for the lock: their sums say what they say one by one, and are written once."""

from dataclasses import replace

import pytest

from kvcached_core.ledger.activations import Activations
from kvcached_core.ledger.changes import Acknowledgement, Changes, PendingChanges
from kvcached_core.ledger.file import FILE_BYTES, Row, RowKey
from kvcached_core.ledger.weight_changes import WeightChanges

ROW, OTHER = RowKey(0, 7), RowKey(1, 8)
CHANGES = [
    Changes(acknowledgements=[Acknowledgement(coming_bytes=9, num_asked=None, freed_bytes=0)]),
    Changes(unpromised_bytes=1, counts=(5, 3)),
    Changes(mapped_bytes=20, unneeded_bytes=2),
    Changes(unmapped_bytes=4, stuck_bytes=3, counts=(6, 2)),
    Changes(is_waiting_over=True),
    Changes(weights=WeightChanges(mapped_bytes=7, offer=(9, 90))),
    Changes(weights=WeightChanges(announced=(30, True), activations=Activations.one(5))),
    Changes(weights=WeightChanges(mapped_bytes=11, unmapped_bytes=2, ended_wish=1)),
    Changes(weights=WeightChanges(offer=(3, 80), activations=Activations.one(6))),
]


def fresh_row() -> Row:
    row = Row(memoryview(bytearray(FILE_BYTES)).cast("q"), 0)
    row.promised_bytes, row.resident_bytes, row.coming_bytes = 100, 50, 30
    row.asked_bytes = row.waiting_bytes = row.static_bytes = 40
    row.weights_needed_bytes, row.weights_wish = 90, 1
    return row


def test_the_sum_of_changes_says_what_they_say_one_by_one() -> None:
    one_by_one, at_once, total = fresh_row(), fresh_row(), Changes()
    for changes in CHANGES:
        changes.write(one_by_one, 1)
        total.add(Changes(**vars(changes)))
    assert total.write(at_once, 1) == 20 + 7 + 11 + (40 - 7 - 30)
    for row in (one_by_one, at_once):
        assert (row.promised_bytes, row.resident_bytes) == (100 - 1 - 20 - 2, 50 + 20 - 4 + 16)
        assert (row.used_bytes, row.cached_bytes) == (6, 2)
        assert (row.asked_bytes, row.waiting_bytes, row.num_freed_bytes) == (0, 0, 4 + 2 + 3 + 2)
        assert row.coming_bytes == 30 + 9 - (4 + 2 + 3 + 2)
        assert (row.weights_bytes, row.static_bytes) == (7 + 11 - 2, 30 - 11)
        assert (row.weights_offered_bytes, row.weights_kept_until_ns) == (3, 80)
        assert (row.waking_since_ns, row.weights_wish) == (1, 0)
        assert Activations.read(row.activations).num == 2


AWAKE = Changes(weights=WeightChanges(mapped_bytes=90))
ASLEEP = Changes(weights=WeightChanges(unmapped_bytes=90))
AGAIN = Changes(weights=WeightChanges(announced=(90, True)))


@pytest.mark.parametrize(
    ("changes", "since", "static_bytes"),
    [
        ([AWAKE, ASLEEP], 0, 0),
        ([AWAKE, ASLEEP, AGAIN], 7, 90),
        ([AWAKE, ASLEEP, AGAIN, AWAKE], 0, 0),
        ([AGAIN], 1, 90),
    ],
)
def test_who_woke_and_slept_again_before_it_was_written_has_left_the_line(
    changes: list[Changes], since: int, static_bytes: int
) -> None:
    one_by_one, at_once, total = fresh_row(), fresh_row(), Changes()
    for row in (one_by_one, at_once):
        row.static_bytes, row.waking_since_ns = 90, 1
    for change in changes:
        change.write(one_by_one, 7)
        total.add(change)
    total.write(at_once, 7)
    for row in (one_by_one, at_once):
        assert (row.waking_since_ns, row.static_bytes) == (since, static_bytes)
    assert one_by_one.copy() == at_once.copy()


EXPECTED = Changes(weights=WeightChanges(expected_until_ns=70))
FAILED = Changes(weights=WeightChanges(expected_until_ns=0))
OFFERED = Changes(weights=WeightChanges(offer=(9, 90)))
BUSY = Changes(weights=WeightChanges(offer=(0, 0)))


@pytest.mark.parametrize(
    ("changes", "until_ns"),
    [
        ([EXPECTED], 70),
        ([EXPECTED, FAILED], 0),
        ([EXPECTED, OFFERED], 90),
        ([EXPECTED, BUSY], 0),
        ([BUSY, EXPECTED], 70),
        ([OFFERED, EXPECTED], 90),
        ([OFFERED, FAILED], 90),
        ([EXPECTED, OFFERED, BUSY], 0),
    ],
)
def test_news_of_weights_is_expected_until_they_are_offered(
    changes: list[Changes], until_ns: int
) -> None:
    one_by_one, at_once, total = fresh_row(), fresh_row(), Changes()
    for change in changes:
        change.write(one_by_one, 7)
        total.add(Changes(weights=replace(change.weights)))
    total.write(at_once, 7)
    assert one_by_one.weights_kept_until_ns == until_ns
    assert one_by_one.copy() == at_once.copy()


def test_what_is_taken_is_gone_and_each_rows_own() -> None:
    pending = PendingChanges()
    assert not pending.is_there
    pending.add(ROW, Changes(mapped_bytes=1))
    pending.add(ROW, Changes(mapped_bytes=2))
    pending.add(OTHER, Changes(unmapped_bytes=4))
    assert pending.is_there
    assert pending.take() == {ROW: Changes(mapped_bytes=3), OTHER: Changes(unmapped_bytes=4)}
    assert not pending.is_there
    pending.add(OTHER, Changes(unmapped_bytes=8))
    assert pending.take() == {OTHER: Changes(unmapped_bytes=8)}


def test_one_writer_at_a_time_is_asked_for_and_the_next_one_when_it_looks_no_more() -> None:
    pending = PendingChanges()
    assert pending.add(ROW, Changes(mapped_bytes=1))
    assert not pending.add(OTHER, Changes(mapped_bytes=1))
    assert pending.keep_writer()
    pending.take()
    assert not pending.add(ROW, Changes(mapped_bytes=1))  # the writer has not looked since
    assert pending.keep_writer()
    pending.take()
    assert not pending.keep_writer()
    assert pending.add(ROW, Changes(mapped_bytes=1))
    pending.drop_writer()
    assert pending.add(ROW, Changes(mapped_bytes=1))


@pytest.mark.parametrize("stuck_bytes", [0, 3, 500])
def test_what_is_stuck_is_resident_and_promised_as_before_and_not_on_its_way(
    stuck_bytes: int,
) -> None:
    row = fresh_row()
    Changes(stuck_bytes=stuck_bytes).write(row, 1)
    assert (row.promised_bytes, row.resident_bytes) == (100, 50)
    assert row.coming_bytes == max(30 - stuck_bytes, 0)
