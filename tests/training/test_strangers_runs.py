"""Resuming a stranger's run: what is recorded is checked before anything is built from it or continued."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from pipeline.codes.export import export_codes
from pipeline.errors import InputError
from pipeline.models import checkpoint
from pipeline.models.checkpoint import MODEL, TRAINING, load_training, read_info
from pipeline.training.run_folder import RunFolder
from pipeline.training.train_prior import train_prior
from pipeline.training.train_tokenizer import train_tokenizer

from ..conftest import Codegrid, Trained
from ..models.forgery import change, config_of, result_or_line, write_config, write_model, write_training
from ..mutations import mutated_json, watched
from ..support import brightness_tokenizer, digest_of, load_weights, save_tokenizer

KINDS = ("tokenizer", "prior")


@pytest.fixture(autouse=True)
def _one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "ATTEMPTS", 1)


def copy_of(trained: Trained, kind: str, folder: Path) -> Path:
    return Path(shutil.copytree(getattr(trained, kind), folder / kind, dirs_exist_ok=True))


def resume(trained: Trained, kind: str, folder: Path, steps: int | None = 5) -> None:
    run = RunFolder(out=folder, device="cpu", resume=True)
    if kind == "tokenizer":
        train_tokenizer(run, {"steps": steps})
    else:
        train_prior(run, {"steps": steps, "tokenizer": str(trained.tokenizer)}, trained.tokenizer)


def check_refused(trained: Trained, kind: str, folder: Path, steps: int | None = 5) -> str:
    """Assert that the run is refused in one line, and that nothing in it changes; return the line."""
    before = digest_of(folder)
    with pytest.raises((InputError, ValueError)) as error:
        resume(trained, kind, folder, steps)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1500
    assert digest_of(folder) == before
    return str(error.value)


# The settings


SETTINGS: dict[str, list[Any]] = {
    "lr": ["x", None, [1], 0, -1.0, True],
    "steps": [None, "5", 0, -5, 2.5, [5]],
    "batch_size": [None, "4", 0, -1, 2**40, 4.0],
    "seed": [None, "0", -1, 0.5, [0]],
    "precision": [None, 16, "fp8", ["fp32"]],
    "optimizer": [None, 1, "sgd"],
    "compile": [0, "no"],
}
OF_ONE: dict[str, dict[str, list[Any]]] = {
    "tokenizer": {
        "data": [None, 3, ["a"]],
        "data_root": [3, ["a"]],
        "image_size": [3, [8], [8, 8, 8], ["8", "12"], [0, 8], [10**9, 10**9], [-8, 12], "8x12"],
        "channels": ["3", 2.0, [3]],
        "num_codes": [None, "16", 1, 2.0],
        "kl_weight": [None, [0.1], -1.0],
        "likelihood": [None, 3, "other"],
        "codebook_update": [None, 3, "other"],
        "bottleneck": [None, 3, "other"],
    },
    "prior": {
        "codes": [[1], 3, {"a": 1}, [None]],
        "channels": [None, "4", 0],
        "num_layers": [None, "2", 0, 2.0],
        "kernel_size": [None, 2, "3"],
        "dropout": [None, "0", 1.0, -0.1],
    },
}
CASES = [
    (kind, name, value) for kind in KINDS for name, values in (SETTINGS | OF_ONE[kind]).items() for value in values
]


@pytest.mark.parametrize(("kind", "name", "value"), CASES)
def test_a_setting_of_another_type_or_out_of_its_range_is_refused(
    trained: Trained, kind: str, name: str, value: Any, tmp_path: Path
) -> None:
    folder = copy_of(trained, kind, tmp_path)
    change(folder, **{f"training__{name}": value})
    line = check_refused(trained, kind, folder, steps=None if name == "steps" else 5)
    assert name in line
    assert name not in SETTINGS or line.startswith(
        "expected the settings of a training run in the config.json of --out"
    )


def test_settings_that_are_wrong_are_one_line_of_the_program(
    trained: Trained, tmp_path: Path, codegrid: Codegrid
) -> None:
    for kind in KINDS:
        folder = copy_of(trained, kind, tmp_path)
        write_config(folder, config_of(folder) | {"training": {"lr": "x", "steps": None, "codes": [1]}})
        outcome = codegrid(f"train-{kind}", "--out", folder, "--resume", "--steps", 9)
        assert outcome.status == 1
        (line,) = outcome.error_lines
        assert line.startswith("Error: expected the settings of a training run in the config.json of --out, got ")


# The config, the weights and the images


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("tokenizer", {"config__num_residual_layers": 2**31}),
        ("tokenizer", {"config__hidden_channels": 10**12}),
        ("tokenizer", {"config__hidden_channels": 16}),
        ("tokenizer", {"config__num_codes": "16"}),
        ("tokenizer", {"config__other": 1}),
        ("tokenizer", {"config": {}}),
        ("tokenizer", {"preprocessing__height": 16}),
        ("tokenizer", {"preprocessing__channels": 1}),
        ("tokenizer", {"preprocessing": {}}),
        ("prior", {"config__num_layers": 2**31}),
        ("prior", {"config__channels": 10**12}),
        ("prior", {"config__num_codes": 17}),
        ("prior", {"config__num_codes": None}),
        ("prior", {"config__other": 1}),
        ("prior", {"class_names": ["a"]}),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    trained: Trained, kind: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    folder = copy_of(trained, kind, tmp_path)
    change(folder, **fields)
    check_refused(trained, kind, folder)


def test_images_of_another_size_than_the_run_was_started_with_are_refused(
    trained: Trained, tmp_path: Path, grey_folder: Path
) -> None:
    """No forgery: the pictures in the folder have been replaced by grey ones."""
    folder = copy_of(trained, "tokenizer", tmp_path)
    change(folder, training__data=str(grey_folder))
    line = check_refused(trained, "tokenizer", folder)
    assert "expected images of 8x12x3 in" in line
    assert "got images of 8x12x1" in line


def test_a_prior_over_other_codes_is_refused(trained: Trained, tmp_path: Path, grey_folder: Path) -> None:
    """A run over 8 codes, complete and intact, which says that it learns from the 16 of another data set."""
    save_tokenizer(tmp_path / "tokenizer", brightness_tokenizer(8), grey_folder)
    export_codes(tmp_path / "tokenizer", tmp_path / "codes", device="cpu")
    small = {"channels": 4, "num_layers": 1, "steps": 1, "codes": str(tmp_path / "codes")}
    train_prior(RunFolder(out=tmp_path / "prior", device="cpu"), small, tmp_path / "tokenizer")
    change(
        tmp_path / "prior",
        training__codes=str(trained.codes),
        tokenizer_fingerprint=read_info(trained.tokenizer, "tokenizer").fingerprint,
    )
    line = check_refused(trained, "prior", tmp_path / "prior")
    assert "expected 8 codes and 3 classes, as the run in" in line
    assert "got 16 and 3 in" in line


def test_codes_of_other_classes_are_refused(trained: Trained, tmp_path: Path) -> None:
    """As many, with other names: the run would save these for what it learned of those."""
    folder = copy_of(trained, "prior", tmp_path)
    change(folder, class_names=["disc", "line", "star"])
    line = check_refused(trained, "prior", folder)
    assert "expected the classes disc, line, star, as the run in" in line
    assert "got disc, line, été in" in line


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_best_weights_that_are_not_finite_are_refused(trained: Trained, value: float, tmp_path: Path) -> None:
    """They are those of the best evaluation, which the run would save again."""
    folder = copy_of(trained, "prior", tmp_path)
    weights = load_weights(folder)
    name = max(weights, key=lambda name: weights[name].numel())
    write_model(folder, safetensors.torch.save(weights | {name: torch.full_like(weights[name], value)}))
    assert "not finite" in check_refused(trained, "prior", folder)


# The training state


def rewrite_training(folder: Path, tensors: dict[str, Tensor], values: Any) -> None:
    data = safetensors.torch.save(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"values": values}
    )
    write_training(folder, data)


VALUES: dict[str, Any] = {
    "no object": [],
    "no step": {"best": {}},
    "no best": {"step": 3},
    "a step below 0": {"step": -1, "best": {}},
    "a step that is a text": {"step": "3", "best": {}},
    "a step that is none": {"step": None, "best": {}},
    "a step that is a float": {"step": 3.0, "best": {}},
    "a best that is a list": {"step": 3, "best": []},
    "a best without its step": {"step": 3, "best": {"bits_per_code": 1.0}},
    "a best of a later step": {"step": 3, "best": {"step": 4}},
    "a best of texts": {"step": 3, "best": {"step": 3, "nmse": "low"}},
    "a scale of 0": {"step": 3, "best": {"step": 3}, "learning_rate_scale": 0},
    "a scale above 1": {"step": 3, "best": {"step": 3}, "learning_rate_scale": 1e30},
    "an interval without sums": {"step": 3, "best": {"step": 3}, "interval": {"steps": 1, "seconds": 1}},
    "an interval of no steps": {"step": 3, "best": {"step": 3}, "interval": {"steps": 0, "seconds": 1}},
    "an interval that is a list": {"step": 3, "best": {"step": 3}, "interval": [1, 2]},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VALUES)
def test_values_that_are_no_state_are_refused(trained: Trained, kind: str, name: str, tmp_path: Path) -> None:
    folder = copy_of(trained, kind, tmp_path)
    rewrite_training(folder, load_training(folder).tensors, json.dumps(VALUES[name]))
    assert "training" in check_refused(trained, kind, folder)


@pytest.mark.parametrize("values", ["", "{", "[" * 10**5, '{"step": NaN}', "null"])
def test_values_that_are_no_json_are_refused(trained: Trained, values: str, tmp_path: Path) -> None:
    folder = copy_of(trained, "prior", tmp_path)
    rewrite_training(folder, load_training(folder).tensors, values)
    assert TRAINING in check_refused(trained, "prior", folder)


def with_nan(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, math.nan) if tensor.is_floating_point() else tensor.double() * math.nan


TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "longer": lambda tensor: torch.cat([tensor.flatten(), tensor.flatten(), tensor.flatten()]),
    "empty": lambda tensor: tensor.flatten()[:0],
    "in another shape": lambda tensor: tensor[None],
    "of another type": lambda tensor: tensor.long() if tensor.is_floating_point() else tensor.float(),
    "NaN": with_nan,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change_one", TENSORS)
def test_every_tensor_of_the_state_is_checked(trained: Trained, kind: str, change_one: str, tmp_path: Path) -> None:
    """Each in turn; what the numbers of an evaluation are compared with may be of another shape, and is then unused."""
    folder = copy_of(trained, kind, tmp_path)
    state = load_training(folder)
    assert len(state.tensors) > 20
    for name, tensor in state.tensors.items():
        if name == "stage/codes" and change_one != "NaN":
            continue
        rewrite_training(folder, state.tensors | {name: TENSORS[change_one](tensor)}, json.dumps(state.values))
        line = check_refused(trained, kind, folder)
        assert "expected the training state of this run in" in line


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_the_state_must_be_there(trained: Trained, kind: str, tmp_path: Path) -> None:
    """But for what an older version did not save, and the state of a parameter that had no gradient."""
    folder = copy_of(trained, kind, tmp_path)
    state = load_training(folder)
    for name in state.tensors:
        if name in ("stage/codes", "stage/recent") or name.endswith("/momentum"):
            continue
        tensors = {other: tensor for other, tensor in state.tensors.items() if other != name}
        rewrite_training(folder, tensors, json.dumps(state.values))
        check_refused(trained, kind, folder)


@pytest.mark.parametrize(
    "name",
    [
        "model/more",
        "optimizer/adam/0/more",
        "optimizer/adam/9999/exp_avg",
        "optimizer/adam/-1/exp_avg",
        "optimizer/adam/x/exp_avg",
        "optimizer/other/0/exp_avg",
        "optimizer/adam",
        "optimizer/a/b/c/d",
        "interval/loss",
    ],
)
def test_a_tensor_that_is_of_no_run_is_refused(trained: Trained, name: str, tmp_path: Path) -> None:
    for kind in KINDS:
        folder = copy_of(trained, kind, tmp_path)
        state = load_training(folder)
        rewrite_training(folder, state.tensors | {name: torch.zeros(())}, json.dumps(state.values))
        check_refused(trained, kind, folder)


@pytest.mark.parametrize("shape", [(2, 3), (1, 1, 1), (4, 50, 50)])
def test_codes_of_another_shape_are_as_good_as_none(trained: Trained, shape: tuple[int, ...], tmp_path: Path) -> None:
    """They tell how many codes changed between two evaluations: all, then."""
    folder = copy_of(trained, "tokenizer", tmp_path)
    state = load_training(folder)
    codes = {"stage/codes": torch.zeros(shape, dtype=torch.int64)}
    rewrite_training(folder, state.tensors | codes, json.dumps(state.values))
    resume(trained, "tokenizer", folder)
    assert load_training(folder).values["best"]["codes_changed"] <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_any_values(trained: Trained, kind: str, tmp_path: Path) -> None:
    """A state that is accepted is continued to a finite end."""
    folder = copy_of(trained, kind, tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    state = load_training(folder)
    ended = []

    @settings(max_examples=80, suppress_health_check=list(HealthCheck))
    @given(data=mutated_json(state.values))
    def check(data: bytes) -> None:
        for name, content in before.items():
            (folder / name).write_bytes(content)
        rewrite_training(folder, state.tensors, data.decode())
        if result_or_line(lambda: resume(trained, kind, folder, steps=4)) is None:
            assert all(bool(tensor.isfinite().all()) for tensor in load_weights(folder).values() if tensor.dim())
            ended.append(data)

    check()
    assert ended


@pytest.mark.parametrize("kind", KINDS)
def test_any_config_of_a_run(trained: Trained, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused, or continued; sources and folders that it names are only ever read."""
    # some of the configs ask for it, which takes a minute
    monkeypatch.setattr("pipeline.training.trial.compile_networks", lambda *networks: None)
    folder = copy_of(trained, kind, tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    content = config_of(folder)

    @settings(max_examples=80, suppress_health_check=list(HealthCheck))
    @given(data=mutated_json(content))
    def check(data: bytes) -> None:
        for name, written in before.items():
            (folder / name).write_bytes(written)
        try:
            write_config(folder, json.loads(data))
        except (ValueError, RecursionError):
            return
        if result_or_line(lambda: resume(trained, kind, folder, steps=4), (InputError, ValueError)) is None:
            assert all(bool(tensor.isfinite().all()) for tensor in load_weights(folder).values() if tensor.dim())

    check()


@pytest.mark.parametrize("name", [MODEL, TRAINING])
def test_a_file_with_a_long_tail_of_nothing_is_refused(trained: Trained, name: str, tmp_path: Path) -> None:
    """8 GB that take no space on the disk, and none in memory."""
    folder = copy_of(trained, "prior", tmp_path)
    os.truncate(folder / name, 2**33)
    with watched() as seen, pytest.raises(InputError, match=r"8,589,934,592 bytes, where its header needs"):
        resume(trained, "prior", folder)
    assert seen.peak < 64 * 2**20


def test_a_run_of_another_network_is_no_state_of_this_one(trained: Trained, tmp_path: Path) -> None:
    """Weights and config fit each other; the training state is that of another model."""
    folder = copy_of(trained, "tokenizer", tmp_path)
    save_tokenizer(tmp_path / "other", brightness_tokenizer(), trained.images)
    other = config_of(tmp_path / "other")
    write_model(folder, (tmp_path / "other" / MODEL).read_bytes())
    change(folder, config=other["config"], preprocessing=other["preprocessing"])
    check_refused(trained, "tokenizer", folder)
