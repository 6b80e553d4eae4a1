"""Random operations, against scipy's distributions. Every draw is seeded, so the tests are deterministic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb  # noqa: N813
from scipy import stats

from coremill.mil import MLModel
from coremill.mil.ops.registry import OperationError, find

COUNT = 20_000
LEAST_P = 1e-3
"""A test of fit fails below this probability; correct draws are below it for one seed in a thousand."""
X = {"x": np.zeros((1,), np.float32)}


@pytest.fixture
def draw(evaluate):
    """Return draws of one operation that does not depend on inputs."""
    return lambda body, **options: evaluate(X, lambda x: (mb.relu(x=x), body()), **options)[1]


def _normal(*, seed=7):
    return mb.random_normal(shape=[100, 200], mean=-2.0, stddev=0.5, seed=seed)


@pytest.mark.parametrize("mode", ["declared", "oracle", "oracle-fp64"])
def test_normal(draw, mode):
    found = draw(_normal, mode=mode)
    assert found.shape == (100, 200)
    assert found.dtype == (np.float64 if mode == "oracle-fp64" else np.float32)
    assert stats.kstest(found.reshape(-1), stats.norm(-2.0, 0.5).cdf).pvalue > LEAST_P
    # Successive draws must not be correlated.
    assert abs(np.corrcoef(found.reshape(-1)[:-1], found.reshape(-1)[1:])[0, 1]) < 4 / COUNT**0.5


@pytest.mark.parametrize("bounds", [(-1.0, 3.0), (0.0, 1.0)])
def test_uniform(draw, bounds):
    low, high = bounds
    found = draw(lambda: mb.random_uniform(shape=[COUNT], low=low, high=high, seed=11))
    assert low <= found.min()
    assert found.max() < high
    assert stats.kstest(found, stats.uniform(low, high - low).cdf).pvalue > LEAST_P


def test_uniform_halves_stay_below_the_upper_bound(draw):
    """One in 8,192 draws from [1, 2) is nearer to 2 than to any half below it."""
    found = draw(lambda: mb.random_uniform(shape=[100_000], low=np.float16(1), high=np.float16(2), seed=5))
    assert found.dtype == np.float16
    assert found.min() == 1
    assert found.max() == np.nextafter(np.float16(2), np.float16(1))
    mean = found.astype(np.float64).mean()
    assert abs(mean - 1.5) < 4 * stats.uniform.std() / 100_000**0.5


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_bernoulli(draw, probability):
    found = draw(lambda: mb.random_bernoulli(shape=[COUNT], prob=np.float32(probability), seed=2))
    assert set(np.unique(found)) <= {0.0, 1.0}
    expected = float(np.float32(probability))
    assert stats.binomtest(int(found.sum()), COUNT, expected).pvalue > LEAST_P


PROBABILITIES = np.array([[0.5, 0.0, 0.2, 0.3], [0.1, 0.1, 0.1, 0.7]], np.float32)


@pytest.mark.parametrize("mode", ["logits", "probs"])
def test_categorical(evaluate, mode):
    """Probabilities need not sum to 1, nor their logarithms be normalized."""
    with np.errstate(divide="ignore"):
        x = np.log(PROBABILITIES) - 3 if mode == "logits" else PROBABILITIES * 8
    (found,) = evaluate({"x": x}, lambda x: mb.random_categorical(x=x, mode=mode, size=COUNT, seed=19))
    assert found.shape == (2, COUNT)
    assert found.dtype == np.float32
    for row, probabilities in zip(found, PROBABILITIES.astype(np.float64), strict=True):
        counts = np.bincount(row.astype(int), minlength=4)
        possible = probabilities > 0
        assert counts[~possible].sum() == 0
        expected = probabilities[possible] / probabilities.sum() * COUNT
        assert stats.chisquare(counts[possible], expected).pvalue > LEAST_P
    # Rows are drawn independently.
    assert stats.chi2_contingency(np.histogram2d(*found, bins=(4, 4))[0][[0, 2, 3]]).pvalue > LEAST_P


@pytest.mark.parametrize(("draw", "index"), [(0.0, 1), (1.0, 2)])
def test_extreme_categorical_draws_are_possible(monkeypatch, draw, index):
    """The smallest draw, and one that rounds up to the largest, do not select an entry with probability 0."""
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.full(shape, draw, dtype=torch.float64))
    found = find("random_categorical", 18).kernel(torch.tensor([0.0, 3.0, 1.0, 0.0]), mode="probs", size=2)
    assert found.tolist() == [index, index]


def test_computed_shape(evaluate):
    (found,) = evaluate(
        {"shape": np.array([3, 1, 2], np.int32)}, lambda shape: mb.random_uniform(shape=shape, low=4.0, high=4.0)
    )
    np.testing.assert_array_equal(found, np.full((3, 1, 2), 4, np.float32))


def test_seed_repeats_the_draws(build, draw):
    model = MLModel(build(X, lambda x: (mb.relu(x=x), _normal())))
    first, again = (list(model.predict(X).values())[1] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(draw(_normal), first)
    np.testing.assert_allclose(draw(_normal, mode="oracle-fp64"), first, rtol=1e-6)
    assert not (draw(lambda: _normal(seed=8)) == first).any()


def test_without_a_seed_every_run_differs(build):
    model = MLModel(build(X, lambda x: (mb.relu(x=x), _normal(seed=-1))))

    def run():
        return list(model.predict(X).values())[1]

    torch.manual_seed(0)
    first, second = run(), run()
    assert not (first == second).any()
    torch.manual_seed(0)
    np.testing.assert_array_equal(run(), first)


def test_invalid_distributions_are_rejected():
    half = torch.tensor(0.5)
    with pytest.raises(OperationError, match=r"prob 1\.5; it must be from 0 to 1"):
        find("random_bernoulli", 18).kernel(3 * half, shape=(2,))
    with pytest.raises(OperationError, match=r"stddev -0\.5; it must not be below 0"):
        find("random_normal", 18).kernel(half, -half, shape=(2,))
    with pytest.raises(OperationError, match=r"low 0\.5 and high -0\.5; low must not be above high"):
        find("random_uniform", 18).kernel(half, -half, shape=(2,))
    with pytest.raises(OperationError, match=r"shape \[2, -1\]; every size must be above 0"):
        find("random_uniform", 18).kernel(shape=(2, -1))
    categorical = find("random_categorical", 18).kernel
    with pytest.raises(OperationError, match="mode 'odds', expected logits or probs"):
        categorical(torch.ones(3), mode="odds")
    with pytest.raises(OperationError, match="size 0; it must be above 0"):
        categorical(torch.ones(3), size=0)
    for wrong in ([0.0, 0.0], [-1.0, 2.0], [torch.nan, 1.0]):
        with pytest.raises(OperationError, match="probs do not give a distribution: each must have a finite sum"):
            categorical(torch.tensor(wrong), mode="probs")
