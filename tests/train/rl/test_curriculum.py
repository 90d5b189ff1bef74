"""Draws of problems, by simulation without a model: what is drawn has a signal, nothing starves, a state resumes."""

import json

import numpy as np
import pytest
import scipy.special
import scipy.stats

from glm4v_jax.errors import ConfigError, DataError
from train.rl.config import CurriculumConfig
from train.rl.curriculum import Curriculum, Outcome
from train.rl.levels import read_levels

SAMPLES = 8


def played(curriculum, keys, chances, step):
    """Draw a step, and answer with a coin for each rollout; returns the outcomes."""
    outcomes = []
    for number in curriculum.draw(step):
        coins = np.random.default_rng([7, step, number]).random(SAMPLES) < chances[number]
        outcomes.append(Outcome(keys[number], coins.mean(), SAMPLES, 0 < coins.sum() < SAMPLES))
    curriculum.update(outcomes)
    return outcomes


def made(chances, mode="rlcs", domains=None, **options):
    keys = [f"k{number}" for number in range(len(chances))]
    config = CurriculumConfig(mode=mode, **options.pop("config", {}))
    return keys, Curriculum(keys, domains or ["it"] * len(keys), config, prompts=32, **options)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("unsolvable", [0.0, 0.2])
def test_on_a_pool_half_solved_more_groups_have_a_signal_than_drawn_uniformly(seed, unsolvable):
    draw = np.random.default_rng(seed)
    middle = np.where(draw.random(200) < unsolvable, 0.0, draw.uniform(0.15, 0.85, 200))
    chances = np.concatenate([np.ones(200), middle])
    shares = {}
    for mode in ("rlcs", "uniform"):
        keys, curriculum = made(chances, mode, seed=seed)
        outcomes = [one for step in range(50) for one in played(curriculum, keys, chances, step)]
        shares[mode] = np.mean([one.is_valid for one in outcomes])
    assert shares["rlcs"] >= 1.3 * shares["uniform"], shares


def test_every_tier_and_domain_has_its_floor_in_every_step():
    draw = np.random.default_rng(0)
    chances = np.concatenate([np.ones(500), np.zeros(300), draw.uniform(0, 1, 200)])
    domains = np.array(["many"] * 900 + ["few"] * 100)[draw.permutation(1000)].tolist()
    rates = {f"k{number}": float(chance) for number, chance in enumerate(chances)}
    keys, curriculum = made(chances, domains=domains, rates=rates, config={"floor": 0.1})
    for step in range(20):
        tiers = curriculum.tiers()
        drawn = curriculum.draw(step)
        assert len(drawn) == len(set(drawn)) == min(int(np.ceil(32 * curriculum.expansion)), 1000)
        for tier in set(tiers.tolist()):
            needed = min(0.1 * len(drawn), np.sum(tiers == tier))
            assert np.sum(tiers[drawn] == tier) > needed - 2, (step, tier)
        assert np.mean([domains[number] == "few" for number in drawn]) >= 0.1 - 5 / len(drawn)
        played(curriculum, keys, chances, step)


def test_of_many_steps_each_has_exactly_its_share():
    _, curriculum = made(np.full(300, 0.5), domains=["many"] * 290 + ["few"] * 10, config={"floor": 0.2})
    few = [np.mean([number >= 290 for number in curriculum.draw(step)]) for step in range(200)]
    assert np.mean(few) == pytest.approx(0.2, abs=0.005) and np.ptp(few) <= 2 / 32


def test_a_draw_depends_on_state_seed_and_step_alone_and_a_state_resumes_bit_for_bit():
    chances = np.linspace(0, 1, 90)
    keys, curriculum = made(chances, seed=3)
    for step in range(9):
        played(curriculum, keys, chances, step)
    state = json.loads(json.dumps(curriculum.state()))
    _, other = made(chances, seed=3)
    other.set_state(state)
    assert other.state() == curriculum.state()
    for step in range(9, 15):
        assert played(other, keys, chances, step) == played(curriculum, keys, chances, step)
    assert other.state() == curriculum.state()
    _, third = made(chances, seed=4)
    third.set_state(state)
    assert third.draw(9) != other.draw(9) != other.draw(10)
    with pytest.raises(DataError, match="found key 'k0'"):
        Curriculum(["x"], ["it"], CurriculumConfig(), prompts=1).set_state(state)


