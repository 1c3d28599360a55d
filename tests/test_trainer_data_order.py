"""The permutation is one, for any size and key; the interleaving gives every source exactly its share, everywhere."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.order import Interleave, Permutation, whole_weights


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 63, 64, 65, 1000, 65_537])
def test_every_position_reads_another_sequence(n):
    out = Permutation(n, f"key {n}")(np.arange(n))
    assert out.dtype == np.int64
    assert np.array_equal(np.sort(out), np.arange(n))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 2**40), st.text(max_size=8), st.integers(0, 2**40))
def test_one_position_does_not_depend_on_the_others(n, key, position):
    permutation = Permutation(n, key)
    positions = (np.arange(20) + position) % n
    together = permutation(positions)
    assert ((together >= 0) & (together < n)).all()
    alone = [int(permutation(positions[i : i + 1])[0]) for i in range(20)]
    assert together.tolist() == alone
    assert len(set(together.tolist())) == len(set(positions.tolist()))


def test_keys_give_unrelated_orders():
    n = 10_000
    a, b = (Permutation(n, f"seed 17 source 0 epoch {epoch}")(np.arange(n)) for epoch in (0, 1))
    assert (a == b).mean() < 0.002  # 1/n is expected of two random permutations
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.05
    for order in (a, b):
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.05
        assert np.abs(np.diff(order)).mean() == pytest.approx(n / 3, rel=0.05)  # of random pairs


def test_where_a_position_lands_is_uniform_over_keys():
    n, keys = 10, 4000
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), Permutation(n, str(key))(np.arange(n))] += 1
    chi_square = ((counts - keys / n) ** 2 / (keys / n)).sum()
    assert chi_square < 150  # 81 degrees of freedom: mean 81, standard deviation 13; the keys are fixed


def test_a_billion_sequences_need_no_array():
    n = 1_000_000_000
    permutation, interleave = Permutation(n, "large"), Interleave([0.33, 0.299, 0.371])
    positions = np.concatenate([np.arange(500), n - 1 - np.arange(500)])
    tracemalloc.start()
    out = permutation(positions)
    interleave(positions * 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(out.tolist())) == 1000
    assert 0.4 < out.mean() / n < 0.6
    assert peak < 1 << 20


def test_the_order_is_what_it_was():
    # A change here changes the data order of every run that is resumed, so it needs a new order.VERSION.
    assert Permutation(1000, "seed 17 source 0 epoch 0")(np.arange(6)).tolist() == [567, 716, 342, 776, 951, 734]
    assert Interleave([3, 1, 1])(np.arange(8))[0].tolist() == [2, 0, 1, 0, 0, 2, 0, 1]


def brute_force(weights, count):
    """The rule in plain words: source i takes a sample where its share of what reached it steps up."""
    seen = [0] * len(weights)
    out = []
    for _ in range(count):
        for i in range(len(weights)):
            last = i == len(weights) - 1
            total = sum(weights[i:])
            t = seen[i]
            seen[i] += 1
            if last or (t + 1) * weights[i] // total > t * weights[i] // total:
                taken_before = t if last else t * weights[i] // total
                out.append((i, taken_before))
                break
    return out


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_interleave_follows_its_rule(weights):
    whole = whole_weights(weights)
    source, rank = Interleave(weights)(np.arange(100))
    assert list(zip(source.tolist(), rank.tolist())) == brute_force(whole, 100)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(0, 10**12))
def test_every_block_has_the_exact_proportions(weights, start):
    whole = whole_weights(weights)
    block = sum(whole)
    source, rank = Interleave(weights)(start + np.arange(3 * block))
    for shift in (0, 1, block // 2, 2 * block):
        counts = Counter(source[shift : shift + block].tolist())
        assert [counts[i] for i in range(len(whole))] == whole
    for i in range(len(whole)):  # each source is read without a gap or a repeat
        ranks = rank[source == i]
        assert np.array_equal(np.diff(ranks), np.ones(len(ranks) - 1))


def test_any_run_is_near_its_share():
    weights = [0.33, 0.299, 0.10, 0.10, 0.04, 0.035, 0.033, 0.03, 0.019, 0.014]  # mpt-7b's mix
    source, _ = Interleave(weights)(np.arange(200_000))
    counts = np.stack([np.cumsum(source == i) for i in range(len(weights))])
    expected = np.outer(weights, np.arange(1, 200_001))
    assert np.abs(counts - expected).max() < 3
    assert [int((source[:1000] == i).sum()) for i in range(10)] == [330, 299, 100, 100, 40, 35, 33, 30, 19, 14]


def test_whole_weights():
    assert whole_weights([0.33, 0.67]) == [33, 67]
    assert whole_weights([0.1, 0.1]) == [1, 1]
    assert whole_weights([2, 4, 6]) == [1, 2, 3]
    assert whole_weights([1e-3, 1]) == [1, 1000]
    odd = whole_weights([1 / 3, 2 / 3, 0.12345678901234])
    assert sum(odd) <= 2**31
    assert odd[0] / odd[1] == pytest.approx(0.5, rel=1e-8)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_bad_weight_is_named(weight):
    with pytest.raises(ValueError, match=f"weight {weight}"):
        whole_weights([1.0, weight])


@pytest.mark.parametrize("n", [0, -1, 2**63])
def test_bad_size_is_named(n):
    with pytest.raises(ValueError, match=str(n)):
        Permutation(n, "key")
