"""Several processes that train one codebook, against one process that has the whole batch.

Groups of two and of three real processes, which share batches unevenly, do all that is asked for once and leave what
they found in files. The same functions, called here, are the oracle: there is one process, with all the items.

Legend: B items in a batch, D code dimension, H W grid, K codes, N vectors of all processes.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.runtime import heartbeat
from pipeline.runtime.process_group import process_group
from tokenizer import VectorQuantizer, quantizer
from tokenizer.config import CodebookUpdate
from tokenizer.processes import Spread, draw_distinct, sum_of_all
from tokenizer.quantizer import NotFiniteError

from ..runtime.processes import run_processes
from .oracles import UPDATES

B, D, H, W, K = 8, 3, 3, 2, 16
STEPS = 7
PARTS = {1: [8], 2: [6, 2], 3: [5, 2, 1]}  # items of each process, by their number; the last has fewer vectors than K
TOLERANCE = 1e-6  # relative to the largest value

Found = dict[str, Tensor]


def batch(step: int) -> Tensor:
    """The items of a step, [B,D,H,W], with one vector in common; from the third step on they are somewhere else."""
    z = torch.randn(B, D, H, W, generator=torch.Generator().manual_seed(100 + step))
    z[:, :, 0, 1] = torch.tensor([0.5, -1.0, 2.0])
    return z + (8 * torch.eye(D)[step % D, :, None, None] if step >= 2 else 0)


def part_of(z: Tensor, rank: int, count: int) -> Tensor:
    """The part of a process of items [B,...]."""
    return z.split(PARTS[count])[rank]


def seeded(rank: int) -> None:
    """Seed this process as no other is."""
    torch.manual_seed(1 + 10 * rank)


# What each process does


def train(update: CodebookUpdate, rank: int, count: int, *, parts: int = 1, revival: float = 0.1) -> Found:
    """Take STEPS steps, each over so many forward passes; return the state after each, and the codes of its items."""
    seeded(rank)
    learned = VectorQuantizer(K, D, codebook_update=update, revival_threshold=revival)
    learned.deferred = parts > 1
    found: Found = {}
    for step in range(STEPS):
        own = part_of(batch(step), rank, count)
        codes = []
        if learned.deferred and step == 0:
            learned.start(own)
        for piece in own.tensor_split(parts):
            result = learned(piece)
            codes.append(result.codes)
            if update == "gradient":
                (result.loss * (len(piece) / B)).backward()
        learned.update()
        if isinstance(learned.codebook, nn.Parameter):
            assert learned.codebook.grad is not None
            learned.codebook.data -= 0.3 * sum_of_all(learned.codebook.grad)
            learned.codebook.grad = None
        found |= {f"{step}/{name}": tensor.clone() for name, tensor in learned.state_dict().items()}
        found[f"{step}/codes"] = torch.cat(codes)
    return found


def train_alone(update: CodebookUpdate, rank: int, count: int) -> Found:
    """The same, but for statistics that each process keeps to itself; without revivals, as not all would take part."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizer, "sum_of_all", lambda tensor: tensor)
        return train(update, rank, count, revival=0)


def start(update: CodebookUpdate, rank: int, count: int) -> Found:
    """Start codebooks with fewer and with more codes than there are vectors: by `start`, and within `forward`."""
    found: Found = {}
    for num_codes in (K, 64):
        for how in ("start", "forward"):
            seeded(rank)
            started = VectorQuantizer(num_codes, D, codebook_update=update, revival_threshold=0)
            own = part_of(batch(0), rank, count)
            if how == "start":
                started.start(own)
                found |= {f"{num_codes}/started/{name}": x.clone() for name, x in started.state_dict().items()}
            started(own)
            found |= {f"{num_codes}/{how}/{name}": x.clone() for name, x in started.state_dict().items()}
    return found


def start_on_what_is_not_finite(rank: int, count: int) -> Found:
    """Start on items of which the last process has one with a wrong value; return which of two raised an error."""
    raised = []
    for wrong in (math.nan, math.inf, -math.inf):
        z = batch(0)
        z[-1, 1, 2, 1] = wrong
        fresh = VectorQuantizer(K, D)
        before = fresh.codebook.clone()
        with pytest.raises(NotFiniteError, match="expected finite vectors to quantize"):
            fresh.start(part_of(z, rank, count))
        raised.append(not fresh.started and torch.equal(fresh.codebook, before))
    return {"raised": torch.tensor(raised)}


