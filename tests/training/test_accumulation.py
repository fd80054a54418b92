"""A batch in parts, computed one after the other, against the batch as a whole: losses, gradients, runs.

Legend: N items in all, B in a batch, n in a part of it, C channels, H W grid, H' W' image.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.images.image_set import ImageSplit, open_images
from pipeline.models.checkpoint import TrainingState, load_training, read_info, read_run, save_checkpoint
from pipeline.models.loading import load_trained_tokenizer
from pipeline.training import loop
from pipeline.training.decoder_stage import DecoderStage
from pipeline.training.loop import run_training
from pipeline.training.prior_stage import PriorStage
from pipeline.training.stage import Batch, Stage
from pipeline.training.tokenizer_stage import BaselineStage, TokenizerStage
from prior import GatedPixelCNN, PriorConfig
from prior.dropout import kept
from prior.model import NO_LABEL
from prior.objective import cross_entropy
from tokenizer import VQVAE, Baseline, TokenizerConfig
from tokenizer.config import CodebookUpdate

from ..conftest import Codegrid, Trained
from ..support import load_weights
from .test_resume import with_ctrl_c_in
from .training_runs import batch_of, lines_of, run_again, same_run, settings_of, toy_info

SMALL: dict[str, Any] = {
    "in_channels": 1,
    "hidden_channels": 8,
    "residual_channels": 4,
    "num_residual_layers": 1,
    "code_dim": 2,
}
ITEMS = [3, 0, 11, 7, 5, 2, 9]  # of a batch; 7, which neither 2 nor 3 parts divide
KEYS = [2**61 + 5 * index for index in range(len(ITEMS))]
EVERY = ["tokenizer", "gradient", "vae", "prior"]

MakeStage = Callable[[str], Stage]


class Grids:
    """Random code grids [N,4,3] of 9 codes, with labels of 3 classes."""

    def __init__(self, count: int) -> None:
        random = torch.Generator().manual_seed(2)
        self.codes = torch.randint(9, (count, 4, 3), generator=random)
        self.labels = torch.arange(count) % 3

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        return self.codes[indices], self.labels[indices]

    def names(self) -> Iterable[str]:
        return [f"{row}.png" for row in range(len(self.codes))]


@pytest.fixture
def images(grey_folder: Path) -> ImageSplit:
    return open_images(str(grey_folder)).train


@pytest.fixture
def make_stage(images: ImageSplit, trained: Trained) -> MakeStage:
    """A function that makes the same small stage each time."""

    def make(kind: str) -> Stage:
        torch.manual_seed(0)
        if kind == "prior":
            config = PriorConfig(num_codes=9, num_classes=3, channels=6, num_layers=3, dropout=0.3, label_dropout=0.5)
            return PriorStage(GatedPixelCNN(config), Grids(20), np.arange(20) >= 16)
        if kind == "decoder":
            pictures = open_images(str(trained.images)).train
            return DecoderStage(load_trained_tokenizer(trained.tokenizer, "cpu").model, pictures)
        if kind == "vae":
            return BaselineStage(Baseline(TokenizerConfig(**SMALL, bottleneck="vae")), images)
        update: CodebookUpdate = "gradient" if kind == "gradient" else "ema"
        return TokenizerStage(VQVAE(TokenizerConfig(**SMALL, num_codes=12, codebook_update=update)), images)

    return make


def step_in_parts(stage: Stage, parts: int, items: list[int] = ITEMS) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the losses of a batch, weighted by the sizes of its parts, and the gradients of the model."""
    torch.manual_seed(9)
    stage.model.train().zero_grad()
    pieces = batch_of(stage, items, KEYS[: len(items)]).split(parts)
    stage.begin_step(pieces)
    total: dict[str, Tensor] = {}
    for piece in pieces:
        losses = stage.losses(piece)
        (losses["loss"] * (len(piece) / len(items))).backward()
        for name, loss in losses.items():
            total[name] = total.get(name, torch.zeros(())) + loss.detach() * (len(piece) / len(items))
    stage.finish_step()
    return total, {name: p.grad for name, p in stage.model.named_parameters() if p.grad is not None}


# One step


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("parts", [2, 3, 7])
def test_a_batch_in_parts_has_the_losses_and_gradients_of_the_whole(
    make_stage: MakeStage, kind: str, parts: int
) -> None:
    """Parts of uneven sizes; dropout, hidden labels and noise are those of the items; and the codebook moves alike."""
    stage, whole = make_stage(kind), make_stage(kind)
    losses, gradients = step_in_parts(stage, parts)
    expected_losses, expected = step_in_parts(whole, 1)
    assert losses.keys() == expected_losses.keys()
    for name, loss in expected_losses.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected.keys() == dict(stage.model.named_parameters()).keys()
    for name, gradient in expected.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * largest + 1e-8)
    for name, buffer in stage.model.state_dict().items():
        torch.testing.assert_close(buffer, whole.model.state_dict()[name], rtol=1e-5, atol=1e-5)


