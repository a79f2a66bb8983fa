"""Draws depend on their keys alone, and items are drawn by their share of the period's events within their group."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from jobs.popularity import Popularity, count_popularity, uniform

PERIOD_MS = 1000
# Items 1 to 40, of which each second is of group 1; item n counted n times in period 1, in period 2 only items 1 and 3.
GROUP = np.arange(41) % 2
POPULARITY = count_popularity(
    np.repeat([1, 2], [40, 2]), np.r_[1:41, 1, 3], np.r_[1:41, 1, 1], group_M=GROUP, period_ms=PERIOD_MS
)


def drawn(popularity: Popularity, now_ms: int, group: int, count: int = 100_000) -> np.ndarray:
    numbers = uniform(0, np.arange(count))
    return popularity.draw(np.full(count, now_ms), np.full(count, group), numbers)


def error(popularity: Popularity, group: int) -> float:
    """The largest difference between the shares drawn and those that item n of weight n should have."""
    found = np.bincount(drawn(popularity, 1500, group), minlength=41) / 100_000
    wanted = np.where(np.arange(41) % 2 == group, np.arange(41.0), 0)
    return float(np.abs(found - wanted / wanted.sum()).max())


def test_items_are_drawn_by_their_count_in_the_period_within_the_group() -> None:
    assert error(POPULARITY, 0) < 0.004
    assert error(POPULARITY, 1) < 0.004


def test_the_test_of_the_distribution_can_fail() -> None:
    assert error(replace(POPULARITY, cumulative_J=np.arange(1.0, len(POPULARITY.item_J) + 1)), 0) > 0.01


def test_a_period_without_events_of_the_group_draws_from_all_periods() -> None:
    assert set(drawn(POPULARITY, 2500, 1).tolist()) == {1, 3}
    # Group 0 has no events in period 2, and no period has the number 99.
    assert set(drawn(POPULARITY, 2500, 0).tolist()) == set(range(2, 41, 2))
    assert set(drawn(POPULARITY, 99_500, 1).tolist()) == set(range(1, 41, 2))
    # A group without any events draws from all items.
    assert set(drawn(POPULARITY, 1500, 7).tolist()) == set(range(1, 41))


def test_the_ends_of_the_unit_interval_draw_the_first_and_the_last_item() -> None:
    ends = POPULARITY.draw(np.full(2, 1500), np.zeros(2, np.int64), np.array([0.0, np.nextafter(1, 0)]))
    assert ends.tolist() == [2, 40]


def test_the_unknown_item_is_never_drawn_and_without_counts_every_item_counts_once() -> None:
    nothing = np.zeros(0, np.int64)
    flat = count_popularity(nothing, nothing, nothing, np.zeros(5, np.int64), PERIOD_MS)
    assert set(drawn(flat, 500, 0).tolist()) == {1, 2, 3, 4}
    known = count_popularity(np.zeros(2, int), np.array([0, 3]), np.array([9, 1]), np.zeros(5, np.int64), PERIOD_MS)
    assert set(drawn(known, 500, 0).tolist()) == {3}


def test_draws_are_uniform_and_depend_on_every_key() -> None:
    numbers = uniform(1, np.arange(200)[:, None], np.arange(500)[None])
    assert numbers.shape == (200, 500)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert np.abs(np.bincount((numbers * 10).astype(int).ravel()) / numbers.size - 0.1).max() < 0.004
    assert len(np.unique(numbers)) == numbers.size
    assert np.array_equal(uniform(1, np.array([7]), np.arange(500)), numbers[7])
    assert not np.any(uniform(2, np.array([7]), np.arange(500)) == numbers[7])
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.02
