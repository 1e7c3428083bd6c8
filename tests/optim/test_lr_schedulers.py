"""Learning rates against the written formulas and against rates that the original programs logged."""

import json
import math

import pytest
from hypothesis import given as draw
from hypothesis import strategies as st

from fairseq.optim import LR_SCHEDULERS
from fairseq.optim.configs import OptimizationConfig
from fairseq.optim.lr_schedulers import build_lr_scheduler

TRIME = {"max_lr": 1.0, "warmup_init_lr": 1e-7, "t_mult": 2.0, "lr_period_updates": 270_000.0, "lr_shrink": 0.75}
TRIME_WARMUP = 16_000


def close(value):
    return pytest.approx(value, rel=1e-9)


def test_inverse_sqrt_gives_the_rates_the_original_logged():
    given = {"warmup_updates": 50, "warmup_init_lr": 1e-7}
    schedule = build_lr_scheduler("inverse_sqrt", given, (0.003,), max_update=820)
    logged = {205: "0.00148159", 410: "0.00104765", 615: "0.000855399", 820: "0.000740797"}
    assert {n: f"{schedule.step_update(n):g}" for n in logged} == logged
    assert schedule.step_update(0) == 1e-7
    assert schedule.step_update(25) == close((0.003 + 1e-7) / 2)
    assert schedule.step_update(50) == close(0.003)


def test_inverse_sqrt_starts_at_zero_and_without_warmup_at_the_rate_itself():
    assert build_lr_scheduler("inverse_sqrt", {}, (0.5,)).lr == 0
    plain = build_lr_scheduler("inverse_sqrt", {"warmup_updates": 0}, (0.5,))
    assert [plain.step_update(n) for n in (0, 1, 4)] == [0.5, 0.5, 0.25]


def test_cosine_follows_the_recipe_of_trime():
    schedule = build_lr_scheduler("cosine", TRIME | {"warmup_updates": TRIME_WARMUP}, (0.0001,), max_update=286_000)
    middle = (1 + 0.0001) / 2
    table = {
        0: 1e-7,
        8_000: 1e-7 + (1 - 1e-7) / 2,
        16_000: 1.0,
        16_000 + 135_000: middle,
        286_000: 0.75,  # the second period: twice as long, its rates times 0.75
        286_000 + 270_000: 0.75 * middle,
        286_000 + 540_000: 0.75**2,
        286_000 + 540_000 + 540_000: 0.75**2 * middle,
    }
    assert {n: schedule.step_update(n) for n in table} == {n: close(lr) for n, lr in table.items()}
    assert schedule.step_update(285_999) == pytest.approx(0.0001, rel=1e-3)


@draw(st.integers(1, 500), st.sampled_from([1.0, 1.5, 2.0, 3.0]), st.integers(0, 20_000))
def test_cosine_is_eq_5_of_sgdr_in_every_period(period, t_mult, update):
    low, high, shrink = 0.01, 0.3, 0.9
    settings = {"max_lr": high, "t_mult": t_mult, "lr_period_updates": float(period), "lr_shrink": shrink}
    number, length, done = 0, float(period), float(update)
    while done >= length:  # warm restarts, one after the other
        number, done, length = number + 1, done - length, length * t_mult
    expected = shrink**number * (low + 0.5 * (high - low) * (1 + math.cos(done / length * math.pi)))
    assert build_lr_scheduler("cosine", settings, (low,)).step_update(update) == close(expected)


def test_cosine_without_max_lr_descends_from_lr_over_the_whole_run():
    schedule = build_lr_scheduler("cosine", {"warmup_updates": 10}, (0.4,), max_update=110)
    rates = [schedule.step_update(n) for n in (0, 5, 10, 60)]
    assert rates == [close(rate) for rate in (0.0, 0.2, 0.4, 0.2)]
    floored = build_lr_scheduler("cosine", {"warmup_updates": 10}, (0.4,), max_update=110, min_lr=0.1)
    assert floored.step_update(60) == close(0.25)
    assert floored.step_update(109) == pytest.approx(0.1, rel=1e-2)


def test_fixed_takes_one_rate_per_epoch_and_shrinks_from_the_epoch_named():
    schedule = build_lr_scheduler("fixed", {"force_anneal": 4, "lr_shrink": 0.5}, (0.4, 0.3))
    rates = [schedule.lr] + [schedule.step_epoch(epoch, 1.0) for epoch in range(1, 6)]
    assert rates == [0.4, 0.3, 0.3, 0.15, 0.075, 0.0375]


def test_fixed_warms_up_within_the_first_epochs():
    schedule = build_lr_scheduler("fixed", {"warmup_updates": 4}, (0.4,))
    rates = [schedule.step_update(n) for n in range(6)]
    assert rates == [close(rate) for rate in (0.1, 0.2, 0.3, 0.4, 0.4, 0.4)]


