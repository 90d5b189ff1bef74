"""Intervals against scipy's, and the cases that have no spread."""

import numpy as np
import pytest
from scipy import stats

from eval.statistics import bootstrap_interval, paired_difference, wilson_interval
from glm4v_jax.errors import DataError


class TestBootstrap:
    @pytest.mark.parametrize("confidence", [0.9, 0.95])
    def test_as_scipy(self, confidence):
        values = np.random.default_rng(1).beta(2, 1, size=200)
        ours = bootstrap_interval(values.tolist(), confidence=confidence)
        theirs = stats.bootstrap(
            (values,),
            np.mean,
            method="percentile",
            confidence_level=confidence,
            n_resamples=10_000,
            rng=2,
            vectorized=True,
        ).confidence_interval
        # The standard error of a percentile of 10,000 means is near 1/40 of their own, 0.016.
        np.testing.assert_allclose(ours, theirs, atol=5 * 0.016 / 40)

    def test_covers_the_true_mean(self):
        rng = np.random.default_rng(0)
        hits = 0
        for seed in range(200):
            low, high = bootstrap_interval(rng.normal(size=50).tolist(), resamples=500, seed=seed)
            hits += low <= 0 <= high
        # 190 of 200 are expected, less a little because the percentile method is narrow at 50; 5 deviations of 3 below.
        assert 172 <= hits <= 200

    def test_seed_decides(self):
        values = [0.0, 1.0, 1.0, 0.0, 1.0]
        assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
        many = np.random.default_rng(0).random(40).tolist()
        assert bootstrap_interval(many, seed=3) != bootstrap_interval(many, seed=4)

    def test_drawn_in_pieces(self, monkeypatch):
        values = np.random.default_rng(0).random(50).tolist()
        whole = bootstrap_interval(values, resamples=1000)
        monkeypatch.setattr("eval.statistics._CELLS", 170)
        # The same numbers are drawn, three rows at a time.
        assert bootstrap_interval(values, resamples=1000) == whole

    def test_without_spread(self):
        assert bootstrap_interval([0.3]) == (0.3, 0.3)
        assert bootstrap_interval([0.1] * 7) == (0.1, 0.1)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (dict(values=[]), "at least one"),
            (dict(values=[0.0, float("nan")]), "finite"),
            (dict(values=[1.0], confidence=1.0), "confidence"),
            (dict(values=[1.0], resamples=0), "resamples"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(DataError, match=message):
            bootstrap_interval(**arguments)


class TestPairedDifference:
    def test_narrower_than_apart(self):
        rng = np.random.default_rng(0)
        hardness = rng.random(300)
        first, second = hardness + rng.normal(0, 0.01, 300), hardness + 0.05 + rng.normal(0, 0.01, 300)
        mean, low, high = paired_difference(first.tolist(), second.tolist())
        assert mean == pytest.approx(np.mean(second - first), abs=1e-12)
        assert 0.045 < low < mean < high < 0.055
        low, high = bootstrap_interval(first.tolist())
        assert high - low > 0.05

    def test_equal_runs(self):
        assert paired_difference([0.0, 1.0], [0.0, 1.0]) == (0.0, 0.0, 0.0)

    def test_different_items(self):
        with pytest.raises(DataError, match="found 1 and 2"):
            paired_difference([1.0], [1.0, 0.0])


class TestWilson:
    def test_as_scipy(self):
        for count in (1, 2, 10, 360):
            for hits in {0, 1, count // 2, count}:
                for confidence in (0.8, 0.95, 0.99):
                    theirs = stats.binomtest(hits, count).proportion_ci(confidence, method="wilson")
                    np.testing.assert_allclose(wilson_interval(hits, count, confidence=confidence), theirs, atol=1e-12)

    @pytest.mark.parametrize("arguments", [(0, 0), (3, 2), (-1, 2)])
    def test_errors(self, arguments):
        with pytest.raises(DataError, match="share: found"):
            wilson_interval(*arguments)
