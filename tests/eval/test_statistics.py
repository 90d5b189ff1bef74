"""Intervals against scipy's, and values without spread."""

import time

import numpy as np
import pytest
from scipy import stats

from eval.statistics import Difference, bootstrap_interval, paired_difference, score_interval, wilson_interval
from glm4v_jax.errors import DataError

Z = stats.norm.ppf(0.975)


class TestBootstrap:
    @pytest.mark.parametrize("confidence", [0.9, 0.95])
    def test_intervals_equal_scipys(self, confidence):
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

    def test_intervals_cover_the_true_mean(self):
        rng = np.random.default_rng(0)
        hits = 0
        for seed in range(200):
            low, high = bootstrap_interval(rng.normal(size=50).tolist(), resamples=500, seed=seed)
            hits += low <= 0 <= high
        # 190 of 200 are expected, less a little because the percentile method is narrow at 50; 5 deviations of 3 below.
        assert 172 <= hits <= 200

    def test_the_seed_determines_the_interval(self):
        values = [0.0, 1.0, 1.0, 0.0, 1.0]
        assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
        many = np.random.default_rng(0).random(40).tolist()
        assert bootstrap_interval(many, seed=3) != bootstrap_interval(many, seed=4)

    def test_resampling_in_chunks_is_the_same(self, monkeypatch):
        values = np.random.default_rng(0).random(50).tolist()
        whole = bootstrap_interval(values, resamples=1000)
        monkeypatch.setattr("eval.statistics._CELLS", 170)
        # The same numbers are drawn, three rows at a time.
        assert bootstrap_interval(values, resamples=1000) == whole

    def test_equal_values_have_no_width(self):
        assert bootstrap_interval([0.3]) == (0.3, 0.3)
        assert bootstrap_interval([0.1] * 7) == (0.1, 0.1)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (dict(values=[]), "at least one"),
            (dict(values=[0.0, float("nan")]), "finite"),
            (dict(values=[1.0], confidence=1.0), "confidence"),
            (dict(values=[1.0], resamples=0), "resamples"),
            (dict(values=[1.0], counts=[1.0, 2.0]), "found 2 for 1 value"),
            (dict(values=[1.0, 2.0], counts=[1.0, -2.0]), "none below 0"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(DataError, match=message):
            bootstrap_interval(**arguments)


class TestScoreInterval:
    def test_intervals_of_ratios_equal_scipys(self):
        rng = np.random.default_rng(1)
        counts = rng.integers(1, 9, 150)
        values = rng.binomial(counts, 0.6)
        theirs = stats.bootstrap(
            (values, counts), _ratio_of, paired=True, method="percentile", n_resamples=10_000, rng=2, vectorized=True
        ).confidence_interval
        # The standard error of a percentile of 10,000 ratios is near 1/40 of their own, 0.02.
        np.testing.assert_allclose(score_interval(values, counts), theirs, atol=5 * 0.02 / 40)

    @pytest.mark.parametrize("score", [0.0, 1.0])
    def test_equal_fractions_have_wilsons_interval(self, score):
        assert score_interval([3 * score] * 20, [3] * 20) == wilson_interval(20 * score, 20)
        # Of clusters of different sizes too.
        assert score_interval([3 * score, 4 * score], [3, 4]) == wilson_interval(2 * score, 2)

    def test_one_cluster_has_wilsons_interval_for_one_trial(self):
        low, high = score_interval([30.0], [100])
        assert low < 0.3 < high
        # Wilson's ends for one trial are both shares p with (0.3 - p)^2 = z^2 p (1 - p).
        for end in (low, high):
            assert (0.3 - end) ** 2 == pytest.approx(Z * Z * end * (1 - end), abs=1e-12)

    def test_a_score_below_zero_counts_as_zero(self):
        assert score_interval([-3.0, -4.0], [1, 1]) == wilson_interval(0, 2)

    def test_resamples_without_counts_are_right(self):
        low, high = score_interval([0.0, 0.0, 1.0], [0.0, 0.0, 4.0], resamples=1000)
        # All but nothing was to be found in (2/3)^3 of the draws, which are right; the others have 1/4.
        assert (low, high) == (0.25, 1.0)
        assert score_interval([0.0], [0.0]) == wilson_interval(1, 1)

    def test_ten_thousand_scores_take_seconds(self):
        rng = np.random.default_rng(0)
        counts = rng.integers(1, 4, 10_000)
        start = time.process_time()
        score_interval(rng.binomial(counts, 0.5), counts)
        assert time.process_time() - start < 10


def _ratio_of(values, counts, axis):
    return values.sum(axis=axis) / counts.sum(axis=axis)


class TestPairedDifference:
    def test_paired_intervals_are_narrower(self):
        rng = np.random.default_rng(0)
        hardness = rng.random(300)
        first, second = hardness + rng.normal(0, 0.01, 300), hardness + 0.05 + rng.normal(0, 0.01, 300)
        found = paired_difference(first.tolist(), second.tolist())
        paired = (found.low, found.high)
        assert found.mean == pytest.approx(np.mean(second - first), abs=1e-12)
        alone = bootstrap_interval(first.tolist())
        # Means of 300 are nearly normal; the standard error of a percentile of 10,000 is near 1/40 of their own.
        for ends, of in ((paired, second - first), (alone, first)):
            error = np.std(of) / np.sqrt(300)
            np.testing.assert_allclose(ends, np.mean(of) + np.array([-Z, Z]) * error, atol=5 * error / 40)
        assert paired[1] - paired[0] < (alone[1] - alone[0]) / 15

    def test_equal_runs_differ_by_zero(self):
        assert paired_difference([0.0, 1.0], [0.0, 1.0]) == Difference(0.0, 0.0, 0.0)

    def test_runs_of_other_lengths_are_errors(self):
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
        with pytest.raises(DataError, match="hits: found"):
            wilson_interval(*arguments)
