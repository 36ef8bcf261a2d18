"""A pass is a permutation drawn evenly, any place of it is known alone, and it never changes."""

import numpy as np
import pytest

from sslx.data.order import BLOCK, Order


@pytest.mark.parametrize("n", [1, 2, 3, 100, BLOCK - 1, BLOCK + 1, 3 * BLOCK, 100_003])
def test_every_pass_is_another_permutation(n):
    order = Order(n, seed=3)
    first, second = order(np.arange(2 * n)).reshape(2, n)
    assert (np.sort(first) == np.arange(n)).all() and (np.sort(second) == np.arange(n)).all()
    if n > 3:
        assert (first != second).any() and (Order(n, seed=4)(np.arange(n)) != first).any()


@pytest.mark.parametrize("n", [7, 1000, 10**12])
def test_any_place_is_known_alone(n):
    order, rng = Order(n, seed=1), np.random.default_rng(0)
    places = np.concatenate([rng.integers(0, 5 * BLOCK, 300), rng.integers(0, 20 * n, 20)])
    together = order(places)
    alone = [int(order(np.array([place]))[0]) for place in places]
    assert together.tolist() == alone and together.min() >= 0 and together.max() < n


@pytest.mark.parametrize("n", [3, 5, 6, 13, 33, 64])
def test_orders_are_drawn_evenly(n):
    """Chi-square of 20,000 passes: which example is at which place, and which two lead a pass."""
    passes = 20_000
    order_PN = Order(n, seed=9)(np.arange(n * passes)).reshape(passes, n)
    at_NN = np.stack([(order_PN == k).sum(0) for k in range(n)])
    led_NN = np.zeros((n, n))
    np.add.at(led_NN, (order_PN[:, 0], order_PN[:, 1]), 1)
    pairs = led_NN[~np.eye(n, dtype=bool)]
    for counts, freedom in ((at_NN, (n - 1) ** 2), (pairs, n * (n - 1) - 1)):
        chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom)


def test_a_run_of_today_goes_on_tomorrow():
    """The numbers of the first release: others would show a resumed run some examples twice and some never."""
    assert Order(10, seed=0)(np.arange(20)).tolist() == [5, 4, 8, 7, 2, 0, 6, 1, 3, 9,
                                                             2, 0, 7, 4, 9, 6, 1, 8, 5, 3]
    assert Order(10**9, seed=2**32 - 1)(np.array([0, 1, 10**10])).tolist() == [303084396, 749087329, 696626180]


def test_without_shuffle_it_is_the_natural_order():
    assert Order(5, seed=0, shuffle=False)(np.arange(12)).tolist() == [i % 5 for i in range(12)]