def test_polynomial_decay_descends_to_the_end_rate_and_stays():
    given = {"warmup_updates": 10, "total_num_update": 110, "power": 2.0, "end_learning_rate": 0.1}
    schedule = build_lr_scheduler("polynomial_decay", given, (0.5,))
    rates = [schedule.step_update(n) for n in (0, 5, 10, 60, 110, 500)]
    assert rates == [close(rate) for rate in (0.0, 0.25, 0.5, 0.1 + 0.4 * 0.25, 0.1, 0.1)]


def test_polynomial_decay_takes_its_rate_from_the_list_until_told_otherwise():
    given = {"total_num_update": 100, "force_anneal": 3}
    schedule = build_lr_scheduler("polynomial_decay", given, (0.4, 0.3, 0.2))
    assert [schedule.lr] + [schedule.step_epoch(epoch) for epoch in (1, 2, 3)] == [0.4, 0.3, 0.3, 0.3]


def test_plateau_shrinks_when_nothing_gets_better():
    schedule = build_lr_scheduler("reduce_lr_on_plateau", {"lr_shrink": 0.5, "lr_patience": 1}, (0.4,))
    figures = [5.0, 4.0, 4.1, 3.9, 3.9, 3.95, None, 3.8]
    rates = [schedule.step_epoch(epoch, figure) for epoch, figure in enumerate(figures, start=1)]
    # One failure after 4.0 is let pass; after 3.9 there are two in a row. No validation says nothing.
    assert rates == [0.4, 0.4, 0.4, 0.4, 0.4, 0.2, 0.2, 0.2]


def test_plateau_counts_a_change_only_above_the_threshold():
    schedule = build_lr_scheduler("reduce_lr_on_plateau", {"lr_threshold": 0.1}, (0.4,))
    assert [schedule.step_epoch(epoch, figure) for epoch, figure in ((1, 10.0), (2, 9.5))] == [0.4, close(0.04)]


def test_plateau_may_watch_a_figure_that_should_grow():
    schedule = build_lr_scheduler("reduce_lr_on_plateau", {"maximize_best_checkpoint_metric": True}, (0.4,))
    assert [schedule.step_epoch(epoch, figure) for epoch, figure in ((1, 1.0), (2, 2.0), (3, 1.5))] == [
        0.4,
        0.4,
        close(0.04),
    ]


def test_plateau_does_not_count_figures_of_the_warmup():
    schedule = build_lr_scheduler("reduce_lr_on_plateau", {"warmup_updates": 10}, (0.4,))
    assert schedule.step_update(5) == close(0.2)
    schedule.step_epoch(1, 1.0)
    assert schedule.step_epoch(2, 9.0) == close(0.2)
    assert schedule.step_update(10) == 0.4
    assert schedule.step_epoch(3, 8.0) == 0.4


@pytest.mark.parametrize(
    "name", sorted(name for name, entry in LR_SCHEDULERS.items() if hasattr(entry.config(), "warmup_updates"))
)
def test_a_warmup_ends_when_its_updates_are_done(name):
    schedule = build_lr_scheduler(name, SETTINGS[name] | {"warmup_updates": 3}, (0.5,))
    warming = []
    for update in range(5):
        schedule.step_update(update)
        warming.append(schedule.is_warming_up)
    assert warming == [True, True, True, False, False]


SETTINGS = {
    "cosine": {"lr_period_updates": 8.0, "warmup_updates": 3, "max_lr": 0.9},
    "fixed": {"warmup_updates": 7, "force_anneal": 3},
    "inverse_sqrt": {"warmup_updates": 3},
    "polynomial_decay": {"total_num_update": 20, "warmup_updates": 3},
    "reduce_lr_on_plateau": {"warmup_updates": 3},
    "tri_stage": {"warmup_steps": 3, "hold_steps": 4, "decay_steps": 8},
    "triangular": {"max_lr": 0.9, "lr_period_updates": 6.0},
    "manual": {"epoch2lr": {1: 0.3, 3: 0.1}, "update2lr": {15: 0.05}},
}


def test_tri_stage_warms_up_holds_and_decays_exponentially():
    schedule = build_lr_scheduler(
        "tri_stage", {"phase_ratio": (0.1, 0.4, 0.5), "init_lr_scale": 0.1, "final_lr_scale": 0.01}, (0.2,), 100
    )
    rates = [schedule.step_update(n) for n in (0, 5, 10, 49, 50, 75, 100, 101)]
    assert rates == [close(rate) for rate in (0.02, 0.11, 0.2, 0.2, 0.2, 0.02, 0.002, 0.002)]
    counted = build_lr_scheduler("tri_stage", {"warmup_steps": 10, "hold_steps": 40, "decay_steps": 50}, (0.2,))
    assert counted.step_update(75) == close(0.2 * math.exp(math.log(0.01) * 0.5))
    with pytest.raises(ValueError, match="--phase-ratio gives shares of --max-update"):
        build_lr_scheduler("tri_stage", {"phase_ratio": (0.1, 0.4, 0.5)}, (0.2,))
    with pytest.raises(ValueError, match="no update in any phase"):
        build_lr_scheduler("tri_stage", {}, (0.2,))


