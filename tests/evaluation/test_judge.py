"""The judge: its network on images of any shape, its training, and its place in the cache."""

import itertools
import json
import math
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import InputError
from pipeline.evaluation import judge_cache, judge_network, judge_training
from pipeline.evaluation.judge_cache import open_judge
from pipeline.evaluation.judge_network import FEATURES, Judge, JudgeConfig
from pipeline.evaluation.judge_training import TrainingImages, learning_rate_at, steps_for, train_judge
from pipeline.images.image_set import ImageSet, open_images
from pipeline.models.checkpoint import CONFIG, MODEL, TRAINING, TrainingState
from pipeline.runtime.folder_lock import only_writer

from ..disks import failing_writes

CPU = torch.device("cpu")
STEPS = 12


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_network, "WIDTHS", (8, 8, 8))
    monkeypatch.setattr(judge_training, "BATCH", 8)
    monkeypatch.setattr(judge_training, "FEWEST_IMAGES", STEPS * 8)
    monkeypatch.setattr(judge_training, "MOST_IMAGES", STEPS * 8)


@pytest.fixture
def stripes(tmp_path: Path) -> ImageSet:
    """60 pictures, 8 high and 12 wide, of noise with a bright stripe: high up in class "a", low down in class "b"."""
    random = np.random.default_rng(0)
    for part, name, number in itertools.product(("train", "test"), "ab", range(15)):
        pixels = random.integers(0, 60, (8, 12, 3), dtype=np.uint8)
        pixels[1:3] += 150 * (name == "a")
        pixels[5:7] += 150 * (name == "b")
        path = tmp_path / "stripes" / part / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return open_images(str(tmp_path / "stripes"), image_size=(8, 12))


def data_of(images: ImageSet, num_classes: int = 2) -> TrainingImages:
    return TrainingImages(images=images.train.images, labels=images.train.labels, num_classes=num_classes)


def weights_of(network: Judge) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# The network


@pytest.mark.parametrize(
    ("channels", "height", "width"), [(1, 2, 2), (1, 8, 12), (3, 32, 32), (3, 49, 20), (3, 2, 300), (1, 130, 64)]
)
@pytest.mark.parametrize("num_classes", [0, 3])
def test_images_of_any_shape_have_features_a_loss_and_a_gradient(
    channels: int, height: int, width: int, num_classes: int
) -> None:
    network = Judge(JudgeConfig(channels=channels, height=height, width=width, num_classes=num_classes))
    images = torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(0))
    assert network(images).shape == (2, FEATURES)
    loss = network.loss(images, torch.tensor([0, 2]))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_the_cost_of_an_image_hardly_depends_on_its_size() -> None:
    def positions(side: int) -> int:
        network = Judge(JudgeConfig(channels=3, height=side, width=side, num_classes=2))
        return network.trunk[0](torch.zeros(1, 3, side, side)).shape[-1]

    assert [positions(side) for side in (32, 48, 64, 128, 512)] == [16, 24, 21, 21, 23]


def test_fine_detail_of_large_images_reaches_the_network() -> None:
    """A pattern of single pixels whose mean is grey, which an image scaled down would not show."""
    network = Judge(JudgeConfig(channels=1, height=96, width=96, num_classes=2)).eval()
    rows, columns = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")
    checkered = ((rows + columns) % 2).float()[None, None]
    grey = torch.full((1, 1, 96, 96), 0.5)
    assert (network(checkered) - network(grey)).abs().max() > 0.01


def test_the_autoencoder_reconstructs_the_image_scaled_down() -> None:
    config = JudgeConfig(channels=1, height=40, width=64, num_classes=0)
    assert config.small_size == (20, 32)
    network = Judge(config)
    images = torch.rand(2, 1, 40, 64)
    predicted = network.head(network(images)).detach()
    small = images.reshape(2, 1, 20, 2, 32, 2).mean(dim=(3, 5))
    expected = float((predicted - small).square().mean())
    assert network.loss(images, torch.zeros(2)).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("wrong", [{"num_classes": 1}, {"num_classes": -1}, {"height": 1}, {"channels": 0}])
def test_impossible_configs_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="JudgeConfig"):
        JudgeConfig(**{"channels": 1, "height": 8, "width": 12, "num_classes": 2, **wrong})


# The training


def test_steps_follow_the_number_of_images_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_training, "FEWEST_IMAGES", 100)
    monkeypatch.setattr(judge_training, "MOST_IMAGES", 1000)
    assert [steps_for(count) for count in (1, 50, 10_000)] == [13, math.ceil(50 * judge_training.EPOCHS / 8), 125]


