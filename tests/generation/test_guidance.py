"""Guidance as a user meets it: what reaches the prior, what is refused, and what the commands do if none is named."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.generation.guidance import DEFAULT_GUIDANCE
from pipeline.generation.image_pipeline import ImagePipeline, open_labels
from pipeline.generation.keep_mask import half_mask, known_codes
from pipeline.generation.sample_folder import SampleOptions, complete_to_folder, sample_to_folder
from pipeline.images.png import save_png
from pipeline.images.preprocessing import to_float
from pipeline.models.checkpoint import read_info
from prior import SamplingParameters, complete_codes, sample_codes

from ..conftest import Codegrid, Trained
from ..support import GRID, HEIGHT, WIDTH, save_prior, tiny_prior
from .conftest import CLASS_NAMES, pipeline_in

SIZE = (HEIGHT, WIDTH)
NO_LABEL = torch.full((4,), -1)


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images() -> Tensor:
    """Four grey images of noise, [4,1,H',W'] uint8."""
    return torch.randint(256, (4, 1, *SIZE), dtype=torch.uint8, generator=generator_of(0))


# Through the pipeline


def test_a_guided_sample_is_that_of_sample_codes(guided: ImagePipeline) -> None:
    labels, found = torch.tensor([1, 2, 1, 2]), []
    for guidance in (0.5, 1, 3):
        codes = guided.sample(4, labels=[1, 2], seed=8, top_k=9, guidance=guidance).codes
        source = generator_of(8)
        expected = sample_codes(guided.prior, 4, GRID, labels=labels, top_k=9, guidance=guidance, generator=source)
        assert torch.equal(codes, expected)
        found.append(codes)
    assert torch.equal(found[1], guided.sample(4, labels=[1, 2], seed=8, top_k=9).codes)  # 1 is the default
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[2], found[1])


def test_guidance_0_samples_as_the_prior_does_without_a_label(guided: ImagePipeline) -> None:
    expected = sample_codes(guided.prior, 4, GRID, labels=NO_LABEL, generator=generator_of(8))
    assert torch.equal(guided.sample(4, seed=8, guidance=0).codes, expected)
    assert torch.equal(guided.sample(2, seed=8, guidance=0, first=2).codes, expected[2:])
    assert not torch.equal(guided.sample(4, seed=8).codes, expected)
    assert guided.labels_for(4, None, guidance=0) is None


@pytest.mark.parametrize("keep", ["top", "right"])
def test_a_guided_completion_is_that_of_complete_codes(guided: ImagePipeline, images: Tensor, keep: str) -> None:
    """With labels, with an open class, and without: then there is no class to be open."""
    mask = half_mask(keep, SIZE)
    known = known_codes(guided.tokenizer, to_float(images), mask.expand(4, *SIZE))

    def expected(labels: Tensor, source: torch.Generator, **options: float) -> Tensor:
        return complete_codes(guided.prior, known, candidates=6, labels=labels, generator=source, **options)  # type: ignore[arg-type]

    def found(**options: Any) -> Tensor:
        return guided.complete(images, mask, candidates=6, seed=5, **options).codes

    with_labels = found(labels=["ring", "0"], guidance=2)
    assert torch.equal(with_labels, expected(torch.tensor([1, 2, 1, 2]), generator_of(5), guidance=2))
    assert not torch.equal(with_labels, found(labels=["ring", "0"]))
    source = generator_of(5)
    open_class = found(guidance=2)
    assert torch.equal(open_class, expected(open_labels(4, 6, 3, source), source, guidance=2))
    assert not torch.equal(open_class, found())
    assert torch.equal(found(guidance=0), expected(NO_LABEL, generator_of(5)))


# What is refused


@pytest.mark.parametrize("guidance", [0, 0.5, 2])
@pytest.mark.parametrize(
    ("class_names", "message"),
    [
        (
            CLASS_NAMES,
            "expected guidance 1 for a prior that was trained without label dropout, got {:g}; omit --guidance, or "
            "train one with train-prior --label-dropout",
        ),
        (
            (),
            "expected guidance 1 for a prior that was trained without labels, got {:g}; omit --guidance, or train on "
            "images with classes, with train-prior --label-dropout",
        ),
    ],
)
def test_a_prior_that_cannot_be_guided(
    tmp_path: Path, images: Tensor, class_names: tuple[str, ...], guidance: float, message: str
) -> None:
    pipeline, mask, out = pipeline_in(tmp_path, class_names), half_mask("left", SIZE), tmp_path / "out"
    save_png(images[0], tmp_path / "picture.png")
    options = SampleOptions.of(n=1, guidance=guidance)
    for call in (
        lambda: pipeline.sample(2, guidance=guidance),
        lambda: pipeline.complete(images, mask, guidance=guidance),
        lambda: sample_to_folder(pipeline, options, out),
        lambda: complete_to_folder(pipeline, tmp_path / "picture.png", "left", options, out),
    ):
        with pytest.raises(InputError) as error:
            call()
        assert str(error.value) == message.format(guidance)
    assert not out.exists()
    pipeline.sample(1, guidance=1)
    pipeline.complete(images, mask, guidance=1, candidates=1)


def test_a_label_with_guidance_0(guided: ImagePipeline, images: Tensor) -> None:
    mask, message = half_mask("left", SIZE), "expected no label with guidance 0, which samples without, got one; omit"
    for label in ("ring", 0, [1, 2], torch.tensor([0])):
        with pytest.raises(InputError, match=message):
            guided.sample(2, labels=label, guidance=0)
        with pytest.raises(InputError, match=message):
            guided.complete(images, mask, labels=label, guidance=0)


@pytest.mark.parametrize("guidance", [-1, float("nan"), float("inf")])
def test_guidance_out_of_its_range(guided: ImagePipeline, unlabelled: ImagePipeline, guidance: float) -> None:
    for pipeline in (guided, unlabelled):
        with pytest.raises(ValueError, match="guidance: expected"):
            pipeline.sample(1, guidance=guidance)


# What the commands do


def test_the_default_is_for_priors_that_can_be_guided(guided: ImagePipeline, tmp_path: Path) -> None:
    """A number that is named holds for every prior, and so do the other parameters."""
    plain = pipeline_in(tmp_path / "plain", CLASS_NAMES)
    assert DEFAULT_GUIDANCE > 1
    measured = replace(guided.trained_prior, info=replace(guided.prior_info, metrics={"guidance": 3.5}))
    old = replace(plain.trained_prior, info=replace(plain.prior_info, metrics={"guidance": 3.5}))
    defaults = ((guided.trained_prior, DEFAULT_GUIDANCE), (plain.trained_prior, 1), (measured, 3.5), (old, 1))
    for prior, default in defaults:
        found = SampleOptions.of(n=3, temperature=0.5, top_k=4).for_prior(prior)
        assert found == SampleOptions(
            n=3, parameters=SamplingParameters(temperature=0.5, top_k=4, guidance=default), default_guidance=False
        )
        assert SampleOptions.of(n=3, guidance=1.5).for_prior(prior).parameters.guidance == 1.5
        assert SampleOptions(n=3).for_prior(prior).parameters.guidance == 1  # of the functions


def record_of(folder: Path, name: str = "sample.json") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name).read_text("utf-8"))
    return content


def test_the_commands_sample_with_the_default_and_record_the_number(
    tmp_path: Path, trained: Trained, codegrid: Codegrid
) -> None:
    """And for the same tokenizer's prior without label dropout, silently, with 1."""
    picture = sorted(trained.images.rglob("*.png"))[0]
    fingerprint = ImagePipeline.from_pretrained(trained.tokenizer, trained.prior, "cpu").tokenizer_info.fingerprint
    save_prior(tmp_path / "plain", tiny_prior(num_classes=3), fingerprint, ("disc", "line", "été"))
    measured = read_info(trained.prior, "prior").metrics["guidance"]
    assert measured >= DEFAULT_GUIDANCE
    for prior, default in ((trained.prior, measured), (tmp_path / "plain", 1)):
        both = ["--tokenizer", trained.tokenizer, "--prior", prior, "--n", 3, "--seed", 2]
        pipeline = ImagePipeline.from_pretrained(trained.tokenizer, prior, "cpu")
        for named, guidance in (([], default), (["--guidance", 1], 1)):
            shutil.rmtree(tmp_path / "s", ignore_errors=True)
            shutil.rmtree(tmp_path / "c", ignore_errors=True)
            outcome = codegrid("sample", *both, *named, "--out", tmp_path / "s")
            assert (outcome.status, outcome.error_lines) == (0, [])
            expected = pipeline.sample(3, seed=2, guidance=guidance).codes
            np.testing.assert_array_equal(np.load(tmp_path / "s" / "codes.npy"), expected)
            assert record_of(tmp_path / "s")["options"]["guidance"] == guidance
            completed = ["complete", *both, *named, "--image", picture, "--keep", "top", "--out", tmp_path / "c"]
            assert codegrid(*completed).status == 0
            assert record_of(tmp_path / "c", "complete.json")["options"]["guidance"] == guidance


