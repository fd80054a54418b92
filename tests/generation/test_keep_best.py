"""Keeping the best of several candidates: all of them drawn one by one, and the best found by exact arithmetic."""

import json
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import InputError
from pipeline.generation import image_pipeline, keep_best, sample_folder
from pipeline.generation.image_pipeline import ImagePipeline
from pipeline.generation.keep_best import Candidates, label_log_odds
from pipeline.generation.keep_mask import half_mask, known_codes
from pipeline.generation.sample_folder import SampleOptions, complete_to_folder, sample_to_folder
from pipeline.images.png import save_png
from pipeline.images.preprocessing import to_float
from prior import GatedPixelCNN, complete_codes, sample_codes

from ..support import GRID, HEIGHT, WIDTH, digest_of
from .conftest import pipeline_in

SHARES = {0.25: (4, 1), 0.3: (10, 3), 0.75: (4, 3), 0.07: (100, 7), 1: (1, 1)}  # 1 / share, as a ratio of integers
SIZE = (HEIGHT, WIDTH)


def candidates_of(image: int, share: float) -> range:
    """Return the numbers of the candidates of an image, by integers."""
    above, below = SHARES[share]
    return range(image * above // below, (image + 1) * above // below)


def posterior(pipeline: ImagePipeline, codes: Tensor, label: int) -> Decimal:
    """Return p(label | codes) of a grid [H,W], with 60 digits from the sums of one forward pass for each label."""
    likelihoods = []
    for each in range(len(pipeline.class_names)):
        logits = pipeline.prior(codes[None], torch.tensor([each]))
        nats = F.cross_entropy(logits.double(), codes[None], reduction="sum")
        likelihoods.append(Decimal(-float(nats.detach())))
    with localcontext() as context:
        context.prec = 60
        return likelihoods[label].exp() / sum((each.exp() for each in likelihoods), Decimal(0))


def best_of(pipeline: ImagePipeline, grids: list[Tensor], label: int) -> Tensor:
    """Return the grid [H,W] of highest posterior."""
    return max(grids, key=lambda codes: posterior(pipeline, codes, label))


# Which candidates an image has


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("first", [0, 5, 999])
def test_the_candidates_of_images_follow_each_other_without_gaps(share: float, first: int) -> None:
    """In floats 7 / 0.07 is below 100."""
    found = Candidates(first, 300, share)
    expected = [candidates_of(image, share) for image in range(first, first + 300)]
    assert found.counts().tolist() == [len(numbers) for numbers in expected]
    assert found.first == expected[0].start
    assert found.total == sum(map(len, expected)) == expected[-1].stop - found.first
    owners = found.spread(torch.arange(300)).tolist()
    assert owners == [image for image, numbers in enumerate(expected) for _ in numbers]


@pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan"), float("inf"), 1e-7])
def test_a_share_out_of_its_range(guided: ImagePipeline, share: float) -> None:
    for call in (lambda: guided.sample(2, keep_best=share), lambda: SampleOptions(n=2, keep_best=share)):
        with pytest.raises(ValueError, match="keep_best: expected"):
            call()


# Samples


@pytest.mark.parametrize("guidance", [1, 3])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("first", [0, 2])
def test_the_best_of_the_candidates_is_kept(guided: ImagePipeline, share: float, first: int, guidance: float) -> None:
    """Each candidate is drawn alone, by its number; what the plain prior says decides, whatever the guidance."""
    labels, n = [1, 2, 0], 3
    found = guided.sample(n, labels=labels, seed=4, first=first, guidance=guidance, keep_best=share)
    for i in range(n):
        grids = [
            guided.sample(1, labels=labels[i], seed=4, first=number, guidance=guidance).codes[0]
            for number in candidates_of(first + i, share)
        ]
        assert torch.equal(found.codes[i], best_of(guided, grids, labels[i]))
    assert torch.equal(found.images, guided.decode(found.codes))


def test_an_image_does_not_depend_on_how_many_are_sampled_with_it(guided: ImagePipeline) -> None:
    most = guided.sample(12, labels="ring", seed=3, keep_best=0.3).codes
    assert torch.equal(guided.sample(8, labels="ring", seed=3, keep_best=0.3).codes, most[:8])
    assert torch.equal(guided.sample(4, labels="ring", seed=3, keep_best=0.3, first=8).codes, most[8:])
    assert len(most.flatten(1).unique(dim=0)) == 12


def test_the_whole_share_is_the_plain_sample_at_its_cost(labelled: ImagePipeline, monkeypatch: Any) -> None:
    def never(*arguments: Any) -> None:
        raise AssertionError("nothing is to be compared")

    monkeypatch.setattr(keep_best, "label_log_likelihoods", never)
    generator, labels = torch.Generator().manual_seed(6), labelled.labels_for(5, None)
    expected = sample_codes(labelled.prior, 5, GRID, labels=labels, generator=generator)
    assert torch.equal(labelled.sample(5, seed=6, keep_best=1).codes, expected)


def test_the_prior_is_surer_of_what_is_kept(labelled: ImagePipeline) -> None:
    means = []
    for share in (1, 0.5, 0.1):
        codes = labelled.sample(24, seed=1, keep_best=share).codes
        means.append(float(sum(posterior(labelled, grid, i % 3) for i, grid in enumerate(codes)) / 24))
    assert means == sorted(means)
    assert means[0] < means[2] - 0.01


def test_only_images_with_several_candidates_are_compared(labelled: ImagePipeline, monkeypatch: Any) -> None:
    compare, compared = keep_best.label_log_likelihoods, []
    monkeypatch.setattr(
        keep_best, "label_log_likelihoods", lambda prior, codes: compared.append(len(codes)) or compare(prior, codes)
    )
    labelled.sample(6, seed=0, keep_best=0.75)  # 1 + 1 + 2 candidates, twice
    assert compared == [4]


def test_of_equally_good_candidates_the_first_is_kept(labelled: ImagePipeline, monkeypatch: Any) -> None:
    monkeypatch.setattr(keep_best, "label_log_likelihoods", lambda prior, codes: torch.zeros(len(codes), 3).double())
    drawn = labelled.sample(6, labels=0, seed=2).codes
    assert torch.equal(labelled.sample(3, labels=0, seed=2, keep_best=0.5).codes, drawn[::2])


@pytest.mark.parametrize("likelihoods", [[-3.0, -1.0, -2.5], [-700.0, -50.0, -60.0]])
def test_the_log_odds_are_those_of_the_posterior(likelihoods: list[float]) -> None:
    nats, labels = torch.tensor([likelihoods] * 3).double(), torch.arange(3)
    posterior = nats.softmax(dim=1).diagonal()
    torch.testing.assert_close(label_log_odds(nats, labels), posterior.log() - (1 - posterior).log(), atol=1e-9, rtol=0)


def test_the_log_odds_tell_apart_what_both_round_to_1() -> None:
    nats = torch.tensor([[0.0, -90.0], [0.0, -80.0]]).double()
    assert nats.softmax(dim=1)[:, 0].tolist() == [1, 1]
    assert label_log_odds(nats, torch.tensor([0, 0])).tolist() == [90, 80]
    assert label_log_odds(nats[:, :1], torch.tensor([0, 0])).tolist() == [torch.inf] * 2  # there is no other class


# Completions


@pytest.mark.parametrize("keep", ["top", "right"])
@pytest.mark.parametrize("share", [0.3, 0.75, 1])
def test_the_best_of_the_completions_of_an_image_is_kept(guided: ImagePipeline, keep: str, share: float) -> None:
    """Each is drawn alone, by its number, with random numbers of its own."""
    torch.manual_seed(0)
    images, labels = torch.randint(256, (3, 1, *SIZE), dtype=torch.uint8), [2, 0, 1]
    mask = half_mask(keep, SIZE)
    found = guided.complete(images, mask, labels=labels, candidates=3, seed=7, guidance=2, keep_best=share)
    known = known_codes(guided.tokenizer, to_float(images), mask.expand(3, *SIZE))
    for i, label in enumerate(labels):
        grids = [
            complete_codes(
                guided.prior,
                known[i : i + 1],
                candidates=3,
                labels=torch.tensor([label]),
                guidance=2,
                generator=torch.Generator().manual_seed(7),
                first=number,
            )[0]
            for number in candidates_of(i, share)
        ]
        assert torch.equal(found.codes[i], best_of(guided, grids, label))
    assert torch.equal(found.images[:, :, mask], images[:, :, mask])


# Folders


@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 64])
def test_an_image_is_the_same_in_any_batch_and_no_batch_has_more_candidates(
    tmp_path: Path, guided: ImagePipeline, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for those of one image, which stay together."""
    options = SampleOptions.of(n=7, seed=4, guidance=2.5, keep_best=0.3)
    sample_to_folder(guided, options, tmp_path / "default")
    draw, batches = image_pipeline.sample_codes, list[int]()

    def recorded(prior: GatedPixelCNN, n: int, *more: Any, **rest: Any) -> Tensor:
        batches.append(n)
        return draw(prior, n, *more, **rest)

    monkeypatch.setattr(image_pipeline, "sample_codes", recorded)
    monkeypatch.setitem(sample_folder.AT_ONCE, "cpu", at_once)
    sample_to_folder(guided, options, tmp_path / "batches")
    assert digest_of(tmp_path / "batches") == digest_of(tmp_path / "default")
    assert sum(batches) == 23  # floor(7 / 0.3)
    assert max(batches) <= max(4, at_once)
    expected = guided.sample(7, seed=4, guidance=2.5, keep_best=0.3).codes
    np.testing.assert_array_equal(np.load(tmp_path / "batches" / "codes.npy"), expected)
    record = json.loads((tmp_path / "batches" / "sample.json").read_text("utf-8"))
    assert (record["options"]["guidance"], record["options"]["keep_best"]) == (2.5, 0.3)


def test_ctrl_c_keeps_the_finished_images(
    tmp_path: Path, guided: ImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The candidates of three images fit a batch of twelve; the second batch is interrupted while they are compared."""
    monkeypatch.setitem(sample_folder.AT_ONCE, "cpu", 12)
    compare, calls = keep_best.label_log_likelihoods, []

    def interrupted(*arguments: Any) -> Tensor:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compare(*arguments)

    monkeypatch.setattr(keep_best, "label_log_likelihoods", interrupted)
    options = {"seed": 4, "keep_best": 0.25}
    with pytest.raises(KeyboardInterrupt):
        sample_to_folder(guided, SampleOptions.of(n=8, **options), tmp_path / "out")
    codes = np.load(tmp_path / "out" / "codes.npy")
    assert json.loads((tmp_path / "out" / "sample.json").read_text("utf-8"))["finished"] == len(codes) == 3
    monkeypatch.undo()
    sample_to_folder(guided, SampleOptions.of(n=3, **options), tmp_path / "fewer")
    np.testing.assert_array_equal(codes, np.load(tmp_path / "fewer" / "codes.npy"))


def test_completions_in_a_folder_are_those_of_the_pipeline(tmp_path: Path, guided: ImagePipeline) -> None:
    torch.manual_seed(0)
    image, mask = torch.randint(256, (1, 1, *SIZE), dtype=torch.uint8), half_mask("left", SIZE)
    save_png(image[0], tmp_path / "picture.png")
    options = SampleOptions.of(n=2, labels=("ring",), seed=4, guidance=2, keep_best=0.4)
    complete_to_folder(guided, tmp_path / "picture.png", "left", options, tmp_path / "out", candidates=3)
    expected = guided.complete(
        image.repeat(2, 1, 1, 1), mask, labels="ring", candidates=3, seed=4, guidance=2, keep_best=0.4
    )
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "codes.npy"), expected.codes)
    record = json.loads((tmp_path / "out" / "complete.json").read_text("utf-8"))
    assert (record["options"]["guidance"], record["options"]["keep_best"]) == (2, 0.4)