def pools() -> dict[str, tuple[Tensor, Tensor | None, int]]:
    """Vectors [N,2], which of them are eligible, and how many to draw."""
    random = torch.Generator().manual_seed(7)
    few = torch.randint(4, (40, 2), generator=random).float()  # 15 different vectors
    many = torch.randn(6000, 2, generator=random)
    many[::2] = many[0]
    rare = torch.zeros(40, dtype=torch.bool)
    rare[[3, 38]] = True
    some = torch.rand(6000, generator=random) < 0.15
    return {
        "repeated": (few, None, 5),
        "fewer than asked": (few, None, 30),
        "eligible": (few, few[:, 0] > 1, 3),
        "two": (few, rare, 4),
        "none eligible": (few, torch.zeros(40, dtype=torch.bool), 4),
        "a large batch": (many, None, 50),
        "some of a large batch": (many, some, 400),
    }


def draw(rank: int, count: int) -> Found:
    """Draw from each pool, of which one of three processes has nothing; twice, as a training does."""
    found: Found = {}
    for name, (vectors, eligible, number) in pools().items():
        seeded(rank)
        total = len(vectors)
        sizes = {1: [total], 2: [total * 3 // 4, total - total * 3 // 4], 3: [total - 5, 0, 5]}[count]
        own = vectors.split(sizes)[rank]
        may = None if eligible is None else eligible.split(sizes)[rank]
        for time in range(2):
            found[f"{name}/{time}"] = draw_distinct(own, number, may)
    return found


def spread(rank: int, count: int) -> Found:
    """Measure how vectors are spread, some of them very far away."""
    found: Found = {}
    for name, z in {"usual": batch(0), "far": batch(1) + 1e4, "equal": torch.full((B, D, H, W), 0.1)}.items():
        own = part_of(z, rank, count).movedim(1, -1).reshape(-1, D)
        measured = Spread.of(own)
        found[name] = torch.tensor([measured.count, measured.deviation, measured.largest], dtype=torch.float64)
    return found


def everything(rank: int, count: int) -> Found:
    works: dict[str, Callable[[int, int], Found]] = {
        "not finite": start_on_what_is_not_finite,
        "draw": draw,
        "spread": spread,
    }
    found = {f"{name}/{key}": value for name, work in works.items() for key, value in work(rank, count).items()}
    for update in UPDATES:
        for name, tensors in {
            f"{update}/train": train(update, rank, count),
            f"{update}/in parts": train(update, rank, count, parts=2 if count < 3 else 1),
            f"{update}/alone": train_alone(update, rank, count),
            f"{update}/start": start(update, rank, count),
        }.items():
            found |= {f"{name}/{key}": value for key, value in tensors.items()}
    return {name: tensor.contiguous() for name, tensor in found.items()}


def work(rank: int) -> None:
    """Be one process of a group, which waits for the others also where the machine is busy."""
    heartbeat.LOST_AFTER = 30.0
    with process_group() as group:
        safetensors.torch.save_file(everything(rank, group.count), f"found-{rank}.safetensors")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Found]]:
    """What each process found, by the number of processes."""
    return {1: [everything(0, 1)]} | {count: _results(tmp_path_factory.mktemp("group"), count) for count in (2, 3)}


def _results(folder: Path, count: int) -> list[Found]:
    ended = run_processes(folder, count, work)
    # What is printed is not compared: on a busy machine, torch may warn of the store that process 0 closes at its end.
    assert [process.status for process in ended] == [0] * count, ended
    return [safetensors.torch.load_file(folder / f"found-{rank}.safetensors") for rank in range(count)]


def under(prefix: str, found: Mapping[str, Tensor]) -> Found:
    chosen = {name.removeprefix(prefix): x for name, x in found.items() if name.startswith(prefix)}
    assert chosen
    return chosen