def test_unweighted_parts_would_miss_by_far(make_stage: MakeStage) -> None:
    """So the tolerance means something: the mean of the means of 2, 2 and 3 items is another loss."""
    whole, _ = step_in_parts(make_stage("prior"), 1)
    stage = make_stage("prior")
    stage.model.train()
    pieces = batch_of(stage, ITEMS, KEYS).split(3)
    mean = torch.stack([stage.losses(piece)["loss"].detach() for piece in pieces]).mean()
    assert abs(float(mean - whole["loss"])) > 5e-4


@pytest.mark.parametrize("kind", EVERY)
def test_the_keys_of_the_items_are_what_their_losses_depend_on(make_stage: MakeStage, kind: str) -> None:
    """Of those with randomness; the generator of torch has no part in it."""
    stage = make_stage(kind)
    stage.model.train()
    found = []
    for seed, keys in ((1, KEYS), (2, KEYS), (1, KEYS[::-1])):
        torch.manual_seed(seed)
        batch = batch_of(stage, ITEMS, keys)
        stage.begin_step([batch])
        found.append(stage.losses(batch)["loss"].item())
        stage.discard_step()
    assert found[0] == found[1]
    assert (found[0] != found[2]) == (kind in ("vae", "prior"))


def test_what_the_prior_hides_and_drops_is_that_of_each_item_alone(make_stage: MakeStage) -> None:
    """Against the losses of its items one by one, with labels hidden by hand and dropout as its keys say."""
    stage = make_stage("prior")
    assert isinstance(stage, PriorStage)
    hidden, losses = [], []
    for item, key in zip(ITEMS, KEYS, strict=True):
        uniform = torch.rand(1, dtype=torch.float64, generator=torch.Generator().manual_seed(key))
        codes, labels = stage.grids.batch(stage.train_rows[[item]])
        hidden.append(bool(uniform < 0.5))
        labels = torch.tensor([NO_LABEL]) if hidden[-1] else labels
        losses.append(cross_entropy(stage.model.train()(codes, labels, torch.tensor([key])), codes).detach())
    assert 1 < sum(hidden) < len(ITEMS) - 1
    assert not kept(torch.tensor(KEYS), 0, torch.Size([6, 4, 3]), 0.3).all()
    whole, _ = step_in_parts(stage, 1)
    torch.testing.assert_close(whole["loss"], torch.stack(losses).mean())


