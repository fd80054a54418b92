"""What processes that share a training agree on in each step, with threads as processes.

Legend: B items in a batch of all processes.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import InputError
from pipeline.images.image_set import open_images
from pipeline.runtime.process_group import ALONE, OtherProcessError, ProcessGroup
from pipeline.training import shared_steps
from pipeline.training.divergence import DivergedError
from pipeline.training.prior_stage import PriorStage
from pipeline.training.schedule import DataOrder
from pipeline.training.shared_steps import SharedSteps, Wishes, digest, images_digest
from pipeline.training.stage import Batch
from pipeline.training.step_gradients import StepGradients
from prior import GatedPixelCNN, PriorConfig

from ..conftest import Trained
from ..process_threads import run_in_threads
from .test_accumulation import Grids
from .training_runs import Toy, settings_of

NOTHING = Wishes()


def alone_wishing(wishes: Wishes) -> SharedSteps:
    return SharedSteps(ALONE, lambda: wishes)


def diverged(rank: int) -> DivergedError:
    return DivergedError(expected="finite losses", got=f"nan in process {rank}", do="lower --lr")


# Wishes


@pytest.mark.parametrize(
    ("wishes", "agreed"),
    [
        ([Wishes(save=True), NOTHING, NOTHING], Wishes(save=True)),
        ([NOTHING, Wishes(signal=signal.SIGTERM), NOTHING], Wishes(signal=signal.SIGTERM)),
        ([NOTHING, NOTHING, Wishes(output_closed=True)], Wishes(output_closed=True)),
        (
            [Wishes(save=True), Wishes(signal=2, output_closed=True), Wishes(signal=15)],
            Wishes(signal=15, output_closed=True, save=True),
        ),
        ([NOTHING] * 3, NOTHING),
    ],
)
def test_what_one_wishes_holds_for_all_after_the_step_and_no_longer(wishes: list[Wishes], agreed: Wishes) -> None:
    def work(group: ProcessGroup) -> list[Wishes]:
        own = [wishes[group.rank]]
        shared = SharedSteps(group, lambda: own[0])
        seen = [shared.wishes()]  # before anything is agreed on, that of one would be news to the others
        shared.agree(None)
        seen.append(shared.wishes())
        own[0] = NOTHING
        seen.append(shared.wishes())
        shared.agree(None)
        return [*seen, shared.wishes()]

    for seen in run_in_threads(3, work):
        assert seen == [NOTHING, agreed, agreed, NOTHING]
        assert type(seen[1].signal) is int
        assert (type(seen[1].save), type(seen[1].output_closed)) == (bool, bool)


def test_one_process_alone_agrees_with_itself_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a digest of weights, without torch.distributed."""
    monkeypatch.setattr(shared_steps, "digest", None)
    shared = alone_wishing(Wishes(signal=2))
    assert shared.wishes() == Wishes(signal=2)
    shared.agree(None)
    shared.check(lambda: None)
    shared.check_equal(Toy(), 3)
    with pytest.raises(DivergedError, match="nan in process 0"):
        shared.agree(diverged(0))
    stage = Toy()
    with shared.gradients_of(stage):
        assert stage.network is stage.model


# Errors


def outcomes_of(act: Callable[[SharedSteps, int], None], count: int = 3) -> list[str]:
    """Return what `act` raised in each process."""

    def work(group: ProcessGroup) -> None:
        act(SharedSteps(group, lambda: NOTHING), group.rank)

    outcomes = run_in_threads(count, work)
    assert all(outcome is None or isinstance(outcome, (InputError, OtherProcessError)) for outcome in outcomes)
    return [f"{type(outcome).__name__}: {outcome}" for outcome in outcomes]


@pytest.mark.parametrize("bad", [{0}, {1}, {1, 2}, {0, 1, 2}])
@pytest.mark.parametrize("how", ["agree", "check"])
def test_an_error_in_one_is_raised_in_all_and_is_that_of_the_first(bad: set[int], how: str) -> None:
    """Or the others would wait for ever in the sum of the gradients."""

    def act(shared: SharedSteps, rank: int) -> None:
        error = diverged(rank) if rank in bad else None

        def check() -> None:
            if error is not None:
                raise error

        shared.agree(error) if how == "agree" else shared.check(check)

    line = f"DivergedError: expected finite losses, got nan in process {min(bad)}; lower --lr"
    assert outcomes_of(act) == [line] * 3


def test_without_an_error_nothing_is_raised() -> None:
    assert outcomes_of(lambda shared, rank: shared.agree(None)) == ["NoneType: None"] * 3
    assert outcomes_of(lambda shared, rank: shared.check(lambda: None)) == ["NoneType: None"] * 3


