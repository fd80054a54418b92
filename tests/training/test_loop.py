"""Training: order of the data, learning rate, evaluations, which weights are kept, the log.

A `Toy` stage shows what the loop does with any model.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.codes.dataset import CodeDataset
from pipeline.evaluation.likelihood import measure_prior
from pipeline.evaluation.reconstruction import measure_reconstruction
from pipeline.images.holdout import held_out
from pipeline.images.image_set import open_images
from pipeline.models.checkpoint import load_training, read_info, read_run
from pipeline.models.loading import load_prior, load_tokenizer
from pipeline.training.loop import run_training
from pipeline.training.metrics_log import MetricsLog
from pipeline.training.prior_stage import PriorStage
from pipeline.training.schedule import WARMUP_STEPS, DataOrder, learning_rate_at
from pipeline.training.tokenizer_stage import TokenizerStage
from tokenizer import VQVAE, TokenizerConfig

from ..conftest import Trained
from ..support import bits_of, load_weights
from .training_runs import Toy, lines_of, run_again, settings_of, stop_at, toy_info

# The order of the data


@pytest.mark.parametrize(("num_items", "batch_size"), [(7, 3), (7, 7), (5, 12), (1, 4), (100, 32)])
def test_every_epoch_is_another_permutation(num_items: int, batch_size: int) -> None:
    """G5, cut out of the concatenated batches; also with a batch larger than an epoch."""
    order, epochs = DataOrder(num_items, batch_size, seed=0), 6
    steps = math.ceil(epochs * num_items / batch_size)
    batches = [order.batch(step) for step in range(steps)]
    assert all(len(batch) == batch_size for batch in batches)
    indices = np.concatenate(batches)[: epochs * num_items].reshape(epochs, num_items)
    for epoch in indices:
        assert sorted(epoch) == list(range(num_items))
    if num_items >= 7:
        assert len({tuple(epoch) for epoch in indices}) == epochs
        assert list(range(num_items)) not in indices.tolist()


def test_a_batch_depends_on_the_seed_and_its_step_alone() -> None:
    forwards = [DataOrder(7, 3, 5).batch(step).tolist() for step in range(9)]
    order = DataOrder(7, 3, 5)
    assert [order.batch(step).tolist() for step in reversed(range(9))] == forwards[::-1]
    assert [DataOrder(7, 3, 6).batch(step).tolist() for step in range(9)] != forwards


# The learning rate


def test_the_learning_rate_warms_up_and_falls_to_nothing() -> None:
    rates = [learning_rate_at(step, peak=0.3, steps=500) for step in range(500)]
    assert rates[0] == pytest.approx(0.3 / WARMUP_STEPS)
    assert rates[WARMUP_STEPS - 1] == pytest.approx(0.3)
    assert max(rates) == pytest.approx(0.3)
    assert rates[:WARMUP_STEPS] == sorted(rates[:WARMUP_STEPS])
    assert rates[WARMUP_STEPS:] == sorted(rates[WARMUP_STEPS:], reverse=True)
    assert rates[(WARMUP_STEPS + 500) // 2] == pytest.approx(0.15)
    assert 0 < rates[-1] < 1e-4
    assert all(rate > 0 for rate in rates)


def test_a_learning_rate_that_does_not_decay_warms_up_and_stays() -> None:
    decaying, constant = (
        [learning_rate_at(step, peak=0.3, steps=500, decays=decays) for step in range(500)] for decays in (True, False)
    )
    assert constant[:WARMUP_STEPS] == decaying[:WARMUP_STEPS]
    assert constant[WARMUP_STEPS:] == [0.3] * (500 - WARMUP_STEPS)


# What the loop does with any model


def test_adam_takes_its_first_step_at_the_rate_of_step_0(tmp_path: Path) -> None:
    """G7: with one sign of gradient, Adam moves a weight by exactly the learning rate."""
    toy, settings = Toy(), settings_of(steps=3, learning_rate=0.5)
    run_training(toy, toy_info(), settings, tmp_path)
    moved = np.diff([*toy.weights, toy.weight])
    np.testing.assert_allclose(moved, [learning_rate_at(step, peak=0.5, steps=3) for step in range(3)], rtol=1e-4)


def test_the_loop_takes_the_batches_in_order(tmp_path: Path) -> None:
    toy = Toy(num_items=5)
    run_training(toy, toy_info(), settings_of(steps=6, batch_size=3, seed=9), tmp_path)
    order = DataOrder(5, 3, 9)
    assert toy.seen == [order.batch(step).tolist() for step in range(6)]


def test_the_evaluations_are_spread_evenly(tmp_path: Path) -> None:
    for steps, evaluations in ((4, 8), (40, 8), (45, 8), (8, 1)):
        folder = tmp_path / f"{steps}-{evaluations}"
        run_training(Toy(), toy_info(), settings_of(steps=steps, evaluations=evaluations), folder)
        found = [line["step"] for line in lines_of(folder, "held_out")]
        assert found[-1] == steps
        assert len(found) == min(steps, evaluations)
        gaps = np.diff([0, *found])
        assert gaps.max() - gaps.min() <= 1


def test_evaluations_and_previews_change_nothing_that_is_learned(trained: Trained) -> None:
    images = open_images(str(trained.images)).train
    torch.manual_seed(0)
    config = TokenizerConfig(hidden_channels=4, residual_channels=2, num_codes=16, code_dim=2)
    start = VQVAE(config).state_dict()
    learned = []
    for evaluations in (1, 6):
        model = VQVAE(config)
        model.load_state_dict(start)
        stage = TokenizerStage(model, images)
        noisy = stage.evaluate
        stage.evaluate = lambda noisy=noisy: (torch.rand(7), noisy())[1]  # type: ignore[method-assign, misc]
        folder = trained.tokenizer.parent / f"evaluated-{evaluations}"
        torch.manual_seed(1)
        run_training(stage, toy_info(), settings_of(evaluations=evaluations), folder)
        learned.append(bits_of(model))
    assert learned[0] == learned[1]


# Which weights are kept


def valley(lowest_at: float) -> Callable[[float], float]:
    return lambda weight: (weight - lowest_at) ** 2


def test_the_kept_weights_are_those_of_the_best_evaluation(tmp_path: Path) -> None:
    """G6: evaluated again they give the recorded score; the last ones are worse."""
    settings = settings_of(steps=8, learning_rate=1.0, keep_best=True)
    toy = Toy(valley(0.1))  # the weight after t steps is 0.01 t (t + 1) / 2: nearest after 4
    info = run_training(toy, toy_info(), settings, tmp_path)
    assert read_info(tmp_path, "prior") == info
    assert (info.step, info.metrics["step"]) == (4, 4)
    kept = load_weights(tmp_path)["weight"].item()
    assert valley(0.1)(kept) == info.metrics["score"]
    assert kept == toy.weights[4]
    assert info.metrics["score"] < toy.score_of(toy.weight)
    assert load_training(tmp_path).tensors["model/weight"].item() == toy.weight != kept


def test_without_keep_best_the_last_weights_are_kept(tmp_path: Path) -> None:
    toy = Toy(valley(0.1))
    info = run_training(toy, toy_info(), settings_of(steps=8, learning_rate=1.0), tmp_path)
    assert info.step == 8
    assert load_weights(tmp_path)["weight"].item() == toy.weight


@pytest.mark.parametrize("stopped", range(1, 8))
def test_the_best_weights_survive_a_stop_before_or_after_them(tmp_path: Path, stopped: int) -> None:
    settings = settings_of(steps=8, learning_rate=1.0, keep_best=True)
    torch.manual_seed(0)
    expected = run_training(Toy(valley(0.1)), toy_info(), settings, tmp_path / "uninterrupted")
    torch.manual_seed(0)
    toy = Toy(valley(0.1))
    toy.at_step = stop_at(stopped)
    with pytest.raises(KeyboardInterrupt):
        run_training(toy, toy_info(), settings, tmp_path / "resumed")
    assert run_again(Toy(valley(0.1)), settings, tmp_path / "resumed") == expected
    assert (tmp_path / "resumed" / "model.safetensors").read_bytes() == (
        tmp_path / "uninterrupted" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("keep_best", [False, True])
def test_the_recorded_step_is_that_of_the_weights(tmp_path: Path, keep_best: bool) -> None:
    """Evaluations are due 8 times in 100 steps; the stop comes between the first and the second."""
    toy = Toy()  # the first evaluation is the best
    toy.at_step = stop_at(16)
    with pytest.raises(KeyboardInterrupt):
        run_training(toy, toy_info(), settings_of(steps=100, keep_best=keep_best), tmp_path)
    (evaluated,) = (line["step"] for line in lines_of(tmp_path, "held_out"))
    assert evaluated < 16
    kept = load_weights(tmp_path)["weight"].item()
    assert kept == (toy.weights[evaluated] if keep_best else toy.weight)
    assert read_info(tmp_path, "prior").step == (evaluated if keep_best else 16)
    assert load_training(tmp_path).values["step"] == 16


# The scores that are recorded


def test_the_recorded_score_of_a_tokenizer_is_that_of_its_weights(trained: Trained) -> None:
    images = open_images(str(trained.images)).train
    rows = np.flatnonzero(held_out(images.names))
    assert 0 < len(rows) < len(images)
    info = read_info(trained.tokenizer, "tokenizer")
    assert info.step == 3
    numbers, health = measure_reconstruction(load_tokenizer(trained.tokenizer), images, rows)
    assert health is not None
    found = {**vars(numbers), "codes_used": health.codes_used, "perplexity": health.perplexity}
    assert found == {name: info.metrics[name] for name in found}


def test_the_recorded_score_of_a_prior_is_that_of_its_weights(trained: Trained) -> None:
    codes, info = CodeDataset(trained.codes), read_info(trained.prior, "prior")
    rows = np.flatnonzero(held_out(list(codes.names())))
    found = measure_prior(load_prior(trained.prior), [codes.batch(rows)])
    assert found == info.metrics["bits_per_code"]
    scores = {line["step"]: line["bits_per_code"] for line in lines_of(trained.prior, "held_out")}
    assert info.step == min(scores, key=lambda step: scores[step])
    assert scores[info.step] == found


def test_held_out_rows_are_never_trained_on(trained: Trained) -> None:
    images, codes = open_images(str(trained.images)).train, CodeDataset(trained.codes)
    held_out_mask = held_out(list(codes.names()))
    for stage in (
        TokenizerStage(load_tokenizer(trained.tokenizer), images),
        PriorStage(load_prior(trained.prior), codes, held_out_mask),
    ):
        train_rows, held_out_rows = set(stage.train_rows.tolist()), set(stage.held_out_rows.tolist())
        assert held_out_rows == set(np.flatnonzero(held_out_mask).tolist())
        assert not train_rows & held_out_rows
        assert train_rows | held_out_rows == set(range(len(images)))
        assert stage.num_items == len(train_rows)


# The log


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    before, log = time.monotonic(), MetricsLog(tmp_path / "sub" / "metrics.jsonl")
    time.sleep(0.01)
    log.write(3, "train", {"loss": math.nan, "rate": math.inf, "used": 4})
    (line,) = lines_of(tmp_path / "sub")
    assert (line["step"], line["part"], line["loss"], line["rate"], line["used"]) == (3, "train", None, None, 4)
    assert 0.01 <= line["seconds"] <= time.monotonic() - before + 0.001  # rounded to thousandths


def test_a_line_cut_short_anywhere_leaves_a_log_that_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (1, 2):
        log.write(step, "train", {"loss": 0.5})
    complete = path.read_bytes()
    last = complete.splitlines(keepends=True)[-1]
    for cut in range(len(last)):
        path.write_bytes(complete[: len(complete) - len(last) + cut])
        log.drop_after(2)
        log.write(3, "train", {"loss": 0.25})
        steps = [line["step"] for line in lines_of(tmp_path)]
        assert steps == ([1, 2, 3] if cut == len(last) - 1 else [1, 3])  # without its newline, a line is still complete


def test_only_what_came_after_a_step_is_dropped(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.drop_after(3)  # there is no log yet
    for step in range(1, 6):
        for split in ("train", "held_out"):
            log.write(step, split, {"loss": 1 / step})
    before = lines_of(tmp_path)
    log.drop_after(3)
    assert lines_of(tmp_path) == [line for line in before if line["step"] <= 3]


def test_a_line_that_does_not_fit_on_the_disk_leaves_no_part_of_it(tmp_path: Path) -> None:
    """A disk may take some bytes of a line without an error, and refuse those after them."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(1, "train", {"loss": 0.5})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            log.write(2, "train", {"loss": 0.25})
        assert path.read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.write(3, "train", {"loss": 0.125})
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 3]


