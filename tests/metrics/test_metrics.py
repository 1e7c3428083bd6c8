"""Reported figures against counts and logs done by hand."""

import functools
import json
import math

import pytest

from fairseq.metrics.training import StepSums, TrainMeters, format_figure, loss_figures, perplexity, valid_figures

step = functools.partial(StepSums, num_batches=1.0, log={})


class Clock:
    """Time that passes only when told."""

    now = 100.0

    def __call__(self):
        return self.now


def nats(bits, tokens):
    return bits * tokens * math.log(2)


def test_losses_are_in_bits_and_perplexity_is_two_to_their_power():
    found = loss_figures({"loss": nats(3.0, 10), "sample_size": 10, "num_tokens": 10})
    assert found == {"loss": pytest.approx(3.0), "ppl": pytest.approx(8.0)}


def test_perplexity_comes_from_the_likelihood_where_the_loss_is_none():
    smoothed = {"loss": nats(5.0, 10), "nll_loss": nats(3.0, 10), "sample_size": 10, "num_tokens": 10}
    assert loss_figures(smoothed) == pytest.approx({"loss": 5.0, "nll_loss": 3.0, "ppl": 8.0})
    per_sentence = {"loss": nats(3.0, 10), "sample_size": 2, "num_tokens": 10}
    assert loss_figures(per_sentence) == pytest.approx({"loss": 15.0, "nll_loss": 3.0, "ppl": 8.0})


def test_further_losses_of_a_criterion_are_reported_per_token():
    sums = {"loss": nats(4.0, 8), "ori_loss": nats(5.0, 8), "hits": 3.0, "sample_size": 8, "num_tokens": 8}
    assert loss_figures(sums) == pytest.approx({"loss": 4.0, "ori_loss": 5.0, "ppl": 16.0})


def test_nothing_scored_is_not_a_division_by_zero():
    assert loss_figures({"loss": 0.0, "sample_size": 0, "num_tokens": 0}) == {"loss": 0.0, "ppl": 1.0}
    assert valid_figures(step(0.0, 0, 0, 0, num_batches=0), 0.0, 7)["wpb"] == 0.0


def test_a_huge_loss_has_infinite_perplexity():
    assert perplexity(5000.0) == math.inf
    assert format_figure("ppl", math.inf) == "inf"


def test_figures_of_validation():
    sums = step(nats(2.0, 21), 21, 21, 6, num_batches=4)
    found = valid_figures(sums, seconds=2.0, num_updates=205)
    expected = {"loss": 2.0, "ppl": 4.0, "wps": 10.5, "wpb": 5.25, "bsz": 1.5, "num_updates": 205}
    assert found == pytest.approx(expected)
    assert list(found) == list(expected)


def updates():
    return [
        step(nats(8.0, 100), 100, 100, 4, norm=1.0, clipped=True),
        step(nats(6.0, 100), 100, 100, 4, norm=0.5, clipped=False),
        step(nats(4.0, 200), 200, 200, 10, norm=0.3, clipped=True),
    ]


def test_figures_of_training_cover_the_epoch_and_the_last_interval():
    clock = Clock()
    meters = TrainMeters(clock)
    clock.now += 5  # reading data before the first epoch counts for wall only
    meters.begin_epoch()
    for number, sums in enumerate(updates(), start=1):
        clock.now += 2
        meters.add(sums, seconds=1.5)
        if number == 2:
            assert meters.inner_figures(2, 0.1) == pytest.approx(
                {"loss": 7.0, "ppl": 128.0, "wps": 50.0, "ups": 0.5, "wpb": 100.0, "bsz": 4.0, "gnorm": 0.75}
                | {"clip": 50.0, "num_updates": 2, "lr": 0.1, "train_wall": 3.0, "wall": 9.0}
            )
    assert meters.inner_figures(3, 0.1)["loss"] == pytest.approx(4.0)
    expected = {"loss": 5.5, "ppl": 2**5.5, "wps": 400 / 6, "ups": 0.5, "wpb": 400 / 3, "bsz": 6.0}
    expected |= {"num_updates": 3, "lr": 0.2, "gnorm": 0.6, "clip": 200 / 3, "train_wall": 4.5, "wall": 11.0}
    assert meters.epoch_figures(3, 0.2) == pytest.approx(expected)
    assert list(meters.epoch_figures(3, 0.2)) == list(expected)  # the order of fairseq's logs
    meters.begin_epoch()
    assert meters.epoch_figures(3, 0.2) == {"num_updates": 3, "lr": 0.2, "train_wall": 4.5, "wall": 11.0}


def test_a_continued_epoch_reports_what_an_uninterrupted_one_does():
    def add(meters, clock, sums):
        clock.now += 2
        meters.add(sums, seconds=1.5)

    one, clock = updates(), Clock()
    whole = TrainMeters(clock)
    for sums in one:
        add(whole, clock, sums)

    before = Clock()
    first = TrainMeters(before)
    for sums in one[:2]:
        add(first, before, sums)
    stored = json.loads(json.dumps(first.state_dict()))
    after = Clock()
    after.now = 1e6  # another machine, another day
    second = TrainMeters(after)
    second.load_state_dict(stored)
    add(second, after, one[2])
    assert second.epoch_figures(3, 0.1) == whole.epoch_figures(3, 0.1)


@pytest.mark.parametrize(
    ("name", "value", "written"),
    [
        ("loss", 8.1724, "8.172"),
        ("loss", 7.9, "7.9"),
        ("ori_loss", 8.2200001, "8.22"),
        ("best_loss", 8.0, "8"),
        ("ppl", 288.39, "288.39"),
        ("ppl", 341.5, "341.50"),
        ("wps", 3941.81, "3941.8"),
        ("ups", 1.934, "1.93"),
        ("wpb", 2046.0, "2046"),
        ("bsz", 7.5, "7.5"),
        ("lr", 0.00148158963, "0.00148159"),
        ("gnorm", 1.1271, "1.127"),
        ("clip", 100.0, "100"),
        ("train_wall", 110.7, "111"),
        ("wall", 100.0, "100"),
        ("num_updates", 1234567, "1234567"),
        ("loss", math.nan, "nan"),
    ],
)
def test_figures_are_written_as_in_the_logs_of_fairseq(name, value, written):
    assert format_figure(name, value) == written