def test_the_expansion_follows_what_had_a_signal_up_to_its_cap():
    keys, curriculum = made(np.ones(400), config={"expansion_most": 4.0, "max_empty": 100})
    for step in range(30):
        played(curriculum, keys, np.ones(400), step)
    assert 3.99 < curriculum.expansion <= 4 and len(curriculum.draw(30)) == 128
    curriculum.update([Outcome(key, 0.5, SAMPLES, True) for key in keys[:32]])
    assert curriculum.expansion == pytest.approx(0.7 * 4 + 0.3, abs=0.01) and curriculum.num_empty == 0


def test_steps_without_a_signal_end_the_job_with_the_pass_rates():
    keys, curriculum = made(np.ones(40), config={"max_empty": 5})
    with pytest.raises(DataError, match=r"found 5 steps in a row .* Pass rates by tier: 40 at 100%"):
        for step in range(20):
            played(curriculum, keys, np.ones(40), step)
    assert step == 4


def test_offline_rates_are_a_prior_that_rollouts_outvote():
    domains = ["first", "second", "first", "third"]
    _, curriculum = made(np.full(4, 0.5), domains=domains, rates={"k0": 0.5, "k1": 0.1, "k2": 0.9})
    assert curriculum.pass_rates() == pytest.approx([0.5, 0.1, 0.9, 0.5])
    for _ in range(4):
        curriculum.update([Outcome("k0", 0.9, 16, True), Outcome("k2", 0.5, 16, True)])
    first, second, third, _ = curriculum.pass_rates()
    assert first > 0.8 and second == pytest.approx(0.1) and third < 0.6


def test_offline_rates_move_with_what_becomes_of_the_problems_of_their_domain():
    rates = {"k0": 0.2, "k1": 0.2, "k2": 0.4, "k3": 0.3}
    _, curriculum = made(np.full(5, 0.5), domains=["it"] * 3 + ["other", "it"], rates=rates)
    assert curriculum.pass_rates()[4] == pytest.approx(0.8 / 3)  # without a rate of its own: the mean of its domain
    for _ in range(4):
        curriculum.update([Outcome("k0", 0.8, 16, True)])
    _, again, easier, other, unknown = curriculum.pass_rates()
    assert again == pytest.approx(0.8, abs=0.05) and easier > again > 0.7 and unknown > again
    assert other == pytest.approx(0.3)


def test_the_rate_of_problems_never_drawn_follows_a_model_that_learns():
    chances = np.full(400, 0.1)
    keys, curriculum = made(chances)
    for step in range(13):
        if step == 10:
            before, chances = curriculum.pass_rates(), np.full(400, 0.9)
        played(curriculum, keys, chances, step)
    tried = set(curriculum.state()["counts"])
    never = [number for number, key in enumerate(keys) if key not in tried]
    assert never and before[never].max() < 0.2 and curriculum.pass_rates()[never].min() > 0.7


def test_the_state_of_an_earlier_version_resumes_with_the_rates_that_it_had():
    keys, curriculum = made(np.full(4, 0.5))
    curriculum.set_state({"counts": {"k0": [6.0, 8.0], "k2": [3.0, 4.0]}, "expansion": 1.5, "num_empty": 0})
    assert curriculum.pass_rates()[1] == pytest.approx(10 / 14) and keys[1] not in curriculum.state()["counts"]


def test_problems_that_were_never_drawn_are_taken_for_those_of_their_domain_and_level():
    levels = ["easy", "easy", "hard", "hard"]
    _, curriculum = made(np.full(4, 0.5), levels=levels)
    curriculum.update([Outcome("k0", 1.0, 16, False), Outcome("k2", 0.0, 16, False)])
    rates = curriculum.pass_rates()
    assert rates[1] > 0.9 and rates[3] < 0.1


