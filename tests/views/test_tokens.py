"""Views of tokens: exact counts, inverses, rates and the shape of the draws."""

import jax
import numpy as np
import pytest

from sslx.config import UserError
from sslx.sharding import batch_sharding, make_mesh
from sslx.views import tokens

KEY = jax.random.key(3)


def ids(batch=64, length=40, vocab=50):
    return np.random.default_rng(0).integers(0, vocab, (batch, length)).astype(np.int32)


@pytest.mark.parametrize("rate, expected", [(0.15, 6), (0.001, 1), (1.0, 40)])
def test_mask_positions_are_exactly_k_distinct_and_sorted(rate, expected):
    positions, weights = map(np.asarray, tokens.mask_positions(KEY, ids(), rate=rate))
    assert positions.shape == weights.shape == (64, expected)
    assert (np.diff(positions, axis=1) > 0).all() and positions.min() >= 0 and positions.max() < 40
    assert (weights == 1).all()


def test_every_position_is_as_likely_and_every_key_draws_anew():
    batch = ids(4000, 20)
    first, _ = tokens.mask_positions(KEY, batch, rate=0.15)
    share = np.bincount(np.asarray(first).ravel(), minlength=20) / 4000
    assert np.abs(share - 0.15).max() < 5 * np.sqrt(0.15 * 0.85 / 4000)
    second, _ = tokens.mask_positions(jax.random.key(4), batch, rate=0.15)
    assert (np.asarray(first) != np.asarray(second)).any(1).mean() > 0.9


def test_whole_words_go_together():
    starts = np.arange(50) % 3 == 0
    batch = ids(200)
    positions, _ = tokens.mask_positions(KEY, batch, rate=0.3, word_starts=starts.tolist())
    cut = 0
    for row, chosen in zip(batch, np.asarray(positions), strict=True):
        word = np.cumsum(starts[row])
        whole = [np.isin(np.flatnonzero(word == w), chosen).all() for w in np.unique(word[chosen])]
        cut += len(whole) - sum(whole)
        assert len(whole) - sum(whole) <= 1
    assert cut < 200  # at least some rows end on the end of a word


def test_invalid_positions_weigh_nothing_and_the_budget_follows_the_valid_ones():
    valid = np.arange(40) < np.arange(64)[:, None] % 41
    positions, weights = map(np.asarray, tokens.mask_positions(KEY, ids(), rate=0.15, valid=valid))
    assert (np.diff(positions, axis=1) > 0).all()
    assert weights.sum(1).tolist() == [min(n, max(1, round(0.15 * n))) for n in valid.sum(1).tolist()]
    assert np.take_along_axis(valid, positions, 1)[weights > 0].all()


def test_bert_corruption_is_80_10_10_and_only_where_chosen():
    batch = ids(2000, 40, vocab=1000)
    positions, _ = tokens.mask_positions(KEY, batch, rate=0.25)
    corrupted = np.asarray(tokens.bert_corrupt(KEY, batch, positions, mask_id=1000, vocab_size=1000))
    chosen = np.zeros(batch.shape, bool)
    np.put_along_axis(chosen, np.asarray(positions), True, 1)
    assert (corrupted == batch)[~chosen].all() and corrupted.dtype == np.int32
    n = chosen.sum()
    for share, expected in [((corrupted == 1000)[chosen].mean(), 0.8),
                            (((corrupted != 1000) & (corrupted != batch))[chosen].mean(), 0.1 * 0.999),
                            ((corrupted == batch)[chosen].mean(), 0.1 + 0.0001)]:
        assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / n)
    replaced = corrupted[chosen & (corrupted != 1000) & (corrupted != batch)]
    assert replaced.min() >= 0 and replaced.max() < 1000
    assert abs(replaced.mean() - 499.5) < 5 * 288.7 / len(replaced) ** 0.5


def test_positions_of_weight_zero_are_left_alone():
    batch = ids()
    positions, weights = tokens.mask_positions(KEY, batch, rate=0.5, valid=batch > 40)
    corrupted = np.asarray(tokens.bert_corrupt(KEY, batch, positions, weights, mask_id=99, vocab_size=50, replace=1.0))
    assert (corrupted == 99).sum() == np.asarray(weights).sum() and (corrupted == batch)[batch <= 40].all()