def test_with_guidance_0_the_record_has_no_labels(tmp_path: Path, trained: Trained, codegrid: Codegrid) -> None:
    both = ["--tokenizer", trained.tokenizer, "--prior", trained.prior]
    assert codegrid("sample", *both, "--n", 70, "--guidance", 0, "--out", tmp_path / "out").status == 0
    record = record_of(tmp_path / "out")
    assert (record["labels"], record["class_names"], record["options"]["guidance"]) == (None, None, 0)
    pipeline = ImagePipeline.from_pretrained(trained.tokenizer, trained.prior, "cpu")
    expected = pipeline.sample(70, seed=0, guidance=0).codes  # in one batch, which the command divides
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "codes.npy"), expected)
    outcome = codegrid("sample", *both, "--guidance", 0, "--label", "line", "--out", tmp_path / "refused")
    assert (outcome.status, outcome.error_lines) == (
        1,
        ["Error: expected no label with guidance 0, which samples without, got one; omit --label or --guidance 0"],
    )


def test_the_help_says_the_default_and_what_guidance_costs(codegrid: Codegrid) -> None:
    for command in ("sample", "complete", "evaluate"):
        words = " ".join(codegrid(command, "--help").out.split())
        default = f"what train-prior found to suit the prior, {DEFAULT_GUIDANCE:g} or more"
        assert f"[default: {default}; 1 for a prior without --label-dropout]" in words
        assert "1 is the plain prior, 0 no label; more is truer to the label and less varied" in words