# Equal weights


def toy_with(weight: float) -> Toy:
    toy = Toy()
    nn.init.constant_(toy.model.weight, weight)
    return toy


def test_weights_that_differ_in_the_last_bit_are_one_error() -> None:
    """In the main process, which prints it; the others end without a word."""
    almost = float(np.nextafter(np.float32(0.5), np.float32(1)))

    def act(shared: SharedSteps, rank: int) -> None:
        shared.check_equal(toy_with(almost if rank == 2 else 0.5), 1234)

    first, *others = outcomes_of(act)
    one, other = digest(toy_with(0.5).model), digest(toy_with(almost).model)
    assert first == (
        "InputError: expected the same weights and codebook after 1,234 steps in every process, got "
        f"{other} in process 2, {one} in process 0; "
        "use the same devices and versions everywhere, and continue with --resume"
    )
    assert others == ["OtherProcessError: 1"] * 2


def test_equal_weights_are_none() -> None:
    assert outcomes_of(lambda shared, rank: shared.check_equal(toy_with(0.5), 1)) == ["NoneType: None"] * 3


def test_the_digest_is_of_every_bit_and_every_name() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3))
    found = {digest(model)}
    for tensor in model.state_dict().values():
        raw = tensor.view(-1).view(torch.uint8)
        for place in (0, len(raw) - 1):
            raw[place] ^= 1
            found.add(digest(model))
            raw[place] ^= 1
    assert len(found) == 1 + 2 * len(model.state_dict())
    assert digest(model) in found
    assert digest(nn.ModuleDict({"a": model[0], "b": model[1]})) not in found
    with torch.no_grad():
        conv = model[0]
        assert isinstance(conv, nn.Conv2d)
        conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
    assert digest(model) in found  # of another layout in memory


def test_images_have_a_digest_where_there_is_something_to_compare(trained: Trained) -> None:
    images = open_images(str(trained.images))
    assert images_digest(images.train, ALONE) == ""
    digests = {images_digest(part, ProcessGroup(0, 2)) for part in (images.train, images.test)}
    assert len(digests) == 2
    assert all(len(each) == 64 for each in digests)


# Gradients of all processes


def prior_stage(group: ProcessGroup = ALONE) -> PriorStage:
    """A small prior with dropout and hidden labels, the same each time: its weights do not depend on other threads."""
    config = PriorConfig(num_codes=9, num_classes=3, channels=6, num_layers=3, dropout=0.3, label_dropout=0.5)
    model, random = GatedPixelCNN(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) / 3)
    return PriorStage(model, Grids(20), np.arange(20) >= 16, group=group)


def two_steps(group: ProcessGroup, accumulate: int) -> list[tuple[dict[str, Tensor], list[Tensor]]]:
    """Return losses and gradients of a process in steps 3 and 4."""
    stage = prior_stage(group)
    settings = settings_of(steps=6, batch_size=7, accumulate=accumulate)
    gradients = StepGradients(stage, settings, SharedSteps(group, lambda: NOTHING))
    found = []
    with gradients.loading_from(3):
        for step in (3, 4):
            losses = gradients.compute(step)
            found.append((losses, [p.grad.clone() for p in stage.model.parameters() if p.grad is not None]))
            stage.model.zero_grad()
    return found


@pytest.mark.parametrize(("count", "accumulate"), [(2, 1), (3, 1), (5, 1), (2, 3), (3, 2)])
def test_the_mean_of_the_gradients_of_uneven_parts_is_that_of_the_whole_batch(count: int, accumulate: int) -> None:
    """DistributedDataParallel takes the mean over processes; 7 items on 2, 3 or 5 of them are never equally many."""
    alone = two_steps(ALONE, 1)
    together = run_in_threads(count, lambda group: two_steps(group, accumulate))
    for step in range(2):
        losses, gradients = alone[step]
        for name, loss in losses.items():
            summed = torch.stack([found[step][0][name] for found in together]).sum()
            torch.testing.assert_close(summed, loss)
        for place, gradient in enumerate(gradients):
            mean = torch.stack([found[step][1][place] for found in together]).mean(dim=0)
            torch.testing.assert_close(mean, gradient, rtol=1e-4, atol=1e-6 + 1e-5 * float(gradient.abs().max()))
    unweighted = torch.stack([found[0][0]["loss"] * count / 7 for found in together])
    assert not torch.allclose(unweighted.mean(), alone[0][0]["loss"], rtol=1e-3)