@pytest.mark.parametrize("length, rate, mean_span", [(40, 0.15, 3.0), (40, 0.5, 1.0), (10, 0.9, 1.0), (2, 0.5, 3.0)])
def test_inputs_and_targets_reassemble_the_row(length, rate, mean_span):
    batch = ids(32, length)
    inputs, targets = map(np.asarray, tokens.span_corrupt(KEY, batch, rate=rate, mean_span=mean_span,
                                                          sentinel_id=100, eos_id=99))
    n_noise, n_spans, n_inputs, n_targets = tokens.span_lengths(length, rate, mean_span)
    assert inputs.shape == (32, n_inputs) and targets.shape == (32, n_targets) and inputs.dtype == np.int32
    assert (inputs[:, -1] == 99).all() and (targets[:, -1] == 99).all() and (targets[:, 0] == 100).all()
    for row, kept, removed in zip(batch, inputs[:, :-1], targets[:, :-1], strict=True):
        assert kept[kept >= 100].tolist() == removed[removed >= 100].tolist() == list(range(100, 100 + n_spans))
        spans = np.split(removed, np.flatnonzero(removed >= 100))[1:]
        assert all(len(span) > 1 for span in spans) and sum(len(span) - 1 for span in spans) == n_noise
        assert (np.diff(np.flatnonzero(np.r_[100, kept] >= 100)) > 1).all()  # something is kept before each span
        filled = [spans[t - 100][1:] if t >= 100 else [t] for t in kept]
        np.testing.assert_array_equal(np.concatenate(filled), row)


def test_spans_of_random_segments_are_uniform_over_splits():
    lengths = np.asarray(tokens.random_segments(KEY, 6000, 5, 3))
    splits, counts = np.unique(lengths, axis=0, return_counts=True)
    assert len(splits) == 6 and (lengths.sum(1) == 5).all() and lengths.min() == 1  # C(4, 2) ways
    assert np.abs(counts / 6000 - 1 / 6).max() < 5 * np.sqrt(5 / 36 / 6000)


def test_published_lengths_of_t5():
    assert tokens.raw_length_for(512, 0.15, 3.0) == 568
    assert tokens.span_lengths(568, 0.15, 3.0)[2:] == (512, 114)


@pytest.mark.parametrize("n_inputs", [3, 17, 64, 200])
def test_raw_length_is_the_largest_that_fits(n_inputs):
    raw = tokens.raw_length_for(n_inputs, 0.15, 3.0)
    assert tokens.span_lengths(raw, 0.15, 3.0)[2] <= n_inputs < tokens.span_lengths(raw + 1, 0.15, 3.0)[2]


def test_too_short_rows_are_errors():
    with pytest.raises(UserError, match="at least 2"):
        tokens.span_lengths(1, 0.15, 3.0)
    with pytest.raises(UserError, match="at least 3"):
        tokens.raw_length_for(2, 0.15, 3.0)


def test_random_keep_restores_the_order():
    keep, restore, mask = map(np.asarray, tokens.random_keep(KEY, 500, 20, 5))
    hidden = np.argsort(restore, 1)[:, 5:]
    assert keep.shape == (500, 5) and (mask.sum(1) == 15).all()
    assert (np.sort(np.concatenate([keep, hidden], 1), 1) == np.arange(20)).all()
    assert (np.take_along_axis(mask, keep, 1) == 0).all()
    np.testing.assert_array_equal(np.take_along_axis(np.concatenate([keep, hidden], 1), restore, 1),
                                  np.broadcast_to(np.arange(20), (500, 20)))
    assert np.abs(mask.mean(0) - 0.75).max() < 5 * np.sqrt(0.75 * 0.25 / 500)


def test_tokens_do_not_depend_on_the_mesh():
    def everything(key, batch):
        starts = [i % 3 == 0 for i in range(50)]
        positions, weights = tokens.mask_positions(key, batch, rate=0.15, word_starts=starts, valid=batch > 5)
        return (positions, weights, tokens.bert_corrupt(key, batch, positions, weights, mask_id=50, vocab_size=50),
                tokens.span_corrupt(key, batch, sentinel_id=60, eos_id=99), tokens.random_keep(key, 64, 20, 5))

    results = []
    for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(), make_mesh(data=2, fsdp=2, tensor=2)):
        with jax.set_mesh(mesh):
            batch = jax.device_put(ids(), batch_sharding(mesh))
            results.append(jax.tree.map(np.asarray, jax.jit(everything)(KEY, batch)))
    for result in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], result)
