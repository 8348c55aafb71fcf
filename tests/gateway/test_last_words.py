"""What a log of each engine says of why a start failed; the logs are recorded ones, shortened."""

from pathlib import Path

import pytest

from kvcached_gateway.engines.last_words import END_BYTES, cause, log_end

LOGS = Path(__file__).with_name("logs")


@pytest.mark.parametrize("log", sorted(LOGS.glob("*.log")), ids=lambda log: log.stem)
def test_the_cause_is_what_the_process_that_failed_raised(log: Path) -> None:
    assert cause(log_end(log)) == log.with_suffix(".cause").read_text().strip()


def test_what_other_processes_raise_counts_where_there_is_nothing_else() -> None:
    around = "RuntimeError: Engine core initialization failed. See root cause above."
    assert cause(f"INFO it starts\n{around}") == around


def test_a_line_of_ours_without_an_exception_is_a_cause() -> None:
    text = "kvcached: KVCACHED_LIMIT is 'much'; write a size\nand no more"
    assert cause(text) == "kvcached: KVCACHED_LIMIT is 'much'; write a size"


def test_what_only_informs_is_no_cause() -> None:
    prefix = "(EngineCore pid=7) INFO 11-29 09:24:58 [core.py:15] "
    assert cause(f"{prefix}kvcached: the pool is at 0x7f\n{prefix}ValueError: none") == ""
    assert cause("") == ""


def test_the_end_of_a_long_log_is_read_and_what_came_before_a_start_is_not(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("old\n" + "x" * END_BYTES + "\nlast\n")
    assert log_end(log).endswith("\nlast")
    assert "old" not in log_end(log)
    assert log_end(log, start=log.stat().st_size - 5) == "last"
    assert log_end(tmp_path / "none.log") == ""