OF_THIRD_STEP = DataOrder(8, 4, 0).batch(2).reshape(2, 2).tolist()  # by rank


class Failing(Toy):
    """A toy whose third step fails in one process."""

    def __init__(self, how: str, fails: bool) -> None:
        super().__init__(num_items=8)
        self.how, self.fails, self.discarded = how, fails, 0

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        found = super().losses(batch)
        if self.fails and batch.indices.tolist() in OF_THIRD_STEP:
            if self.how == "raise":
                raise FloatingPointError("expected finite vectors, got nan; lower the learning rate")
            return {"loss": found["loss"] * float("nan")}
        return found

    def discard_step(self) -> None:
        self.discarded += 1


@pytest.mark.parametrize("how", ["raise", "nan"])
@pytest.mark.parametrize("bad", [0, 1])
def test_what_is_not_finite_in_one_process_ends_the_step_in_all(how: str, bad: int) -> None:
    """Before gradients are added up, with the names of the whole batch, and with what is discarded in each."""

    def work(group: ProcessGroup) -> tuple[str, bool]:
        stage = Failing(how, group.rank == bad)
        gradients = StepGradients(stage, settings_of(batch_size=4), SharedSteps(group, lambda: NOTHING))
        with gradients.loading_from(1):
            gradients.compute(1)
            before = stage.discarded
            with pytest.raises(DivergedError) as error:
                gradients.compute(2)
        return str(error.value), stage.discarded == before + 1

    names = ", ".join(f"{index}.png" for index in DataOrder(8, 4, 0).batch(2))
    got = "expected finite vectors, got nan" if how == "raise" else "loss = nan"
    for text, discarded in run_in_threads(2, work):
        assert text.startswith(f"expected finite losses, got {got} at step 3, in the batch of {names}; lower --lr ")
        assert discarded


def test_the_rehearsal_leaves_no_trace_and_its_errors_are_those_of_the_step() -> None:
    """A batch that is not finite is met in the rehearsal first, where it ends nothing."""

    def work(group: ProcessGroup) -> tuple[int, list[int], float]:
        stage = Failing("nan", group.rank == 1)
        gradients = StepGradients(stage, settings_of(batch_size=4), SharedSteps(group, lambda: NOTHING))
        with gradients.loading_from(2):
            rehearsed = len(stage.seen)
            assert stage.model.weight.grad is None
            with pytest.raises(DivergedError, match="at step 3, in the batch of"):
                gradients.compute(2)
        return rehearsed, stage.seen[-1], stage.weight

    assert run_in_threads(2, work) == [(1, own, 0.0) for own in OF_THIRD_STEP]


def test_one_process_alone_rehearses_nothing() -> None:
    stage = Toy()
    with StepGradients(stage, settings_of(), alone_wishing(NOTHING)).loading_from(0):
        assert stage.seen == []


# The network that gradients are added up with


@pytest.fixture
def one_of_two() -> Iterator[ProcessGroup]:
    """The first of two processes, as far as steps know; torch knows one."""
    store: Any = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield ProcessGroup(0, 2)
    finally:
        dist.destroy_process_group()


def test_within_the_run_the_network_is_wrapped_and_gradients_are_added_up_once_a_step(
    one_of_two: ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[str] = []
    real = DistributedDataParallel.no_sync

    def no_sync(self: DistributedDataParallel) -> AbstractContextManager[None]:
        waits.append("no sync")
        return real(self)

    monkeypatch.setattr(DistributedDataParallel, "no_sync", no_sync)
    shared, stage = SharedSteps(one_of_two, lambda: NOTHING), prior_stage()
    model = stage.network
    codes, labels = stage.load(np.arange(4))

    def three_parts() -> None:
        wrapped = stage.network
        assert isinstance(wrapped, DistributedDataParallel)
        assert wrapped.module is model
        assert not wrapped.broadcast_buffers  # those of a quantizer would be overwritten by the first process's
        assert all(not name.startswith("module.") for name in stage.weights_to_use())
        for is_last in (False, False, True):
            loss = wrapped(codes, labels, torch.arange(4)).square().mean()
            shared.backward(wrapped, loss, 0.25, is_last=is_last)
            waits.append("backward")
        raise KeyError

    with pytest.raises(KeyError), shared.gradients_of(stage):
        three_parts()
    assert waits == ["no sync", "backward", "no sync", "backward", "backward"]
    assert stage.network is model
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    (model(codes, labels, torch.arange(4)).square().mean() * (3 * 0.25 * 2)).backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
