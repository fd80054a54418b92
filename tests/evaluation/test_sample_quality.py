"""`evaluate --samples`: the three columns against what they are made of, and what is refused at once."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import InputError
from pipeline.evaluation import classification_score, sample_quality
from pipeline.evaluation.comparison import Comparison, judge_classes
from pipeline.evaluation.distances import frechet_distance, kernel_distance, monge_distance
from pipeline.evaluation.judge import look_at
from pipeline.evaluation.judge_cache import open_judge
from pipeline.evaluation.judge_network import Judge
from pipeline.evaluation.nearest_picture import NearestTraining, nearest_picture
from pipeline.evaluation.picture_metrics import PictureMetrics
from pipeline.evaluation.quality_table import quality_table
from pipeline.evaluation.sample_quality import QualityOptions, SampleQuality
from pipeline.generation.guidance import DEFAULT_GUIDANCE
from pipeline.generation.image_pipeline import ImagePipeline
from pipeline.images.image_set import ImageSet, ImageSplit, open_images
from prior import SamplingParameters

from ..conftest import Codegrid
from ..support import brightness_tokenizer, save_prior, save_tokenizer, tiny_prior
from .judged_sets import CLASSES, HEIGHT, WIDTH, figures, folder_of, quick_judges

N = 24


@dataclass(frozen=True)
class Run:
    """Folders of images and of a pair of models."""

    images: Path
    tokenizer: Path
    prior: Path

    def open(self) -> ImageSet:
        return open_images(str(self.images))

    def pipeline(self) -> ImagePipeline:
        return ImagePipeline.from_pretrained(self.tokenizer, self.prior, "cpu")

    def arguments(self, *more: object) -> list[object]:
        return ["evaluate", "--tokenizer", self.tokenizer, "--prior", self.prior, "--device", "cpu", *more]


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with quick_judges(600):
        yield


def made(
    folder: Path,
    *,
    class_names: tuple[str, ...] = CLASSES,
    prior_classes: tuple[str, ...] = CLASSES,
    label_dropout: float = 0.0,
) -> Run:
    """Save images, a tokenizer that rounds cells of 2x2 to 16 levels, and a prior with random weights."""
    run = Run(folder_of(figures(60, 36, class_names), folder / "images"), folder / "tokenizer", folder / "prior")
    info = save_tokenizer(run.tokenizer, brightness_tokenizer(), run.images, class_names, size=(HEIGHT, WIDTH))
    prior = tiny_prior(num_classes=len(prior_classes), label_dropout=label_dropout)
    save_prior(run.prior, prior, info.fingerprint, prior_classes)
    return run


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return made(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return made(tmp_path_factory.mktemp("guided"), label_dropout=0.1)


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return made(tmp_path_factory.mktemp("unlabelled"), class_names=(), prior_classes=())


def measured(run: Run, **options: Any) -> PictureMetrics:
    chosen = QualityOptions(samples=N, **options)
    return SampleQuality(run.pipeline(), run.open(), chosen, "cpu").measure()


def test_every_column_is_what_the_functions_say_about_its_pictures(labelled: Run) -> None:
    """The rows, the reconstructions and the samples are made here once more, by hand."""
    metrics, images, pipeline = measured(labelled, seed=5), labelled.open(), labelled.pipeline()
    judge = open_judge(images, CLASSES, "cpu")
    comparison = Comparison.of(images, N, seed=5)
    test = torch.from_numpy(np.array(images.test.images[comparison.test_rows]))
    labels = images.test.labels[comparison.test_rows]
    samples = pipeline.sample(N, labels=[CLASSES[label] for label in labels], seed=5).images
    reference = judge.look(images.train.images[comparison.train_rows])
    columns = {"test": test, "reconstructions": pipeline.reconstruct(test), "samples": samples}
    for name, pictures in columns.items():
        seen, numbers = judge.look(pictures), getattr(metrics, name)
        assert numbers.own.fd == frechet_distance(reference.features, seen.features)
        assert numbers.own.kid == kernel_distance(reference.features, seen.features)
        assert numbers.own.mind == monge_distance(reference.features, seen.features)
        assert seen.predicted is not None
        assert numbers.class_accuracy == np.mean(seen.predicted == labels)
    assert (metrics.n, metrics.seed, metrics.judge_accuracy) == (N, 5, judge.accuracy)


def test_which_images_are_compared_depends_on_the_seed_and_none_comes_twice(labelled: Run) -> None:
    images = labelled.open()
    one, again, other = (Comparison.of(images, N, seed) for seed in (0, 0, 1))
    assert np.array_equal(one.test_rows, again.test_rows)
    assert np.array_equal(one.train_rows, again.train_rows)
    assert not np.array_equal(one.test_rows, other.test_rows)
    assert len(set(one.train_rows)) == len(set(one.test_rows)) == N
    everything = Comparison.of(images, 36, 0)
    assert everything.test_rows.tolist() == list(range(36))


def test_labels_that_are_named_are_sampled_in_turn_and_are_what_should_be_recognised(labelled: Run) -> None:
    quality = SampleQuality(
        labelled.pipeline(), labelled.open(), QualityOptions(samples=N, labels=("ring", "0")), "cpu"
    )
    assert quality.intended is not None
    assert quality.intended.tolist() == [2, 0] * (N // 2)


def test_classes_are_matched_by_name_between_prior_and_images(tmp_path: Path) -> None:
    run = made(tmp_path, prior_classes=("ring", "star", "bar", "cross"))
    quality = SampleQuality(run.pipeline(), run.open(), QualityOptions(samples=N), "cpu")
    labels = run.open().test.labels[quality.comparison.test_rows]
    assert quality.intended is not None
    assert quality.labels is not None
    assert quality.intended.tolist() == labels.tolist()
    assert [run.pipeline().class_names[i] for i in quality.labels.tolist()] == [CLASSES[label] for label in labels]
    with pytest.raises(InputError, match="got --label star"):
        SampleQuality(run.pipeline(), run.open(), QualityOptions(samples=N, labels=("star",)), "cpu")


def test_sampling_parameters_and_seed_change_the_samples_alone(labelled: Run) -> None:
    plain, greedy = measured(labelled), measured(labelled, parameters=SamplingParameters(temperature=0))
    assert plain == measured(labelled)
    assert (plain.test, plain.reconstructions) == (greedy.test, greedy.reconstructions)
    assert plain.samples != greedy.samples
    assert greedy.samples.own.recall <= plain.samples.own.recall


def sampled(run: Run, options: QualityOptions) -> torch.Tensor:
    return SampleQuality(run.pipeline(), run.open(), options, "cpu").samples().images


@pytest.mark.parametrize(("named", "used"), [(None, DEFAULT_GUIDANCE), (1.0, 1.0), (3.0, 3.0)])
def test_samples_are_drawn_as_the_command_draws_them(guided: Run, named: float | None, used: float) -> None:
    """With its default guidance, and the share that is kept; of the classes of the test images."""
    options = QualityOptions.of(
        N, temperature=0.8, top_k=9, top_p=None, guidance=named, keep_best=0.5, labels=(), seed=5, judge="auto"
    )
    images = guided.open()
    labels = images.test.labels[Comparison.of(images, N, seed=5).test_rows]
    expected = guided.pipeline().sample(
        N, labels=labels.tolist(), seed=5, temperature=0.8, top_k=9, guidance=used, keep_best=0.5
    )
    assert torch.equal(sampled(guided, options), expected.images)
    metrics = SampleQuality(guided.pipeline(), images, options, "cpu").measure()
    assert (metrics.guidance, metrics.keep_best) == (used, 0.5)


def test_a_prior_without_label_dropout_is_sampled_with_guidance_1(labelled: Run, codegrid: Codegrid) -> None:
    outcome = codegrid(*labelled.arguments("--samples", N))
    assert outcome.status == 0, outcome.err
    assert "\nthe samples were drawn with guidance 1, the plain prior\n" in outcome.out
    options = QualityOptions(samples=N, default_guidance=True)
    assert torch.equal(sampled(labelled, options), sampled(labelled, QualityOptions(samples=N)))


def test_samples_without_labels_are_measured_but_for_what_they_should_show(
    guided: Run, codegrid: Codegrid, tmp_path: Path
) -> None:
    outcome = codegrid(*guided.arguments("--samples", N, "--guidance", 0, "--json", tmp_path / "e.json"))
    assert outcome.status == 0, outcome.err
    metrics = json.loads((tmp_path / "e.json").read_text())["picture_metrics"]
    assert (metrics["guidance"], metrics["keep_best"]) == (0, 1)
    assert ["class_accuracy" in metrics[name] for name in ("test", "reconstructions", "samples")] == [True, True, False]
    assert "guidance 0, without labels" in outcome.out
    options = QualityOptions(samples=N, parameters=SamplingParameters(guidance=0))
    assert torch.equal(sampled(guided, options), guided.pipeline().sample(N, seed=0, guidance=0).images)


def test_without_classes_an_autoencoder_judges(unlabelled: Run, codegrid: Codegrid, tmp_path: Path) -> None:
    assert codegrid(*unlabelled.arguments("--samples", N, "--json", tmp_path / "e.json")).status == 0
    metrics = json.loads((tmp_path / "e.json").read_text())["picture_metrics"]
    assert "autoencoder" in metrics["judge"]
    assert "judge_accuracy" not in metrics
    assert all("class_accuracy" not in metrics[name] for name in ("test", "reconstructions", "samples"))


def test_a_prior_without_classes_is_measured_but_for_what_its_samples_should_show(tmp_path: Path) -> None:
    run = made(tmp_path, prior_classes=())
    metrics = measured(run)
    assert metrics.test.class_accuracy is not None
    assert metrics.reconstructions.class_accuracy is not None
    assert metrics.samples.class_accuracy is None
    assert any("recognised" in line for line in quality_table(metrics))
    with pytest.raises(InputError, match="--cas"):
        SampleQuality(run.pipeline(), run.open(), QualityOptions(samples=N, cas=True), "cpu")


def test_the_command_prints_a_table_and_writes_what_the_contract_names(
    labelled: Run, codegrid: Codegrid, tmp_path: Path
) -> None:
    nearest = tmp_path / "nearest.png"
    arguments = labelled.arguments(
        *("--samples", N, "--cas", "--nearest", nearest, "--json", tmp_path / "e.json", "--label", "bar", "--label", 1)
    )
    outcome = codegrid(*arguments)
    assert outcome.status == 0, outcome.err
    numbers = json.loads((tmp_path / "e.json").read_text())
    metrics = numbers["picture_metrics"]
    assert {"n": N, "seed": 0}.items() <= metrics.items()
    each = {"fd_own", "kid_own", "mind_own", "precision", "recall", "density", "coverage", "class_accuracy"}
    for name in ("test", "reconstructions", "samples"):
        error = {"nmse", "psnr"} if name == "reconstructions" else set()
        assert metrics[name].keys() == each | {"nearest_train"} | error
        assert all(isinstance(value, float) for value in metrics[name].values())
    for share in (metrics["cas"], metrics["cas_real"], metrics["judge_accuracy"]):
        assert 0 <= share <= 1
    assert numbers.keys() >= {"mse", "psnr", "nmse", "codes_used", "perplexity", "bits_per_code", "bits_per_dim"}
    for words in ("test images", "reconstructions", "samples", "fd_own", f"{metrics['judge_accuracy']:.1%} of 36 real"):
        assert words in outcome.out
    with Image.open(nearest) as picture:
        assert picture.mode == "RGB"
    again = codegrid(*arguments)
    assert (again.status, again.out) == (1, "")
    assert "--force" in again.err


def test_the_classification_score_trains_on_samples_and_on_as_many_real_images(
    labelled: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_on, judges = list[tuple[np.ndarray, np.ndarray]](), list[Judge]()
    train_judge = classification_score.train_judge

    def recorded(data: Any, **options: Any) -> Any:
        trained_on.append((data.images, data.labels))
        judges.append(train_judge(data, **options))
        return judges[-1]

    monkeypatch.setattr(classification_score, "train_judge", recorded)
    metrics, images = measured(labelled, cas=True), labelled.open()
    comparison = Comparison.of(images, N, seed=0)
    (samples, sampled_labels), (real, real_labels) = trained_on
    labels = images.test.labels[comparison.test_rows]
    assert np.array_equal(sampled_labels, labels)
    assert np.array_equal(samples, labelled.pipeline().sample(N, labels=labels.tolist(), seed=0).images.numpy())
    assert np.array_equal(real, images.train.images[comparison.train_rows])
    assert np.array_equal(real_labels, images.train.labels[comparison.train_rows])
    recognised = [look_at(judge, images.test.images, "").predicted == images.test.labels for judge in judges]
    assert (metrics.cas, metrics.cas_real) == tuple(float(np.mean(each)) for each in recognised)
    assert metrics.cas != metrics.cas_real


def test_the_nearest_training_images_are_those_of_each_column(labelled: Run) -> None:
    metrics, images, pipeline = measured(labelled, nearest=True), labelled.open(), labelled.pipeline()
    judge, comparison = open_judge(images, CLASSES, "cpu"), Comparison.of(images, N, seed=0)
    training = judge.look(images.train.images).directions
    test = comparison.test_images().images
    samples = pipeline.sample(N, labels=images.test.labels[comparison.test_rows].tolist(), seed=0).images
    columns = {"test": test, "reconstructions": pipeline.reconstruct(test), "samples": samples}
    found = {name: NearestTraining.of(each, judge.look(each).directions, training) for name, each in columns.items()}
    medians = {name: getattr(metrics, name).nearest_train for name in columns}
    assert medians == {name: each.median for name, each in found.items()}
    assert len(set(medians.values())) == 3
    expected = nearest_picture(found["samples"], found["test"], images.train)
    assert metrics.nearest is not None
    assert np.array_equal(np.asarray(metrics.nearest), np.asarray(expected))
    assert measured(labelled).nearest is None


# What is refused, before a judge is trained


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever trains a judge, samples or measures fails the test."""

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("this should have been refused before")

    for name in ("open_judge", "sample_in_batches", "load_inception"):
        monkeypatch.setattr(sample_quality, name, never)
    monkeypatch.setattr("pipeline.evaluation.evaluate.measure_decoders", never)


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--samples", 5], "expected --samples 6 or more, so that each has 5 neighbours, got 5"),
        (["--samples", 37], "as many samples as there are test images"),
        (["--samples", N, "--split", "train"], "got the train split; omit --split"),
        (["--samples", N, "--label", "star"], "got the label star"),
        (["--samples", N, "--cas", "--label", "bar"], "got samples of one class"),
        (["--samples", N, "--cas", "--judge", "autoencoder"], "without classes; omit --cas"),
        (["--samples", N, "--guidance", 2], "omit --guidance, or train one with train-prior --label-dropout"),
        (["--samples", N, "--nearest", "near.jpg"], ".png"),
        (["--samples", N, "--picture", "pic"], ".png"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    labelled: Run, codegrid: Codegrid, more: list[object], said: str
) -> None:
    outcome = codegrid(*labelled.arguments(*more))
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err.startswith("Error: ")
    assert outcome.err.count("\n") == 1
    assert said in outcome.err


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--guidance", 0, "--label", "bar"], "expected no label with guidance 0, which samples without, got one"),
        (["--guidance", 0, "--keep-best", 0.5], "got samples without them; omit --keep-best"),
        (["--guidance", 0, "--cas"], "without classes; omit --cas"),
    ],
)
def test_samples_without_labels_are_not_asked_for_labels(
    guided: Run, codegrid: Codegrid, more: list[object], said: str
) -> None:
    outcome = codegrid(*guided.arguments("--samples", N, *more))
    assert (outcome.status, outcome.out) == (1, "")
    (line,) = outcome.error_lines
    assert said in line


