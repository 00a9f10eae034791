"""Racing: who stays, on which prompts, and when a gain holds."""

from __future__ import annotations

import numpy as np
import pytest

from flowmm.profiler.racing import gains_of, part_ends, survivors, winner


@pytest.mark.parametrize(
    ("prompts", "ends"), [(1, (1,)), (20, (20,)), (24, (12, 24)), (43, (10, 21, 43)), (160, (20, 40, 80, 160))]
)
def test_each_part_is_as_large_as_all_before_it(prompts: int, ends: tuple[int, ...]) -> None:
    assert part_ends(prompts) == ends


def test_the_best_half_goes_on_after_each_part() -> None:
    asked: list[tuple[str, list[int]]] = []

    def measure(part: str, proposed: list[int]) -> np.ndarray:
        asked.append((part, list(proposed)))
        return np.array([[50.0, *(float(one) for one in proposed)]] * 2)

    left, cost = survivors([9, 4, 7, 1, 8, 2, 6], ["a", "b", "c"], measure)
    assert asked == [("a", [9, 4, 7, 1, 8, 2, 6]), ("b", [4, 1, 2, 6]), ("c", [1, 2])]
    assert left == [1, 2]
    assert cost.tolist() == [[50.0, 1.0, 2.0]] * 6


def test_nothing_proposed_is_not_measured() -> None:
    def measure(*_: object) -> np.ndarray:
        raise AssertionError

    assert winner([], ["a"], measure) is None


def test_the_winner_is_the_best_of_those_that_hold() -> None:
    own = np.array([10.0, 11.0, 12.0])
    gains = {"little": 0.1, "most": 3.0, "less": 2.0}

    def measure(part: slice, proposed: list[str]) -> np.ndarray:
        return np.stack([own, *(own - gains[one] for one in proposed)], 1)[part]

    assert winner(list(gains), [slice(0, 2), slice(2, 3)], measure) == "most"
    assert winner(["little"], [slice(0, 3)], measure) is None


def test_a_gain_holds_above_two_standard_errors_and_a_twentieth_of_the_cost() -> None:
    own = np.array([10.0, 11.0, 12.0])
    steady, unsteady, little = own - np.array([2.0, 2.5, 3.0]), own - np.array([-1.0, 2.0, 3.0]), own - 0.4
    assert gains_of(np.stack([own, steady, unsteady, little], 1)) == pytest.approx({0: 2.5})
    assert gains_of(np.array([[5.0, 1.0]])) == {}, "one prompt decides nothing"
    assert gains_of(np.zeros((4, 2))) == {}
