"""What is remembered of weights that are there."""

import math
import time

from helpers.gateway_ledger import row

from kvcached_core.ledger.activations import Activations
from kvcached_gateway.control.weights_had import WeightsHad

THERE = row(weights_bytes=10, weights_needed_bytes=10)


def test_weights_are_had_since_the_look_that_saw_all_of_them() -> None:
    had = WeightsHad()
    assert had.seconds("a", 0.0) == math.inf
    had.look({"a": THERE}, 5.0)
    had.look({"a": THERE}, 7.0)
    assert had.seconds("a", 8.0) == 3.0
    had.look({"a": row(weights_bytes=9, weights_needed_bytes=10)}, 9.0)
    assert had.seconds("a", 9.0) == math.inf
    had.look({"a": THERE}, 11.0)
    assert had.seconds("a", 12.0) == 1.0


def test_weights_that_went_and_came_back_between_two_looks_are_new() -> None:
    had = WeightsHad()
    had.look({"a": THERE}, 5.0)
    again = row(weights_bytes=10, weights_needed_bytes=10, activations=Activations.one(7))
    had.look({"a": again}, 9.0)
    assert had.seconds("a", 10.0) == 1.0


def test_what_an_idle_engine_says_is_remembered_while_it_is_busy() -> None:
    had = WeightsHad()
    until_ns = time.time_ns() + 60 * 10**9
    had.look({"a": row(weights_offered_bytes=5, weights_kept_until_ns=until_ns)}, 1.0)
    had.look({"a": THERE}, 2.0)
    assert 50 < had.kept_seconds("a") <= 60
    assert had.kept_seconds("b") == 0
    had.look({}, 3.0)
    assert had.kept_seconds("a") == 0


def test_who_gave_none_is_asked_again_once_it_offers_some() -> None:
    had = WeightsHad()
    had.look({"a": THERE}, 1.0)
    had.gave_none("a")
    had.look({"a": THERE}, 2.0)
    assert had.gives_none("a")
    had.look({"a": row(weights_offered_bytes=5)}, 3.0)
    assert not had.gives_none("a")