def misses_by(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference, relative to the largest value of its tensor; whole numbers are equal or far off."""
    assert one.keys() == other.keys()
    worst = 0.0
    for name, tensor in one.items():
        if tensor.is_floating_point():
            scale = float(tensor.abs().max())
            difference = float((tensor - other[name]).abs().max())
            worst = max(worst, difference / scale if scale else difference)
        elif not torch.equal(tensor, other[name]):
            worst = math.inf
    return worst


def joined_codes(found: list[Found]) -> Found:
    """Return what the first process found, with the codes of all."""
    return {
        name: torch.cat([each[name] for each in found]) if name.endswith("codes") else tensor
        for name, tensor in found[0].items()
    }


# The codebook


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("how", ["train", "in parts"])
def test_all_processes_hold_the_same_bits(results: dict[int, list[Found]], count: int, update: str, how: str) -> None:
    """After each step: the codebook, its counts and sums, and what they count; after revivals, too."""
    first, *others = (under(f"{update}/{how}/", found) for found in results[count])
    states = [name for name in first if not name.endswith("codes")]
    assert {name.split("/")[1] for name in states} >= {"codebook", "counts", "started", "revived", "updates"}
    assert int(first[f"{STEPS - 1}/revived"]) > 3
    assert float(first[f"{STEPS - 1}/updates"]) == STEPS
    for other in others:
        for name in states:
            assert torch.equal(first[name], other[name]), name


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("how", ["train", "in parts"])
def test_they_learn_what_one_process_learns_from_the_joined_batch(
    results: dict[int, list[Found]], count: int, update: str, how: str
) -> None:
    """Uneven parts, of which one has fewer vectors than there are codes: sums are added, no means are averaged."""
    alone = under(f"{update}/train/", results[1][0])
    together = joined_codes([under(f"{update}/{how}/", found) for found in results[count]])
    assert misses_by(alone, together) < TOLERANCE
    for step in range(STEPS):
        assert torch.equal(alone[f"{step}/revived"], together[f"{step}/revived"])
        assert torch.equal(alone[f"{step}/codes"], together[f"{step}/codes"])


@pytest.mark.parametrize("count", [2, 3])
def test_statistics_of_each_process_alone_miss_by_far(results: dict[int, list[Found]], count: int) -> None:
    """So the tolerance means something: the codebook moves away from that of the whole batch, and from the others'."""
    whole = under("ema/train/", results[1][0])
    apart = [under("ema/alone/", found) for found in results[count]]
    for name in ("0/codebook", f"{STEPS - 1}/codebook"):
        for other in apart:
            assert misses_by({name: whole[name]}, {name: other[name]}) > 10_000 * TOLERANCE
        assert misses_by({name: apart[0][name]}, {name: apart[1][name]}) > 10_000 * TOLERANCE


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_start_is_what_forward_does_first(results: dict[int, list[Found]], count: int, update: str) -> None:
    for found in results[count]:
        for num_codes in (K, 64):
            by_start = under(f"{update}/start/{num_codes}/start/", found)
            by_forward = under(f"{update}/start/{num_codes}/forward/", found)
            assert by_start.keys() == by_forward.keys()
            assert all(torch.equal(by_start[name], by_forward[name]) for name in by_start)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("count", [2, 3])
def test_a_codebook_starts_on_the_vectors_of_all(results: dict[int, list[Found]], count: int, update: str) -> None:
    """On the same in each process and in one alone; where there are too few, the rest are copies close to them."""
    rows = {tuple(row) for row in batch(0).movedim(1, -1).reshape(-1, D).tolist()}
    of_first = {tuple(row) for row in part_of(batch(0), 0, count).movedim(1, -1).reshape(-1, D).tolist()}
    for num_codes in (K, 64):
        alone = under(f"{update}/start/{num_codes}/started/", results[1][0])
        together = [under(f"{update}/start/{num_codes}/started/", found) for found in results[count]]
        for other in together:
            assert all(torch.equal(together[0][name], tensor) for name, tensor in other.items())
            assert misses_by(alone, other) < TOLERANCE
        drawn = {tuple(row) for row in together[0]["codebook"].tolist()}
        assert len(drawn) == num_codes
        assert len(drawn & rows) == min(num_codes, len(rows))
        assert not drawn & rows <= of_first
        assert torch.equal(together[0]["counts"], torch.full((num_codes,), B * H * W / num_codes))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_value_that_is_not_finite_in_one_process_is_an_error_in_all(
    results: dict[int, list[Found]], count: int
) -> None:
    """Or the others would wait for ever for the one that raised; and the codebook is as it was."""
    assert [found["not finite/raised"].tolist() for found in results[count]] == [[True, True, True]] * count


# Different vectors, at random


def drawn_by_hand(vectors: Tensor, eligible: Tensor | None, count: int, orders: list[Tensor]) -> list[Tensor]:
    """Go through the rows in each random order, and take each vector that was not taken yet."""
    found = []
    for order in orders:
        taken: list[tuple[float, ...]] = []
        for row in order.argsort().tolist()[: max(16 * count, 4096)]:
            vector = tuple(vectors[row].tolist())
            if len(taken) < count and vector not in taken and (eligible is None or eligible[row]):
                taken.append(vector)
        found.append(torch.tensor(taken).reshape(-1, vectors.shape[1]))
    return found


@pytest.mark.parametrize("name", list(pools()))
@pytest.mark.parametrize("count", [1, 2, 3])
def test_vectors_are_drawn_as_one_after_the_other_from_the_joined_batch(
    results: dict[int, list[Found]], count: int, name: str
) -> None:
    """The same rows in the same order, however they are divided."""
    vectors, eligible, number = pools()[name]
    seeded(0)
    orders = [torch.randperm(len(vectors)) for _ in range(2)]
    expected = drawn_by_hand(vectors, eligible, number, orders)
    sizes = {"fewer than asked": 15, "two": 2, "none eligible": 0}
    assert [len(each) for each in expected] == [sizes.get(name, number)] * 2
    for found in results[count]:
        for time in range(2):
            assert torch.equal(found[f"draw/{name}/{time}"], expected[time])


def test_a_vector_that_is_there_more_often_comes_sooner() -> None:
    """The law of going through rows in random order: each next one in proportion to its rows; chi-square, 12 pairs."""
    times = torch.tensor([5, 3, 1, 1])
    vectors = torch.arange(4.0).repeat_interleave(times)[:, None]
    torch.manual_seed(0)
    draws = 4000
    found = Counter(tuple(draw_distinct(vectors, 2).flatten().int().tolist()) for _ in range(draws))
    share = (times / times.sum()).tolist()
    law = {(i, j): share[i] * share[j] / (1 - share[i]) for i, j in permutations(range(4), 2)}
    assert sum(law.values()) == pytest.approx(1)
    chi_square = sum((found[pair] - draws * p) ** 2 / (draws * p) for pair, p in law.items())
    assert chi_square < 31.3  # 11 degrees of freedom: p = 0.001
    assert found.keys() <= law.keys()


@pytest.mark.parametrize("shape", [(0, 3), (5, 3)])
def test_none_are_drawn_where_there_are_none_or_none_are_asked_for(shape: tuple[int, int]) -> None:
    assert draw_distinct(torch.randn(shape), 0 if shape[0] else 4).shape == (0, 3)


# How they are spread


@pytest.mark.parametrize("count", [1, 2, 3])
def test_spread_against_numpy(results: dict[int, list[Found]], count: int) -> None:
    """In float64, so that the deviation of vectors far away is no difference of large numbers."""
    for name, z in {"usual": batch(0), "far": batch(1) + 1e4, "equal": torch.full((B, D, H, W), 0.1)}.items():
        values = z.numpy().astype(np.float64)
        for found in results[count]:
            number, deviation, largest = found[f"spread/{name}"].tolist()
            assert number == B * H * W
            assert deviation == pytest.approx(values.std(), rel=1e-6, abs=1e-8)
            assert largest == np.abs(values).max()


def test_spread_of_nothing_is_no_error_where_others_have_something() -> None:
    """Of one process without vectors the largest value is 0, which changes no maximum."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokenizer.processes.sum_of_all", lambda moments: moments + torch.tensor([6.0, 3.0, 7.5]))
        found = Spread.of(torch.empty(0, 3))
    assert (found.count, found.largest) == (2, 0)
    assert found.deviation == pytest.approx(1.0)


# Several forward passes for one step


@pytest.mark.parametrize("update", UPDATES)
def test_a_deferred_codebook_moves_once_a_step_and_as_for_the_joined_batch(update: CodebookUpdate) -> None:
    """Bit for bit, for the parts of a batch are joined in order before anything is added up."""
    whole = train(update, 0, 1)
    for parts in (2, 3, 8):
        found = train(update, 0, 1, parts=parts)
        exact = {name for name in whole if update == "ema" or name.split("/")[1] in ("counts", "revived", "codes")}
        if update == "gradient":
            assert misses_by(whole, found) < TOLERANCE
            exact = {name for name in exact if not name.endswith("counts")}
        assert all(torch.equal(whole[name], found[name]) for name in exact)


def test_until_update_nothing_moves_and_what_is_discarded_never_counts() -> None:
    torch.manual_seed(0)
    learned, fresh = VectorQuantizer(K, D), VectorQuantizer(K, D)
    learned.start(batch(0))
    fresh.load_state_dict(learned.state_dict())
    learned.deferred = fresh.deferred = True
    before = {name: tensor.clone() for name, tensor in learned.state_dict().items()}
    learned.update()
    learned(batch(1))
    learned(batch(2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in learned.state_dict().items())
    learned.discard()
    learned.update()
    assert all(torch.equal(tensor, before[name]) for name, tensor in learned.state_dict().items())
    for each in (learned, fresh):
        torch.manual_seed(1)
        each(batch(3))
        each.update()
        each.update()  # there is nothing left to learn from
    assert float(learned.updates) == 1
    assert all(torch.equal(tensor, fresh.state_dict()[name]) for name, tensor in learned.state_dict().items())
    assert not torch.equal(learned.codebook, before["codebook"])