# What is refused


def test_candidates_without_labels_are_refused(tmp_path: Path, guided: ImagePipeline) -> None:
    """Of a prior without classes, with guidance 0, and where a completion is to choose the class."""
    torch.manual_seed(0)
    images, mask = torch.randint(256, (1, 1, *SIZE), dtype=torch.uint8), half_mask("left", SIZE)
    save_png(images[0], tmp_path / "picture.png")
    plain, picture, out = pipeline_in(tmp_path / "plain"), tmp_path / "picture.png", tmp_path / "out"
    options, unguided = (SampleOptions.of(n=1, guidance=guidance, keep_best=0.5) for guidance in (1, 0))
    for got, calls in {
        "samples without them": [
            lambda: plain.sample(2, keep_best=0.5),
            lambda: guided.sample(2, guidance=0, keep_best=0.5),
            lambda: sample_to_folder(guided, unguided, out),
            lambda: sample_to_folder(plain, options, out),
        ],
        "completions without a label": [
            lambda: plain.complete(images, mask, keep_best=0.5),
            lambda: guided.complete(images, mask, keep_best=0.5),
            lambda: guided.complete(images, mask, guidance=0, keep_best=0.5),
            lambda: complete_to_folder(guided, picture, "left", options, out),
            lambda: complete_to_folder(guided, picture, "left", unguided, out),
        ],
    }.items():
        for call in calls:
            with pytest.raises(InputError) as error:
                call()
            assert str(error.value) == (
                "expected images with labels, of which --keep-best 0.5 keeps those most surely of their class, "
                f"got {got}; omit --keep-best"
            )
    assert not out.exists()
