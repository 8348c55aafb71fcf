"""Which engines the benchmark of steps compares, and how it compares their kernels."""

from types import SimpleNamespace

import pytest
from parts import stopwatch
from parts.step_kernels import idle_times, longer
from vllm_steps import switches_of

pytestmark = pytest.mark.vllm


def options(*, no_control: bool = True, also: list[list[str]] | None = None) -> SimpleNamespace:
    return SimpleNamespace(no_control=no_control, page_sizes=["16MiB"], also=also or [])


def test_vanilla_comes_first_and_a_control_is_vanilla_too() -> None:
    switches = switches_of(options(no_control=False))
    assert list(switches) == ["vanilla", "control", "pages-16MiB"]
    assert switches["vanilla"] == switches["control"] == {"ENABLE_KVCACHED": "0"}


def test_another_elastic_engine_has_its_own_settings() -> None:
    calm = ["calm", "KVCACHED_IDLE_SECONDS=10", "KVCACHED_MIN_SPARE_PAGES=4"]
    assert switches_of(options(also=[calm]))["calm"] == {
        "ENABLE_KVCACHED": "1",
        "KVCACHED_IDLE_SECONDS": "10",
        "KVCACHED_MIN_SPARE_PAGES": "4",
    }


def test_kernels_are_compared_call_by_call_however_many_steps_a_run_took() -> None:
    vanilla = {"attention": [10.0, 100], "copy": [1.0, 10], "(idle)": [0.0, 0]}
    other = {"attention": [24.0, 200], "copy": [1.0, 10], "(idle)": [3.0, 4], "new": [5.0, 1]}
    assert longer(vanilla, other) == {"attention": 4.0, "copy": 0.0}


def test_pauses_are_counted_between_kernels_that_do_not_overlap() -> None:
    ms = 1_000_000
    spans = [(0, 2 * ms), (ms, 3 * ms), (3 * ms + 10_000, 4 * ms), (5 * ms, 6 * ms)]
    assert idle_times(spans) == {
        "(idle)": [pytest.approx(1.01), 2],
        "(idle, pauses above 20 us)": [pytest.approx(1.0), 1],
    }


def test_steps_with_driver_calls_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    now, num_calls = 0.0, 0

    def execute_model(*, seconds: float, num_more: int) -> None:
        nonlocal now, num_calls
        now, num_calls = now + seconds, num_calls + num_more

    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: now))
    scheduler = SimpleNamespace(schedule=lambda: None, update_from_output=lambda: None)
    executor = SimpleNamespace(execute_model=execute_model)
    core = SimpleNamespace(scheduler=scheduler, model_executor=executor)
    watch = stopwatch.Stopwatch(core, lambda: num_calls)
    for seconds, num_more in ((0.001, 0), (0.001, 0), (0.004, 2), (0.001, 0), (0.001, 1)):
        scheduler.schedule()
        executor.execute_model(seconds=seconds, num_more=num_more)
    found = watch.take()
    assert found["execute_model, median us"] == pytest.approx(1000)
    assert found["step to step, longest ms"] == pytest.approx(4)
    assert found["steps with driver calls"] == 1  # the last step has not ended
    assert found["steps with driver calls, median us"] == pytest.approx(4000)
    assert found["steps without driver calls, median us"] == pytest.approx(1000)
    assert watch.take()["steps with driver calls"] == 0