@pytest.mark.parametrize(
    "option",
    [
        *(["--cas"], ["--seed", 0], ["--temperature", 1], ["--label", "bar"], ["--judge", "auto"], ["--top-k", 2]),
        *(["--guidance", 1], ["--keep-best", 1]),
    ],
)
def test_an_option_that_would_do_nothing_is_a_wrong_command_line(
    labelled: Run, codegrid: Codegrid, option: list[object]
) -> None:
    outcome = codegrid(*labelled.arguments(*option))
    assert outcome.status == 2
    assert f"expected --samples N with {option[0]}, got none" in outcome.err


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("other", ["one.png", "./one.png", "link/one.png"])
def test_two_pictures_in_one_file_are_a_wrong_command_line(
    labelled: Run, codegrid: Codegrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to(".")
    outcome = codegrid(*labelled.arguments("--samples", N, "--picture", "one.png", "--nearest", other))
    assert (outcome.status, outcome.out) == (2, "")
    assert "expected two files as --picture and --nearest, got one.png as both" in outcome.err
    assert not Path("one.png").exists()


def test_samples_without_a_prior_are_a_wrong_command_line(labelled: Run, codegrid: Codegrid) -> None:
    outcome = codegrid("evaluate", "--tokenizer", labelled.tokenizer, "--samples", N)
    assert outcome.status == 2
    assert "expected --prior DIR with --samples" in outcome.err


def few(split: ImageSplit, rows: np.ndarray) -> ImageSplit:
    return ImageSplit(split.images[rows], split.labels[rows], tuple(split.names[row] for row in rows))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda images: replace(images, train=few(images.train, np.arange(N - 1))), "training images"),
        (lambda images: replace(images, class_names=(*CLASSES, "star")), "got none of star"),
        (
            lambda images: replace(images, train=few(images.train, np.flatnonzero(images.train.labels != 1))),
            "got none of cross",
        ),
        (lambda images: one_class(images), "got one, bar"),
    ],
)
def test_images_that_do_not_suffice_are_refused(change: Callable[[ImageSet], ImageSet], said: str) -> None:
    with pytest.raises(InputError) as caught:
        Comparison.of(change(figures(60, 36)), N, seed=0)
    assert said in str(caught.value)


def one_class(images: ImageSet) -> ImageSet:
    train, test = (replace(split, labels=np.zeros_like(split.labels)) for split in (images.train, images.test))
    return replace(images, class_names=("bar",), train=train, test=test)


def test_an_autoencoder_judges_any_classes_on_request_and_a_classifier_needs_some() -> None:
    images = figures(60, 36)
    assert judge_classes(images, "auto") == judge_classes(images, "classifier") == CLASSES
    assert judge_classes(one_class(images), "autoencoder") == judge_classes(images, "autoencoder") == ()
    partly = replace(images, test=replace(images.test, labels=np.where(np.arange(36) == 7, -1, images.test.labels)))
    assert judge_classes(partly, "auto") == ()
    with pytest.raises(InputError, match="got images without classes"):
        judge_classes(partly, "classifier")
