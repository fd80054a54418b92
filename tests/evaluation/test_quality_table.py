"""The three columns in lines of text, and which stage they blame."""

from dataclasses import replace

import pytest

from pipeline.evaluation.picture_metrics import WORDS, PictureMetrics
from pipeline.evaluation.picture_numbers import Distances, PictureNumbers
from pipeline.evaluation.quality_table import blame, how_sampled, quality_table


def numbers(fd: float, class_accuracy: float | None = None) -> PictureNumbers:
    own = Distances(fd=fd, kid=fd / 100, mind=fd * 3, precision=0.75, recall=0.5, density=0.875, coverage=0.625)
    return PictureNumbers(own=own, class_accuracy=class_accuracy)


def metrics(floor: float, reconstructed: float, sampled: float) -> PictureMetrics:
    return PictureMetrics(
        n=2000,
        seed=3,
        judge="a classifier",
        judge_accuracy=0.9,
        test=numbers(floor, 0.9),
        reconstructions=numbers(reconstructed, 0.8),
        samples=numbers(sampled),
    )


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ((1.0, 3.0, 10.0), "distance of 10 the floor is 1, the tokenizer adds 2 and the prior 7: the prior costs more"),
        ((1.0, 8.0, 10.0), "distance of 10 the floor is 1, the tokenizer adds 7 and the prior 2: the tokenizer costs"),
        ((1.0, 0.5, 2.0), "distance of 2 the floor is 1, the tokenizer adds -0.5 and the prior 1.5: the prior costs"),
        ((1.0, 3.0, 2.0), "the tokenizer adds 2 and the prior takes 1 of that away: the tokenizer costs more"),
        ((1.0, 3.0, 0.5), "nearer to the training images than real test images are; --nearest shows copies"),
    ],
)
def test_the_stage_that_adds_more_is_to_blame(columns: tuple[float, float, float], said: str) -> None:
    assert said in blame(metrics(*columns))


@pytest.mark.parametrize(
    ("guidance", "keep_best", "said"),
    [
        (1.0, 1.0, "the samples were drawn with guidance 1, the plain prior"),
        (0.0, 1.0, "the samples were drawn with guidance 0, without labels"),
        (2.5, 1.0, "the samples were drawn with guidance 2.5"),
        (
            2.5,
            0.3,
            "the samples were drawn with guidance 2.5; of the candidates 0.3 were kept, those most surely of their "
            "class to the prior itself: the judge chose none",
        ),
    ],
)
def test_a_line_says_how_samples_were_drawn_and_who_chose_them(guidance: float, keep_best: float, said: str) -> None:
    measured = replace(metrics(1, 2, 3), guidance=guidance, keep_best=keep_best)
    assert how_sampled(measured) == said
    assert quality_table(measured).count(said) == 1
    assert {"guidance": guidance, "keep_best": keep_best}.items() <= measured.to_json().items()


def test_every_number_is_in_its_column_with_what_it_means() -> None:
    measured = metrics(1.5, 3.25, 10.125)
    with_inception = replace(measured.samples, inception=replace(measured.samples.own, fd=77.0), nearest_train=2.25)
    first, heads, *rows = quality_table(replace(measured, samples=with_inception))
    assert first == "2,000 of each against 2,000 training images, seed 3; features of a classifier"
    assert " ".join(heads.split()) == " ".join(WORDS.values())
    cells = {row.split()[0]: row.split()[1:] for row in rows}
    assert cells["fd_own"] == ["1.5", "3.25", "10.12", "Frechet", "distance"]
    assert cells["kid_own"][:3] == ["0.015", "0.0325", "0.1013"]
    assert cells["class_accuracy"] == ["0.9", "0.8", "recognised", "as", "its", "class"]
    assert cells["nearest_train"][:1] == ["2.25"]
    assert cells["fd_inception"] == ["77", "Frechet", "distance", "(Inception-v3)"]
    ends = {row.rindex(value) + len(value) for row, value in zip(rows, ("10.12", "0.1013", "30.38"), strict=False)}
    assert ends == {heads.index("samples") + len("samples")}
    assert [row for row in rows if row.startswith("classification")] == []


def test_the_classification_score_is_beside_that_of_real_images() -> None:
    *_, last = quality_table(replace(metrics(1, 2, 3), cas=0.25, cas_real=0.75))
    assert "25.0% of real test images are recognised after training on the samples, 75.0% after as many real" in last