@pytest.mark.parametrize("seconds", ["-5.0", "1e999", "NaN", "-Infinity", '"x"'])
def test_seconds_that_no_run_takes_count_as_none(tmp_path: Path, seconds: str) -> None:
    """They would be saved with the state of the run, which then could not be read again."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "seconds": {seconds}}}\n')
    log = MetricsLog(path)
    log.resume(1, None)
    assert 0 <= log.seconds < 60


# An evaluation before the first step


def test_nothing_that_is_worse_than_the_beginning_is_kept(tmp_path: Path) -> None:
    toy = Toy(lambda weight: weight)  # the weight rises, and so does the score
    info = run_training(toy, toy_info(), settings_of(steps=4, keep_best=True, evaluate_first=True), tmp_path)
    assert info.metrics == {"step": 0, "score": 0.0}
    assert info.step == 0
    assert float(read_run(tmp_path, "prior").weights["weight"]) == 0
    assert [line["step"] for line in lines_of(tmp_path, "held_out")] == [0, 1, 2, 3, 4]


def test_what_is_better_than_the_beginning_is_kept(tmp_path: Path) -> None:
    toy = Toy(lambda weight: -weight)
    info = run_training(toy, toy_info(), settings_of(steps=4, keep_best=True, evaluate_first=True), tmp_path)
    assert info.step == 4


def test_a_run_that_goes_back_to_its_beginning_has_the_evaluation_of_it(tmp_path: Path) -> None:
    scores = iter([1.0, 5.0, math.nan, 6.0, 5.0, 4.0, 3.0])
    toy = Toy(lambda weight: next(scores))
    info = run_training(toy, toy_info(), settings_of(steps=4, keep_best=True, evaluate_first=True), tmp_path)
    assert toy.weights[0] == toy.weights[2] == 0 < toy.weights[1]  # the third step is the first one once more
    assert info.metrics == {"step": 0, "score": 1.0}
    assert float(read_run(tmp_path, "prior").weights["weight"]) == 0