@pytest.mark.parametrize("parts", [2, 3])
def test_a_sharp_decoder_in_parts(make_stage: MakeStage, parts: int) -> None:
    """Its discriminator iterates once more for each part, and the two terms are balanced in each: nearly the same."""
    items = ITEMS[:2] + ITEMS[3:]
    losses, gradients = step_in_parts(make_stage("decoder"), parts, items)
    expected_losses, expected = step_in_parts(make_stage("decoder"), 1, items)
    torch.testing.assert_close(losses["reconstruction"], expected_losses["reconstruction"])
    torch.testing.assert_close(losses["discriminator"], expected_losses["discriminator"], rtol=0.02, atol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        if name.startswith("decoder"):
            error = float((gradients[name] - gradient).norm() / gradient.norm())
            assert error < 0.02, name


def test_the_codebook_starts_on_all_images_of_a_step_and_moves_once(make_stage: MakeStage) -> None:
    stage = make_stage("tokenizer")
    assert isinstance(stage, TokenizerStage)
    quantizer = stage.model.quantizer
    stage.model.train()
    pieces = batch_of(stage, ITEMS).split(3)
    stage.begin_step(pieces)
    positions = len(ITEMS) * 2 * 3
    assert float(quantizer.counts.sum()) == pytest.approx(positions)  # of all three parts
    before = quantizer.codebook.clone()
    for piece in pieces:
        stage.losses(piece)
        assert torch.equal(quantizer.codebook, before)
    stage.finish_step()
    assert float(quantizer.updates) == 1
    assert not torch.equal(quantizer.codebook, before)
    assert int(stage.recent.sum()) == positions
    moved = quantizer.codebook.clone()
    stage.begin_step(pieces)  # a codebook that has started does not start again
    stage.losses(pieces[0])
    stage.discard_step()
    stage.finish_step()
    assert torch.equal(quantizer.codebook, moved)


# A whole run


def run(stage: Stage, folder: Path, accumulate: int, steps: int = 4) -> dict[str, Tensor]:
    """Train a stage for some steps of 7 items; return the weights."""
    settings = settings_of(steps=steps, batch_size=7, learning_rate=0.02, accumulate=accumulate, evaluations=2)
    run_training(stage, toy_info(), settings, folder)
    return load_weights(folder)


def moved_and_missed(before: Stage, one: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[float, float]:
    """Return how far weights have moved, and how far two runs are from one another: the largest of any number."""
    start = before.weights_to_use()
    numbers = [name for name, tensor in one.items() if tensor.is_floating_point() and tensor.isfinite().all()]
    moved = max(float((one[name] - start[name]).abs().max()) for name in numbers if "quantizer" not in name)
    return moved, max(float((one[name] - other[name]).abs().max()) for name in numbers)


@pytest.mark.parametrize("kind", EVERY)
def test_a_run_in_three_parts_ends_where_one_in_one_part_does(
    make_stage: MakeStage, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and codebook within 1e-5, and the losses in the log."""
    monkeypatch.setattr(loop, "LINES_PER_EVALUATION", 1)
    whole = run(make_stage(kind), tmp_path / "whole", 1)
    in_parts = run(make_stage(kind), tmp_path / "parts", 3)
    moved, missed = moved_and_missed(make_stage(kind), whole, in_parts)
    assert missed < 1e-5 < 1e-3 < moved * 5
    for one, other in zip(*(lines_of(tmp_path / name) for name in ("whole", "parts")), strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"seconds", "part"}:
            assert one[name] == pytest.approx(other[name], rel=1e-4), name


@pytest.mark.parametrize("kind", ["tokenizer", "prior"])
def test_a_run_may_be_resumed_in_another_number_of_parts(make_stage: MakeStage, kind: str, tmp_path: Path) -> None:
    whole = run(make_stage(kind), tmp_path / "whole", 1)
    stage = with_ctrl_c_in(make_stage(kind), 5)  # the second of three parts of step 2
    with pytest.raises(KeyboardInterrupt):
        run(stage, tmp_path / "resumed", 3)
    assert read_run(tmp_path / "resumed", "prior").training.values["step"] == 2
    settings = settings_of(steps=4, batch_size=7, learning_rate=0.02, accumulate=2, evaluations=2)
    run_again(make_stage(kind), settings, tmp_path / "resumed")
    moved, missed = moved_and_missed(make_stage(kind), whole, load_weights(tmp_path / "resumed"))
    assert missed < 1e-5 < 1e-3 < moved * 5


def test_the_option_reaches_the_run_and_may_change(tmp_path: Path, trained: Trained, codegrid: Codegrid) -> None:
    command = ["train-prior", "--codes", trained.codes, "--channels", 4, "--num-layers", 2, "--out", tmp_path / "run"]
    sizes: list[int] = []
    real = PriorStage.losses

    def losses(self: PriorStage, batch: Batch) -> dict[str, Tensor]:
        sizes.append(len(batch))
        return real(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PriorStage, "losses", losses)
        assert codegrid(*command, "--batch-size", 5, "--steps", 1, "--accumulate", 2).status == 0
        assert codegrid(*command, "--steps", 2, "--accumulate", 5, "--resume").status == 0
    assert sizes == [2, 3, 1, 1, 1, 1, 1]
    assert read_info(tmp_path / "run", "prior").training["accumulate"] == 5
    outcome = codegrid(*command, "--batch-size", 5, "--steps", 1, "--accumulate", 6, "--force")
    assert outcome.status == 1
    assert outcome.error_lines == ["Error: accumulate: expected from 1 to batch_size, which is 5, got 6"]


# States of older versions


def test_a_state_with_random_numbers_of_an_older_version_resumes(make_stage: MakeStage, tmp_path: Path) -> None:
    """They saved the states of torch's generators, which are now functions of the step; nothing depends on them."""
    settings = settings_of(steps=4, batch_size=7, learning_rate=0.02, evaluations=2)
    for folder in (tmp_path / "new", tmp_path / "old"):
        with pytest.raises(KeyboardInterrupt):
            run_training(with_ctrl_c_in(make_stage("prior"), 2), toy_info(), settings, folder)
    state, weights = load_training(tmp_path / "old"), load_weights(tmp_path / "old")
    assert not any(name.startswith("random/") for name in state.tensors)
    older = TrainingState(
        tensors={**state.tensors, "random/cpu": torch.Generator().manual_seed(77).get_state()}, values=state.values
    )
    save_checkpoint(tmp_path / "old", read_info(tmp_path / "old", "prior"), weights, older)
    assert "random/cpu" in load_training(tmp_path / "old").tensors
    for folder in (tmp_path / "new", tmp_path / "old"):
        run_again(make_stage("prior"), settings, folder)
    same_run_without_pictures(tmp_path / "new", tmp_path / "old")


def same_run_without_pictures(one: Path, other: Path) -> None:
    for folder in (one, other):
        for step in (2, 4):
            (folder / "pictures").mkdir(exist_ok=True)
            (folder / "pictures" / f"step-{step:07d}.png").touch()
    same_run(one, other)
