"""Measurements by several processes: the numbers of one to the last bit, in all of them, with each image seen once.

Most run as threads that communicate as processes do; one as torchrun starts them.
"""

import copy
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.evaluation import classification_score, judge_training, likelihood, sample_quality
from pipeline.evaluation import evaluate as evaluation
from pipeline.evaluation.decoder_distance import DecoderDistance, DecoderNumbers
from pipeline.evaluation.inception import BATCH, FEATURES, inception_features
from pipeline.evaluation.judge import TrainedJudge
from pipeline.evaluation.judge_network import Judge, JudgeConfig
from pipeline.evaluation.likelihood import measure_prior
from pipeline.evaluation.reconstruction import MeasuredDecoders, measure_decoders, measure_reconstruction
from pipeline.evaluation.sample_quality import QualityOptions
from pipeline.evaluation.simple_predictors import SimplePredictors
from pipeline.generation import sample_folder
from pipeline.images.image_set import ImageSplit
from pipeline.models.inference import BLOCK
from pipeline.runtime.process_group import OtherProcessError, ProcessGroup
from tokenizer import VQVAE

from ..conftest import Trained
from ..process_threads import run_in_threads
from ..support import (
    GRID,
    HEIGHT,
    LEVELS,
    ROOT,
    WIDTH,
    as_a_program,
    brightness_baseline,
    brightness_tokenizer,
    save_prior,
    save_tokenizer,
    tiny_prior,
)
from .judged_sets import CLASSES, figures, folder_of, quick_judges
from .judged_sets import HEIGHT as FIGURE_HEIGHT
from .judged_sets import WIDTH as FIGURE_WIDTH


def noise(count: int) -> ImageSplit:
    """Random pixels, far from what can be reconstructed, so that sums in another order differ."""
    images = np.random.default_rng(count).integers(0, 256, (count, 1, HEIGHT, WIDTH), dtype=np.uint8)
    return ImageSplit(images, np.full(count, -1), tuple(f"{i}.png" for i in range(count)))


def darker() -> VQVAE:
    """A tokenizer of the same codes with another decoder."""
    model = brightness_tokenizer()
    with torch.no_grad():
        list(model.decoder.parameters())[-1].sub_(0.1)
    return model


def in_order(values: list[float]) -> float:
    total = 0.0
    for value in values:
        total += value
    return total


# Reconstruction


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("n", [1, BLOCK, 3 * BLOCK + 9])
def test_decoders_are_measured_as_by_one_process(count: int, n: int) -> None:
    split, rows = noise(n + 5), np.random.default_rng(0).permutation(n + 5)[:n]

    def work(group: ProcessGroup) -> tuple[MeasuredDecoders, Tensor, Tensor, Tensor]:
        codes, errors = list[Tensor](), list[Tensor]()
        measured = measure_decoders(
            brightness_tokenizer(),
            darker(),
            split,
            rows,
            on_codes=codes.append,
            on_errors=errors.append,
            group=group,
        )
        assert measured.codebook is not None
        return measured, measured.codebook.histogram, torch.cat(codes), torch.cat(errors)

    alone = work(ProcessGroup())
    assert alone[0].numbers != alone[0].other
    assert (alone[2].dtype, alone[3].dtype) == (torch.int64, torch.float32)
    for found in run_in_threads(count, work):
        assert found[0] == alone[0]
        assert all(map(torch.equal, found[1:], alone[1:]))


def test_the_errors_of_blocks_are_added_up_in_their_order() -> None:
    """Sums of the sums of processes would differ in the last bits."""
    split, errors = noise(12 * BLOCK), list[Tensor]()
    numbers = measure_decoders(brightness_tokenizer(), None, split, on_errors=errors.append).numbers
    sums = [float(error.double().sum()) for error in errors]
    assert len(sums) == 12
    assert numbers.mse == in_order(sums) / split.images.size
    for count in (2, 3, 4):
        for found, _ in run_in_threads(count, lambda g: measure_reconstruction(brightness_tokenizer(), split, group=g)):
            assert found == numbers