@draw(st.integers(0, 200), st.floats(0.1, 1.0), st.booleans())
def test_triangular_rises_and_falls_between_two_rates(update, shrink, shrink_min):
    settings = {"max_lr": 1.0, "lr_period_updates": 20.0, "lr_shrink": shrink, "shrink_min": shrink_min}
    period, place = update // 20, update % 20
    low, high = 0.1 * (shrink**period if shrink_min else 1.0), shrink**period
    share = place / 10 if place <= 10 else (20 - place) / 10
    made = build_lr_scheduler("triangular", settings, (0.1,))
    assert made.step_update(update) == pytest.approx(low + (high - low) * share, abs=1e-12)


def test_manual_rates_come_from_tables_and_updates_go_first():
    table = LR_SCHEDULERS["manual"].config.__dataclass_fields__["epoch2lr"].metadata["parse"]
    epochs, updates = table("{'1': 0.4, '2-3': 0.2, '5,7': 0.1}"), table("{10: 0.05}")
    assert epochs == {1: 0.4, 2: 0.2, 3: 0.2, 5: 0.1, 7: 0.1}
    schedule = build_lr_scheduler("manual", {"epoch2lr": epochs, "update2lr": updates}, (0.5,))
    assert [schedule.lr] + [schedule.step_epoch(epoch) for epoch in range(1, 5)] == [0.4, 0.2, 0.2, 0.2, 0.1]
    assert [schedule.step_update(n) for n in (9, 10, 11)] == [0.1, 0.05, 0.05]
    with pytest.raises(ValueError, match="gives no rate for each number or range"):
        table("[1, 2]")


@pytest.mark.parametrize("name", sorted(LR_SCHEDULERS))
def test_a_stored_state_goes_on_as_if_never_interrupted(name):
    def run(schedule, updates):
        rates = []
        for update in updates:
            rates.append(schedule.step_update(update))
            if update % 4 == 0:
                rates.append(schedule.step_epoch(update // 4, val_loss=5.0 if update < 8 else 6.0))
        return rates

    whole = run(build_lr_scheduler(name, SETTINGS[name], (0.5,)), range(1, 20))
    first = build_lr_scheduler(name, SETTINGS[name], (0.5,))
    begun = run(first, range(1, 10))
    second = build_lr_scheduler(name, SETTINGS[name], (0.5,))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.lr == first.lr
    assert begun + run(second, range(10, 20)) == whole


@pytest.mark.parametrize(
    ("name", "given", "lrs", "said"),
    [
        ("cosin", {}, (0.1,), "did you mean 'cosine'"),
        ("cosine", {}, (0.1, 0.2), "--lr 0.1,0.2: the cosine schedule takes one rate"),
        ("cosine", {}, (0.1,), "no period: give --lr-period-updates, or a --max-update"),
        ("cosine", {"max_lr": 0.1, "lr_period_updates": 9.0}, (0.2,), "--max-lr 0.1 must be larger than --lr 0.2"),
        ("cosine", {"t_mult": 0.5}, (0.1,), "--t-mult must be at least 1, got 0.5"),
        ("inverse_sqrt", {"warmup_updates": -1}, (0.1,), "--warmup-updates must be at least 0, got -1"),
        (
            "polynomial_decay",
            {"total_num_update": 5, "warmup_updates": 5},
            (0.1,),
            "--total-num-update 5 must be larger",
        ),
        ("reduce_lr_on_plateau", {"lr_shrink": 1.0}, (0.1,), "--lr-shrink must lie between 0 and 1"),
        ("fixed", {}, (), "--lr needs at least one number"),
        ("fixed", {}, (-0.1,), "none below 0"),
    ],
)
def test_mistakes_are_told(name, given, lrs, said):
    with pytest.raises(ValueError, match=said):
        build_lr_scheduler(name, given, lrs)


@pytest.mark.parametrize(
    ("name", "schedule", "limits", "stops"),
    [
        ("cosine", {"max_lr": 1.0}, {"min_lr": 1e-9}, 1e-9),  # fairseq 0.9, where --max-lr is required
        ("cosine", {}, {"min_lr": 1e-4}, -1.0),  # fairseq 0.12, where it does not exist
        ("cosine", {}, {"min_lr": 1e-4, "stop_min_lr": 1e-9}, 1e-9),
        ("inverse_sqrt", {}, {"min_lr": 1e-9}, 1e-9),
        ("inverse_sqrt", {}, {"min_lr": 1e-5, "stop_min_lr": 1e-9}, 1e-9),
        ("fixed", {}, {"stop_min_lr": 1e-3}, 1e-3),
    ],
)
def test_min_lr_stops_training_where_fairseq_0_9_says_so_and_is_a_floor_in_0_12(name, schedule, limits, stops):
    config = OptimizationConfig(max_update=100, lr=(0.5,), **limits)
    made = build_lr_scheduler(name, schedule, (0.5,), max_update=100, min_lr=limits.get("min_lr", -1.0))
    assert config.stop_lr(has_floor=made.has_floor) == stops


def test_a_floor_ends_no_training():
    with pytest.raises(ValueError, match="never stop"):
        OptimizationConfig(lr=(0.5,), min_lr=1e-4).stop_lr(has_floor=True)
