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
    ("faces", "expected_start"),
    # batch 64 and 66 epochs: 7, 31 steps per epoch; batch 256: 195. 20 / total_steps against .004 * B / 2048.
    [(500, 1 - 20 / (66 * 7)), (2_000, 1 - 20 / (66 * 31)), (50_000, 1 - 20 / (66 * 195))],
)
def test_small_data_ema_start(faces, expected_start):
    plan = make_plan(TrainOptions(), faces)
    start, end = mefem.parse_ema(mefem.planned_ema(mefem.Options(), plan.batch_size, plan.total_steps, paper=False))
    assert (start, end) == (pytest.approx(max(expected_start, 0.95), abs=1e-6), 1.0)


@pytest.mark.parametrize("faces", [500, 2_000, 50_000])
def test_at_most_e_to_the_minus_10_of_the_initial_target_remains(faces):
    """Multiply the momenta of all steps, as the EMA does."""
    plan = make_plan(TrainOptions(), faces)
    assert plan.total_steps >= 400
    start = schedules.small_data_ema_start(plan.batch_size, plan.total_steps)
    log_remaining = sum(
        math.log(schedules.linear(start, 1.0, step, plan.total_steps)) for step in range(plan.total_steps)
    )
    assert log_remaining <= -10 + 0.05


def test_ema_gap_is_capped_for_tiny_runs():
    assert schedules.small_data_ema_start(64, 100) == 0.95


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
    assert schedules.small_data_learning_rate(64) == 5e-4


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