def test_no_image_is_encoded_by_two(monkeypatch: pytest.MonkeyPatch) -> None:
    encode, blocks = VQVAE.encode, list[tuple[str, bytes]]()

    def spy(model: VQVAE, block: Tensor) -> Tensor:
        blocks.append(block.numpy().tobytes())
        return encode(model, block)

    monkeypatch.setattr(VQVAE, "encode", spy)
    split = noise(4 * BLOCK + 1)
    run_in_threads(3, lambda group: measure_decoders(brightness_tokenizer(), None, split, group=group))
    assert len(blocks) == len(set(blocks)) == 5


def test_a_baseline_has_no_codes_in_any_process() -> None:
    split = noise(2 * BLOCK)
    alone = measure_reconstruction(brightness_baseline("ae"), split)
    assert alone[1] is None
    assert run_in_threads(2, lambda g: measure_reconstruction(brightness_baseline("ae"), split, group=g)) == [alone] * 2


# A prior


@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("sizes", [[4], [4, 4, 4, 3], [1, 2, 3, 4, 5, 6, 7]])
def test_the_bits_of_a_prior_are_those_of_one_process(
    sizes: list[int], num_classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, of batches that are run over in parts; each of them once."""
    monkeypatch.setattr(likelihood, "pairs_at_once", lambda prior, positions: 4)
    torch.manual_seed(0)
    batches = [(torch.randint(LEVELS, (size, *GRID)), torch.arange(size) % 3) for size in sizes]
    prior, seen = tiny_prior(num_classes=num_classes), list[bytes]()

    def work(group: ProcessGroup) -> float:
        model = copy.deepcopy(prior)
        model.register_forward_hook(lambda module, given, logits: seen.append(given[0].numpy().tobytes()))
        return measure_prior(model, iter(batches), group=group)

    alone = work(ProcessGroup())
    once = sorted(seen)
    assert len(once) == len(set(once)) == sum(-(-size // 4) for size in sizes)
    for count in (2, 3, 4):
        seen.clear()
        assert run_in_threads(count, work) == [alone] * count
        assert sorted(seen) == once


# A decoder in training


@pytest.fixture
def distant() -> VQVAE:
    torch.manual_seed(0)
    model = VQVAE(brightness_tokenizer().config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.mark.parametrize("n", [2, 2 * BLOCK + 30])
def test_the_distance_of_a_decoder_is_that_of_one_process(distant: VQVAE, n: int) -> None:
    split = noise(n)

    def work(group: ProcessGroup) -> DecoderNumbers:
        distance = DecoderDistance(copy.deepcopy(distant), split, np.arange(n), group=group)
        with torch.no_grad():
            return distance.measure(copy.deepcopy(distant.decoder))

    alone = work(ProcessGroup())
    assert alone.distance > 0
    for count in (2, 3):
        assert run_in_threads(count, work) == [alone] * count


def test_the_distance_is_computed_in_one_process_for_all(distant: VQVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that all keep the same decoder, though the last bits may depend on the machine."""
    distances = iter([3.0, 4.0, 5.0])
    monkeypatch.setattr("pipeline.evaluation.decoder_distance.frechet_distance", lambda a, b: next(distances))

    def work(group: ProcessGroup) -> float:
        with torch.no_grad():
            return DecoderDistance(distant, noise(5), np.arange(5), group=group).measure(distant.decoder).distance

    assert run_in_threads(3, work) == [3.0] * 3


def test_pixels_that_are_nan_in_one_process_are_noticed_by_all(distant: VQVAE) -> None:
    """So that all of them go back in the training."""
    split = noise(BLOCK + 3)

    class Broken(nn.Module):
        def forward(self, vectors: Tensor) -> Tensor:
            return distant.decoder(vectors) * math.nan

    def work(group: ProcessGroup) -> None:
        distance = DecoderDistance(distant, split, np.arange(len(split)), group=group)
        with torch.no_grad():
            distance.measure(distant.decoder if group.is_main else Broken())

    outcomes = run_in_threads(2, work)
    assert [type(outcome) for outcome in outcomes] == [FloatingPointError] * 2


# Features


def test_inception_features_are_those_of_one_process() -> None:
    """In batches of BATCH, on which their rounding may depend."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2 * BATCH + 5, 3, 2, 2), dtype=np.uint8))

    class Network(nn.Linear):
        def forward(self, batch: Tensor) -> tuple[Tensor, ...]:
            return (batch.float().sum(dim=(1, 2, 3))[:, None] * torch.ones(FEATURES) + len(batch),)

    def load(start: int, stop: int) -> Tensor:
        loaded.append((start, stop))
        return images[start:stop]

    def work(group: ProcessGroup) -> np.ndarray:
        return inception_features(Network(1, 1), load, len(images), group=group)

    loaded = list[tuple[int, int]]()
    alone, once = work(ProcessGroup()), list(loaded)
    expected = (
        images.float().sum(dim=(1, 2, 3)).numpy()[:, None] + np.repeat([BATCH, BATCH, 5], [BATCH, BATCH, 5])[:, None]
    )
    assert np.array_equal(alone, np.broadcast_to(expected, alone.shape))
    for count in (2, 4):
        loaded.clear()
        for found in run_in_threads(count, work):
            assert np.array_equal(found, alone)
        assert sorted(loaded) == once


def test_a_judge_is_shown_each_image_by_one_process() -> None:
    images = noise(2 * BLOCK + 5).images
    torch.manual_seed(0)
    network, shown = Judge(JudgeConfig(channels=1, height=HEIGHT, width=WIDTH, num_classes=3)).eval(), list[bytes]()
    network.register_forward_hook(lambda module, given, features: shown.append(given[0].numpy().tobytes()))
    judge = TrainedJudge(network=network, class_names=CLASSES, accuracy=1.0, tested_on=1)
    alone, once = judge.look(images), sorted(shown)
    assert len(set(once)) == 3
    for count in (2, 4):
        shown.clear()
        for seen in run_in_threads(count, lambda group: judge.look(images, group=group)):
            assert np.array_equal(seen.features, alone.features)
            assert np.array_equal(seen.predicted, alone.predicted)
        assert sorted(shown) == once


# The command


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Folders of images and of a pair of models, and judges that are quickly trained."""
    folder = tmp_path_factory.mktemp("judged")
    images = folder_of(figures(150, 72), folder / "images")
    size = (FIGURE_HEIGHT, FIGURE_WIDTH)
    info = save_tokenizer(folder / "tokenizer", brightness_tokenizer(), images, CLASSES, size=size)
    save_prior(folder / "prior", tiny_prior(num_classes=len(CLASSES)), info.fingerprint, CLASSES)
    with quick_judges(300):
        yield {"tokenizer_folder": folder / "tokenizer", "prior_folder": folder / "prior", "device": "cpu"}


@pytest.fixture
def lock_of_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads must not seed torch at once; two processes may."""
    lock, new = threading.Lock(), judge_training._new_judge

    def one_at_a_time(*arguments: Any) -> Any:
        with lock:
            return new(*arguments)

    monkeypatch.setattr(judge_training, "_new_judge", one_at_a_time)


@pytest.mark.usefixtures("lock_of_seeds")
@pytest.mark.parametrize("count", [2, 3])
def test_an_evaluation_is_that_of_one_process(
    judged: dict[str, Any], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All numbers, of all processes; the main one alone opens the judge, counts codes, and has the pictures."""
    monkeypatch.setitem(sample_folder.AT_ONCE, "cpu", 5)
    options = {"quality": QualityOptions(samples=24, seed=5, cas=True, nearest=True), "with_picture": True}
    alone = evaluation.evaluate(**judged, **options)
    opened, counted, taught, own = list[int](), list[int](), list[tuple[str, int]](), threading.local()
    open_judge, train, fit = sample_quality.open_judge, classification_score.train_judge, SimplePredictors.fit

    def opens(*arguments: Any) -> Any:
        opened.append(own.rank)
        return open_judge(*arguments)

    def fits(*arguments: Any) -> SimplePredictors:
        counted.append(own.rank)
        return fit(*arguments)

    def trains(*arguments: Any, description: str, **options: Any) -> Any:
        taught.append((description, own.rank))
        return train(*arguments, description=description, **options)

    monkeypatch.setattr(sample_quality, "open_judge", opens)
    monkeypatch.setattr(classification_score, "train_judge", trains)
    monkeypatch.setattr(SimplePredictors, "fit", fits)

    def work(group: ProcessGroup) -> evaluation.Evaluation:
        own.rank = group.rank
        return evaluation.evaluate(**judged, **options, group=group)

    main, *others = run_in_threads(count, work)
    assert main == alone
    assert (main.to_json(), main.lines()) == (alone.to_json(), alone.lines())
    assert opened == counted == [0]
    assert sorted(taught) == [("training on as many real images", 1), ("training on samples", 0)]
    for name, picture in alone.pictures.items():
        assert np.array_equal(np.asarray(main.pictures[name]), np.asarray(picture))
        assert [other.pictures[name] for other in others] == [None] * (count - 1)
    assert [other.to_json() for other in others] == [alone.to_json()] * (count - 1)


def one_line(outcomes: list[Any]) -> str:
    """Assert that the main process alone says what is wrong; return it."""
    assert [type(outcome) for outcome in outcomes] == [InputError] + [OtherProcessError] * (len(outcomes) - 1)
    return str(outcomes[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer_folder": Path("nosuch")}, "nosuch"),
        ({"data": "nosuch"}, "nosuch"),
        ({"decoder": "sharp"}, "sharp"),
        ({"quality": QualityOptions(samples=5)}, "expected --samples 6 or more"),
        ({"quality": QualityOptions(samples=24, labels=("star",))}, "star"),
        ({"quality": QualityOptions(samples=24), "split": "train"}, "the train split"),
    ],
)
def test_what_is_refused_is_said_once(judged: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    assert said in one_line(run_in_threads(3, lambda group: evaluation.evaluate(**{**judged, **changes}, group=group)))


def test_numbers_that_are_none_are_said_once(judged: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "measure_likelihood", _infinite)
    line = one_line(run_in_threads(2, lambda group: evaluation.evaluate(**judged, group=group)))
    assert "finite numbers" in line


def _infinite(*arguments: Any, **options: Any) -> Any:
    class Found:
        def to_json(self) -> dict[str, float]:
            return {"bits_per_code": math.inf}

    return Found()


def test_each_process_computes_on_a_device_of_its_own(judged: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked, load = list[str](), evaluation.load_pair

    def spy(tokenizer: Path, prior: Path, device: str, **options: Any) -> Any:
        asked.append(device)
        return load(tokenizer, prior, "cpu", **options)

    monkeypatch.setattr(evaluation, "load_pair", spy)
    monkeypatch.setattr(ProcessGroup, "device", lambda group, name: f"{name}:{group.rank}")
    run_in_threads(2, lambda group: evaluation.evaluate(**{**judged, "device": "cuda"}, group=group))
    assert sorted(asked) == ["cuda:0", "cuda:1"]


def test_torchrun_writes_and_prints_what_one_process_does(tmp_path: Path, trained: Trained) -> None:
    command = ["evaluate", "--tokenizer", trained.tokenizer, "--prior", trained.prior, "--device", "cpu", "--json"]
    alone = as_a_program(*command, tmp_path / "alone.json", cwd=ROOT)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--", "cli.py"]
    several = [str(word) for word in (*start, *command, tmp_path / "two.json")]
    done = subprocess.run(several, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, alone.out), done.stderr
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "alone.json").read_bytes()