@pytest.mark.parametrize(
    ("right", "most"),
    [
        ([8], 0.065),
        ([6], 0.08),
        ([4], 0.001),
        ([8, 8], 0.04),
        ([8, 0], 0.001),
        ([8, 6], 0.05),
        ([2, 6, 8, 5], 0.005),
        ([8] * 5, 0.02),
        ([1, 0, 3, 2, 0, 1, 8, 2], 0.008),
    ],
)
def test_pass_rates_are_near_those_of_the_integral_over_the_mean_of_their_domain_and_level(right, most):
    """Of Beta-binomial counts whose mean m is uniform and whose prior is Beta(4 m, 4 - 4 m), by the midpoint rule.

    A problem's own rollouts belong to that mean, as in all estimates that shrink data towards their mean: a mean of the
    others alone is off by 0.13 for 8 and 0 of 8. Where few problems are alike they count too much, as if they were
    independent.
    """
    keys, curriculum = made(np.full(len(right) + 1, 0.5))
    curriculum.update([Outcome(key, count / SAMPLES, SAMPLES, True) for key, count in zip(keys, right, strict=False)])
    m = (np.arange(1000) + 0.5) / 1000
    likelihood = scipy.stats.betabinom.pmf(np.array(right)[:, None], SAMPLES, 4 * m, 4 - 4 * m).prod(axis=0)
    of_m = likelihood / likelihood.sum()
    exact = [float(of_m @ ((4 * m + count) / (4 + SAMPLES))) for count in right] + [float(of_m @ m)]
    np.testing.assert_allclose(curriculum.pass_rates(), exact, rtol=0, atol=most)


@pytest.mark.parametrize("alike", [1, 2, 5, 20])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_pass_rates_are_calibrated_where_the_model_has_learned_more_of_some_levels(alike, spread):
    """True rates rise by 1 with the estimate, and 90 % intervals have them, of problems that were drawn uniformly.

    Args:
      alike: problems of a level.
      spread: deviation over the levels of how far the odds have moved since the offline rates.
    """
    slopes, covered = [], []
    for seed in range(4):
        random = np.random.default_rng([seed, alike])
        offline = random.uniform(0.05, 0.95, 400)
        moved = random.normal(0, spread, 400 // alike).repeat(alike)
        mean = scipy.special.expit(scipy.special.logit(offline) + moved)
        chances = random.beta(4 * mean, 4 - 4 * mean)
        levels = [str(number // alike) for number in range(400)]
        rates = {f"k{number}": float(rate) for number, rate in enumerate(offline)}
        keys, curriculum = made(chances, "uniform", levels=levels, rates=rates, seed=seed)
        tried = np.unique(
            [keys.index(one.key) for step in range(10) for one in played(curriculum, keys, chances, step)]
        )
        found, true = curriculum.pass_rates()[tried], chances[tried]
        slopes.append(np.polyfit(found, true, 1)[0])
        right, wrong = (part[tried] for part in curriculum._posterior())
        covered.append(np.abs(scipy.stats.beta.cdf(true, right, wrong) - 0.5) < 0.45)
    assert 0.88 < np.mean(slopes) < 1.06, slopes
    assert 0.84 < np.mean(np.concatenate(covered)) < 0.95


def test_more_domains_than_the_floor_has_room_for_are_refused():
    with pytest.raises(
        ConfigError, match=r"rl\.curriculum\.floor: found 0\.05 for 30 domains; expected at most 0\.0333"
    ):
        made(np.ones(30), domains=[f"d{number}" for number in range(30)])


def test_levels_are_means_over_files_and_their_lines_are_checked(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text('{"key": "x", "mean": 0.5}\n{"key": "y", "mean": 1}\n')
    second.write_text('{"key": "x", "mean": 0.25}\n')
    assert read_levels([str(first), str(second)], ["x", "y", "z"]) == {"x": 0.375, "y": 1.0}
    with pytest.raises(DataError, match=r"a\.jsonl:2: key: found 'y'; expected the key of a problem of the job"):
        read_levels([str(first)], ["x"])
    second.write_text('{"key": "x", "mean": 0.25}\n{"key": "x", "mean": 0.25}\n')
    with pytest.raises(DataError, match=r"b\.jsonl:2: key: found 'x' a second time"):
        read_levels([str(second)], ["x"])
    second.write_text('{"key": "x", "mean": 1.5}\n')
    with pytest.raises(DataError, match=r"b\.jsonl:1: mean: found 1\.5; expected a number from 0 to 1"):
        read_levels([str(second)], ["x"])
