"""Schedules and plans against closed forms."""

from __future__ import annotations

import math

import pytest

from mefem_cli.engine import schedules
from mefem_cli.engine.plan import TrainOptions, make_plan
from mefem_cli.errors import UsageError
from mefem_cli.objectives import mefem


def test_learning_rate_rises_linearly_then_falls_as_a_cosine():
    rates = [schedules.learning_rate(1e-3, step, 1000, 100) for step in range(1000)]
    assert rates[0] == pytest.approx(2e-4)
    assert rates[50] == pytest.approx((2e-4 + 1e-3) / 2)
    assert max(rates) == rates[100] == pytest.approx(1e-3)
    assert rates[100 + 450] == pytest.approx(1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi * 450 / 899)) / 2)
    assert rates[-1] == pytest.approx(1e-6)


def test_weight_decay_and_ema_reach_their_ends():
    assert [schedules.cosine(0.04, 0.4, step, 101) for step in (0, 50, 100)] == pytest.approx([0.04, 0.22, 0.4])
    assert [schedules.linear(0.996, 1.0, step, 101) for step in (0, 50, 100)] == pytest.approx([0.996, 0.998, 1.0])


@pytest.mark.parametrize(
    ("faces", "start", "end"),
    # batch 64 and 66 epochs: 7, 31 and 62 steps per epoch; batch 256: 195, of 60,000 faces 234.
    [(500, 1, 1 - 4.5 / (66 * 7)), (2_000, 1, 1 - 4.5 / (66 * 31)), (4_000, 1, 1 - 4.5 / (66 * 62))]
    + [(50_000, 1 - 20 / (66 * 195), 1), (60_000, 1 - 20 / (66 * 234), 1)],
)
def test_planned_ema_of_small_data(faces, start, end):
    plan = make_plan(TrainOptions(), faces)
    planned = mefem.parse_ema(mefem.planned_ema(mefem.Options(), plan.batch_size, plan.total_steps, paper=False))
    assert planned == (pytest.approx(start, abs=1e-6), pytest.approx(end, abs=1e-6))


def remaining(batch: int, steps: int, first: int = 0) -> float:
    """The share of the target at step `first` in the last one: the product of the momenta, as the EMA does it."""
    start, end = schedules.small_data_ema(batch, steps)
    return math.prod(schedules.linear(start, end, step, steps) for step in range(first, steps))


@pytest.mark.parametrize("steps", [100, 462, 2_046, 5_000])
def test_the_target_of_a_short_run_stays_and_then_follows(steps):
    assert remaining(64, steps) == pytest.approx(math.exp(-2.25), rel=0.05)
    first_half = remaining(64, steps) / remaining(64, steps, steps // 2)
    assert first_half > 0.5  # of the initial target is left after half of the run


@pytest.mark.parametrize(("batch", "steps"), [(64, 5_001), (256, 15_444), (1024, 60_000)])
def test_at_most_e_to_the_minus_10_of_the_initial_target_remains_in_a_long_run(batch, steps):
    assert remaining(batch, steps) <= math.exp(-10 + 0.05)


def test_ema_gaps_are_capped_for_tiny_runs():
    assert schedules.small_data_ema(64, 20) == (1.0, 0.95)


def test_unscaled_paper_values_would_keep_most_of_the_initial_target():
    """Why there is a small-data rule: 66 epochs of 2,285 faces at batch 2048 are 66 steps."""
    remaining = math.prod(schedules.linear(0.996, 1.0, step, 66) for step in range(66))
    assert remaining > 0.85


def test_the_paper_preset_begins_at_a_million_faces():
    small, paper = make_plan(TrainOptions(), 999_999), make_plan(TrainOptions(), 1_000_000)
    assert (small.preset, paper.preset) == ("small", "paper")
    assert (paper.batch_size, paper.lr, paper.epochs, paper.weight_decay) == (2048, 1e-3, 66, (0.04, 0.4))
    assert mefem.planned_ema(mefem.Options(), 2048, paper.total_steps, paper=True) == "0.996:1"


def test_small_data_learning_rate_scales_with_the_square_root_of_the_batch():
    assert schedules.small_data_learning_rate(2048) == 1e-3
    assert schedules.small_data_learning_rate(1024) == pytest.approx(1e-3 / math.sqrt(2))
    assert schedules.small_data_learning_rate(64) == pytest.approx(1e-3 / math.sqrt(32))
    assert schedules.small_data_learning_rate(4) == 1e-4


@pytest.mark.parametrize(
    ("options", "batch_size", "message"),
    [
        ({}, "300", "there are 200 training faces"),
        ({}, "many", "wanted auto or a number"),
        ({"accumulate": 3}, "64", "does not divide"),
    ],
)
def test_impossible_plans_are_refused(options, batch_size, message):
    with pytest.raises(UsageError, match=message):
        make_plan(TrainOptions(**options), 200, batch_size)


@pytest.mark.parametrize(
    "option",
    [
        {"lr": 0.0},
        {"lr": float("inf")},
        {"warmup_epochs": float("nan")},
        {"epochs": -1},
        {"accumulate": 0},
        {"weight_decay": "a:b"},
    ],
)
def test_impossible_options_are_refused(option):
    with pytest.raises(UsageError, match="--" + next(iter(option)).replace("_", "-")):
        TrainOptions(**option)


@pytest.mark.parametrize("ema", [".9", "1:2", "x:1", "0.9:1:1"])
def test_impossible_ema_is_refused(ema):
    with pytest.raises(UsageError, match="--ema"):
        mefem.Options(ema=ema)