def test_the_learning_rate_is_a_triangle_that_never_reaches_0() -> None:
    rates = [learning_rate_at(step, 99) for step in range(99)]
    assert max(rates) == rates[19] == pytest.approx(judge_training.PEAK_RATE)
    assert all(a < b for a, b in itertools.pairwise(rates[:20]))
    assert all(a > b for a, b in itertools.pairwise(rates[19:]))
    assert min(rates) > 0


def test_shifted_images_are_moved_by_at_most_an_eighth_and_mirrored_at_the_edges() -> None:
    image = np.arange(16 * 24, dtype=np.uint8).reshape(1, 1, 16, 24)
    data = TrainingImages(images=image, labels=np.array([1]), num_classes=2)
    padded = np.pad(image[0, 0], ((2, 2), (3, 3)), mode="reflect")
    allowed = {padded[y : y + 16, x : x + 24].tobytes() for y in range(5) for x in range(7)}
    moved = set()
    for step in range(40):
        images, labels = judge_training._batch(data, np.random.default_rng([0, step]))
        assert labels.tolist() == [1] * 8
        moved |= {(picture[0] * 255).round().to(torch.uint8).numpy().tobytes() for picture in images}
    assert moved == allowed


@pytest.mark.parametrize("num_classes", [0, 2])
@pytest.mark.parametrize("stop", [1, 7])
def test_a_training_that_was_stopped_ends_with_the_same_weights(
    stripes: ImageSet, num_classes: int, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of(stripes, num_classes)
    monkeypatch.setattr(judge_training, "SAVE_EVERY_SECONDS", -1.0)
    states: list[TrainingState] = []
    undisturbed = train_judge(data, seed=0, device=CPU, description="", save=lambda state: states.append(copied(state)))
    assert [state.values["step"] for state in states] == list(range(1, STEPS))
    resumed = train_judge(data, seed=0, device=CPU, description="", resume=states[stop - 1])
    assert same(weights_of(resumed), weights_of(undisturbed))


def copied(state: TrainingState) -> TrainingState:
    return replace(state, tensors={name: tensor.clone() for name, tensor in state.tensors.items()})


def test_the_seed_decides_and_torchs_own_random_numbers_stay_as_they_are(stripes: ImageSet) -> None:
    before = torch.get_rng_state()
    one, again, other = (
        weights_of(train_judge(data_of(stripes), seed=seed, device=CPU, description="")) for seed in (0, 0, 1)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert same(one, again)
    assert not same(one, other)


def test_the_seed_decides_the_batches_too(stripes: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[torch.Tensor] = []
    monkeypatch.setattr(
        judge_training, "_take_step", lambda judge, optimizers, rate, images, labels: shown.append(images)
    )
    for seed in (0, 0, 1):
        train_judge(data_of(stripes), seed=seed, device=CPU, description="")
    one, again, other = (torch.stack(shown[start : start + STEPS]) for start in (0, STEPS, 2 * STEPS))
    assert torch.equal(one, again)
    assert not any(torch.equal(first, second) for first, second in zip(one, other, strict=True))
    assert not any(torch.equal(first, second) for first, second in itertools.pairwise(one))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights/head.bias": None}, "no weights/head.bias"),
        ({"weights/head.bias": torch.zeros(3)}, "head.bias"),
        ({"weights/head.bias": torch.tensor([0, math.nan])}, "not finite"),
        ({"adam/0/exp_avg": None}, "no optimizer/adam/0/exp_avg"),
        ({"adam/0/exp_avg": torch.zeros(3, 3)}, "adam/0/exp_avg"),
        ({"muon/0": torch.zeros(3)}, "unknown optimizer/muon/0"),
        ({"step": "3"}, "without a step, but '3'"),
        ({"step": 0}, "without a step, but 0"),
        ({"step": STEPS}, f"without a step, but {STEPS}"),
    ],
)
def test_a_state_of_another_training_is_left_and_the_training_starts_anew(
    stripes: ImageSet,
    change: dict[str, Any],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(judge_training, "SAVE_EVERY_SECONDS", -1.0)
    states: list[TrainingState] = []
    expected = train_judge(
        data_of(stripes), seed=0, device=CPU, description="", save=lambda state: states.append(copied(state))
    )
    state = states[4]
    changed = {**state.tensors, **{name: value for name, value in change.items() if name != "step"}}
    tensors = {name: tensor for name, tensor in changed.items() if tensor is not None}
    damaged = TrainingState(tensors=tensors, values={"step": change.get("step", 5)})
    found = train_judge(data_of(stripes), seed=0, device=CPU, description="", resume=damaged)
    assert same(weights_of(found), weights_of(expected))
    assert said in caplog.text
    assert "starts anew" in caplog.text


def test_a_training_that_diverges_is_an_error_in_one_line(stripes: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_training, "PEAK_RATE", math.inf)
    with pytest.raises(InputError, match="expected finite weights of a judge after its training, got"):
        train_judge(data_of(stripes), seed=0, device=CPU, description="")


def test_ctrl_c_saves_and_says_where_the_training_continues(
    stripes: ImageSet, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """At the last step nothing is saved, as the state would pass for that of a judge that is finished."""
    take_step, states, taken = judge_training._take_step, list[TrainingState](), list[int]()

    def interrupted(*arguments: Any) -> None:
        take_step(*arguments)
        taken.append(1)
        if len(taken) in (5, STEPS):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(judge_training, "_take_step", interrupted)
    for resume in (None, 0):
        with pytest.raises(KeyboardInterrupt):
            train_judge(
                data_of(stripes),
                seed=0,
                device=CPU,
                description="",
                resume=None if resume is None else states[resume],
                save=lambda state: states.append(copied(state)),
            )
        assert "stopped; the same command continues at step 5\n" in capfd.readouterr().err
    assert [state.values["step"] for state in states] == [5]


# What it sees


def test_it_learns_to_tell_the_classes_apart_and_its_accuracy_is_that_on_all_test_images(
    stripes: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge_training, "FEWEST_IMAGES", 800)
    monkeypatch.setattr(judge_training, "MOST_IMAGES", 800)
    trained = open_judge(stripes, ("a", "b"), "cpu")
    seen = trained.look(np.asarray(stripes.test.images))
    assert seen.predicted is not None
    assert trained.accuracy == float((seen.predicted == stripes.test.labels).mean()) >= 0.9
    assert trained.tested_on == 30
    assert f"{trained.accuracy:.1%} of 30 real test images" in trained.name
    assert seen.features.shape == (30, FEATURES)


def test_an_image_is_seen_alike_alone_or_among_others(stripes: ImageSet) -> None:
    trained = open_judge(stripes, ("a", "b"), "cpu")
    images = torch.from_numpy(np.array(stripes.train.images))
    together = trained.look(images)
    alone = [trained.look(images[i : i + 1]) for i in range(5)]
    assert np.array_equal(np.concatenate([seen.features for seen in alone]), together.features[:5])


@pytest.mark.parametrize("class_names", [(), ("a", "b")])
def test_each_feature_has_mean_0_and_variance_1_over_the_training_images(
    stripes: ImageSet, class_names: tuple[str, ...]
) -> None:
    features = (
        open_judge(stripes, class_names, "cpu").look(np.asarray(stripes.train.images)).features.astype(np.float64)
    )
    assert abs(features.mean(axis=0)).max() < 1e-3
    variances = features.var(axis=0)
    assert 0.99 < variances.max() < 1.01
    assert (variances > 0.9).mean() > 0.9  # a feature that is nearly the same for all images stays near 0


@pytest.mark.parametrize("wrong", [np.zeros((2, 3, 12, 8), np.uint8), np.zeros((2, 3, 8, 12), np.float32)])
def test_images_of_another_size_or_type_are_refused(stripes: ImageSet, wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected images"):
        open_judge(stripes, (), "cpu").look(wrong)


# The cache


def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("CODEGRID_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "judges"


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stripes: ImageSet) -> Path:
    """The folder of the judges, empty."""
    return folders(monkeypatch, tmp_path)


def test_it_is_trained_once(cache: Path, stripes: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_judge(stripes, ("a", "b"), "cpu")
    (folder,) = cache.iterdir()
    assert {path.name for path in folder.iterdir()} == {MODEL, CONFIG}
    monkeypatch.setattr(judge_cache, "train_judge", None)
    second = open_judge(stripes, ("a", "b"), "cpu")
    assert same(weights_of(first.network), weights_of(second.network))
    assert (first.name, first.accuracy) == (second.name, second.accuracy)


def test_whatever_it_depends_on_makes_another(cache: Path, stripes: ImageSet) -> None:
    dark = replace(stripes.train, images=np.asarray(stripes.train.images) // 2)
    swapped = replace(stripes.train, labels=1 - stripes.train.labels)
    fewer_tests = replace(stripes.test, images=stripes.test.images[1:], labels=stripes.test.labels[1:])
    sets = [stripes, replace(stripes, train=dark), replace(stripes, train=swapped), replace(stripes, test=fewer_tests)]
    for number, images in enumerate(sets, 1):
        open_judge(images, ("a", "b"), "cpu")
        assert len(list(cache.iterdir())) == number
    open_judge(stripes, (), "cpu")
    open_judge(stripes, ("a", "c"), "cpu")
    assert len(list(cache.iterdir())) == len(sets) + 2
    open_judge(replace(stripes, train=swapped), (), "cpu")  # an autoencoder does not look at labels
    open_judge(replace(stripes, source="elsewhere", data_root="/"), ("a", "b"), "cpu")
    assert len(list(cache.iterdir())) == len(sets) + 2


@pytest.mark.parametrize("name", [MODEL, CONFIG])
@pytest.mark.parametrize("damage", ["cut", "flipped", "removed", "a folder"])
def test_a_damaged_one_is_trained_again(
    cache: Path, stripes: ImageSet, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = weights_of(open_judge(stripes, ("a", "b"), "cpu").network)
    (path,) = cache.glob(f"*/{name}")
    data = bytearray(path.read_bytes())
    path.unlink()
    if damage == "cut":
        path.write_bytes(data[:-9])
    elif damage == "flipped":
        data[-9] ^= 1
        path.write_bytes(data)
    elif damage == "a folder":
        path.mkdir()
    again = open_judge(stripes, ("a", "b"), "cpu")
    assert same(weights_of(again.network), before)
    warned = caplog.text.count("is damaged and is trained again")
    assert warned == (0 if (name, damage) == (CONFIG, "removed") else 1)
    caplog.clear()
    open_judge(stripes, ("a", "b"), "cpu")
    assert caplog.text == ""


def test_one_of_another_recipe_under_the_same_name_is_not_used(cache: Path, stripes: ImageSet) -> None:
    """A stranger's file with a hash that fits: other weights than the network has."""
    open_judge(stripes, ("a", "b"), "cpu")
    (path,) = cache.glob(f"*/{CONFIG}")
    content = json.loads(path.read_bytes())
    del content["checksum"]
    for change in (
        {"config": {**content["config"], "num_classes": 3}},
        {"metrics": {"accuracy": 2.0}},
        {"metrics": {}},
    ):
        path.write_text(json.dumps({**content, **change}))
        assert open_judge(stripes, ("a", "b"), "cpu").accuracy is not None
        assert asdict(JudgeConfig(**json.loads(path.read_bytes())["config"])) == content["config"]


class Killed(Exception):
    """Ends a training at once."""


def test_a_training_that_was_killed_continues_where_it_was_saved(
    cache: Path, stripes: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = weights_of(open_judge(stripes, ("a", "b"), "cpu").network)
    for path in cache.glob("*/*"):
        path.unlink()
    monkeypatch.setattr(judge_training, "SAVE_EVERY_SECONDS", -1.0)
    take_step = judge_training._take_step
    taken: list[int] = []

    def counted(*arguments: Any) -> None:
        if len(taken) == 5:
            raise Killed
        taken.append(1)
        take_step(*arguments)

    monkeypatch.setattr(judge_training, "_take_step", counted)
    with pytest.raises(Killed):
        open_judge(stripes, ("a", "b"), "cpu")
    assert len(list(cache.glob(f"*/{TRAINING}"))) == 1
    taken.append(1)  # so that no later step is the one to be killed
    again = open_judge(stripes, ("a", "b"), "cpu")
    assert len(taken) == 6 + STEPS - 5
    assert same(weights_of(again.network), expected)
    assert list(cache.glob(f"*/{TRAINING}")) == []


def test_a_second_process_that_trains_it_is_refused(cache: Path, stripes: ImageSet) -> None:
    open_judge(stripes, ("a", "b"), "cpu")
    (folder,) = cache.iterdir()
    (folder / MODEL).unlink()
    with only_writer(folder, "training of a judge"), pytest.raises(InputError, match="training of a judge alone") as e:
        open_judge(stripes, ("a", "b"), "cpu")
    assert e.value.do == "wait until it has ended, or set CODEGRID_CACHE to another folder"


def test_what_keeps_it_from_the_cache_is_refused_with_the_setting_that_helps(cache: Path, stripes: ImageSet) -> None:
    with failing_writes(0), pytest.raises(InputError, match="No space left on device") as full:
        open_judge(stripes, ("a", "b"), "cpu")
    assert full.value.do == "free space on the disk, or set CODEGRID_CACHE to another folder"
    cache.parent.mkdir(exist_ok=True)
    cache.write_bytes(b"in the way")
    with pytest.raises(InputError, match="a folder that can be written") as file:
        open_judge(stripes, ("a", "b"), "cpu")
    assert file.value.do.startswith("set CODEGRID_CACHE to another folder")


def test_what_is_trained_is_said_and_why_only_where_that_is_why(
    cache: Path, stripes: ImageSet, capsys: pytest.CaptureFixture[str]
) -> None:
    open_judge(stripes, ("a", "b"), "cpu")
    assert "the judge of these images, a classifier of 2 classes, is trained once" in capsys.readouterr().err
    open_judge(stripes, (), "cpu")  # as --judge autoencoder asks for
    assert "the judge of these images, an autoencoder, is trained once" in capsys.readouterr().err
    unlabelled = replace(stripes.train, labels=np.full(len(stripes.train), -1), images=255 - stripes.train.images)
    open_judge(replace(stripes, class_names=(), train=unlabelled), (), "cpu")
    assert "an autoencoder, as there are no classes, is trained once" in capsys.readouterr().err
