"""Schedules for many models: popularity, bursts, pauses, and prompts that begin alike."""

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multi_model.client import prompts
from multi_model.conversations import FAN_OUT, MAX_TURNS, agents, returning
from multi_model.many_models import BURST_REQUESTS, dealt, many, serverless
from multi_model.popularity import counts_by_rank, fitted_exponent, shares
from multi_model.settings import GPU, HOST, LENGTHS, WORKLOADS, make_workload
from multi_model.traces import TraceRequest, read_arena, read_azure
from multi_model.workloads import Request, Workload

ARENA, AZURE = read_arena(), read_azure()


@given(st.integers(1, 60), st.floats(0.0, 4.0))
def test_shares_fall_by_rank_and_come_to_one(num_models: int, exponent: float) -> None:
    found = shares(num_models, exponent)
    assert sum(found) == pytest.approx(1)
    assert found == sorted(found, reverse=True)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.2, 3.0), st.integers(5, 40))
def test_the_exponent_of_exact_counts_is_found_again(exponent: float, num_models: int) -> None:
    counts = [round(1e9 * share) for share in shares(num_models, exponent)]
    assert fitted_exponent(counts) == pytest.approx(exponent, abs=1e-3)


def test_the_fitted_exponent_is_likelier_than_others() -> None:
    from math import log

    counts = counts_by_rank(ARENA)
    best = fitted_exponent(counts)

    def likelihood(exponent: float) -> float:
        found = shares(len(counts), exponent)
        return sum(count * log(share) for count, share in zip(counts, found, strict=True))

    assert all(likelihood(best) > likelihood(best + shift) for shift in (-0.05, 0.05))


def test_an_exponent_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="without requests"):
        fitted_exponent([])


@pytest.mark.parametrize("num_models", [12, 40])
def test_many_models_are_asked_by_popularity_in_bursts_at_the_rate(num_models: int) -> None:
    found = many(ARENA, num_models=num_models, rate=10, seconds=2000)
    assert len(found.requests) / 2000 == pytest.approx(10, rel=0.1)
    counts = Counter(request.model for request in found.requests)
    expected = shares(num_models, fitted_exponent(counts_by_rank(ARENA)))
    assert counts[0] / len(found.requests) == pytest.approx(expected[0], rel=0.2)
    assert counts[0] > counts[num_models // 2] > 0
    same = sum(before.model == after.model for before, after in pairwise(found.requests))
    by_chance = sum(share**2 for share in expected)
    assert same / len(found.requests) > 2 * by_chance  # bursts
    assert BURST_REQUESTS > 1


@pytest.mark.parametrize("speed", [1, 4])
def test_a_seldom_asked_model_is_asked_every_6_to_60_seconds(speed: int) -> None:
    seconds = 20_000 / speed
    found = serverless(ARENA, num_models=16, speed=speed, seconds=seconds)
    counts = Counter(request.model for request in found.requests)
    gaps = [seconds / counts[model] * speed for model in range(found.num_models)]
    assert gaps[0] == pytest.approx(6, rel=0.1)
    assert gaps[-1] == pytest.approx(60, rel=0.2)


def test_a_service_is_dealt_to_models_and_keeps_its_times_and_lengths() -> None:
    found = dealt(AZURE, ARENA, num_models=12, speed=5, seconds=60)
    taken = [entry for entry in AZURE if entry.at_seconds < 300]
    assert [request.at_seconds * 5 for request in found.requests] == pytest.approx(
        [entry.at_seconds for entry in taken]
    )
    assert sum(request.num_in for request in found.requests) == sum(e.num_in for e in taken)
    assert len({request.model for request in found.requests}) == 12
    together = TraceRequest(0.0, "a", 1, 1), TraceRequest(0.1, "a", 1, 1)
    for seed in range(20):  # what comes together stays together
        both = dealt(together, ARENA, num_models=12, speed=1, seconds=9, seed=seed)
        assert len({request.model for request in both.requests}) == 1


def test_a_returning_conversation_grows_and_pauses() -> None:
    found = returning(3, num_models=2, seconds=400)
    by_name: dict[str, list[Request]] = defaultdict(list)
    for request in found.requests:
        by_name[request.conversation].append(request)
    assert all(len({request.model for request in of}) == 1 for of in by_name.values())
    assert max(map(len, by_name.values())) == MAX_TURNS
    for of in by_name.values():
        assert all(later.num_in - before.num_in == 256 for before, later in pairwise(of))
        assert all(later.at_seconds > before.at_seconds for before, later in pairwise(of))
        assert [request.turn for request in of] == list(range(len(of)))


def test_agents_ask_three_models_in_turn_several_requests_at_once() -> None:
    found = agents(1, num_models=5, seconds=60)
    bursts: dict[float, list[Request]] = defaultdict(list)
    for request in found.requests:
        bursts[request.at_seconds].append(request)
    assert {len(burst) for burst in bursts.values()} == {FAN_OUT}
    models = [burst[0].model for burst in bursts.values()]
    assert len(set(models[:3])) == 3
    assert models[3:] == models[:-3]
    assert len(set(models)) == 3


def test_prompts_of_a_conversation_begin_alike_and_others_do_not() -> None:
    found = agents(2, num_models=3, seconds=20)
    tokens = prompts(found)
    for one, other in random.Random(1).sample(
        [(a, b) for a in range(len(tokens)) for b in range(a)], 100
    ):
        least = min(len(tokens[one]), len(tokens[other]), 64)
        is_same = found.requests[one].conversation == found.requests[other].conversation
        assert (tokens[one][:least] == tokens[other][:least]) == is_same
    assert [len(prompt) for prompt in tokens] == [request.num_in for request in found.requests]
    assert prompts(found) == tokens
    assert prompts(found, 1) != tokens


def test_prompts_without_a_conversation_share_nothing() -> None:
    first, second = prompts(Workload("w", 1, (Request(0, 0, 40, 1), Request(1, 0, 40, 1))))
    assert first[:20] != second[:20]


@pytest.mark.parametrize("pair", ["constant:4 constant:8", "returning:4 returning:8"])
def test_no_prompt_of_a_workload_begins_like_one_of_another(pair: str) -> None:
    first, second = (
        {tuple(prompt[:20]) for prompt in prompts(make_workload(words, 3, LENGTHS[GPU], 30))}
        for words in pair.split()
    )
    assert not first & second


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(list(WORKLOADS)),
    number=st.integers(1, 10),
    num_models=st.integers(1, 40),
    profile=st.sampled_from([HOST, GPU]),
)
def test_every_workload_is_in_order_fits_and_is_the_same_twice(
    name: str, number: int, num_models: int, profile: str
) -> None:
    def made() -> Workload:
        return make_workload(f"{name}:{number}", num_models, LENGTHS[profile], 90.0)

    found = made()
    assert found == made()
    times = [request.at_seconds for request in found.requests]
    assert times == sorted(times)
    assert all(0 <= request.model < num_models for request in found.requests)
    most = LENGTHS[profile].max_tokens
    assert all(0 < request.num_in <= most - request.num_out for request in found.requests)


Seeded = Callable[[int], Workload]


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: many(ARENA, num_models=12, rate=5, seconds=30, seed=seed),
        lambda seed: serverless(ARENA, num_models=12, speed=1, seconds=60, seed=seed),
        lambda seed: returning(2, num_models=3, seconds=60, seed=seed),
        lambda seed: agents(2, num_models=3, seconds=60, seed=seed),
    ],
)
def test_another_seed_is_another_schedule(make: Seeded) -> None:
    assert make(1) == make(1) != make(2)
