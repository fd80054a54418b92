"""`train-prior --attention-every`: its default, the first kernel that goes with it, and that it acts or is refused."""

import json
from pathlib import Path

import pytest

from pipeline.models.loading import load_prior
from pipeline.training.recipes import ATTENTION_EVERY, FIRST_KERNEL, MOST_ATTENDED, PriorSettings
from pipeline.training.train_prior import network_config
from prior import PriorConfig

from ..conftest import Codegrid, Trained
from ..support import digest_of

ROW = (1, MOST_ATTENDED)  # the largest grid that is attended to


def config_of(settings: PriorSettings, grid: tuple[int, int] = (4, 5)) -> PriorConfig:
    return network_config(settings, num_codes=5, num_classes=0, grid=grid)


@pytest.mark.parametrize(
    ("given", "layers", "grid", "every"),
    [
        (None, 6, ROW, ATTENTION_EVERY),
        (None, 6, (1, MOST_ATTENDED + 1), 0),
        (None, ATTENTION_EVERY + 1, ROW, ATTENTION_EVERY),
        (None, ATTENTION_EVERY, ROW, 0),
        (None, 1, ROW, 0),
        (0, 6, ROW, 0),
        (3, 6, (1, MOST_ATTENDED + 1), 3),
        (5, 6, ROW, 5),
    ],
)
def test_attention_and_the_first_kernel(given: int | None, layers: int, grid: tuple[int, int], every: int) -> None:
    """A small first kernel is for networks that reach everything otherwise."""
    config = config_of(PriorSettings(attention_every=given, num_layers=layers), grid)
    assert config.attention_every == every
    assert (config.num_attending > 0) == (every > 0)
    assert config.first_kernel_size == (FIRST_KERNEL if every else PriorConfig(num_codes=2).first_kernel_size)
    assert PriorConfig(num_codes=2).first_kernel_size > FIRST_KERNEL


@pytest.mark.parametrize(("every", "layers"), [(6, 6), (7, 6), (1, 1)])
def test_attention_after_more_layers_than_there_are_is_refused(every: int, layers: int) -> None:
    with pytest.raises(ValueError, match=f"attention_every: expected less than num_layers, which is {layers}, or 0"):
        config_of(PriorSettings(attention_every=every, num_layers=layers))


@pytest.mark.parametrize(("field", "value"), [("attention_every", -1), ("num_layers", 0)])
def test_the_message_names_the_setting_that_is_wrong(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field}: expected .*, got {value}"):
        config_of(PriorSettings(**{"attention_every": 0, field: value}))


def test_the_command_refuses_it_in_one_line_before_it_exports_codes(tmp_path: Path, codegrid: Codegrid) -> None:
    outcome = codegrid("train-prior", "--num-layers", 2, "--attention-every", 2, "--out", tmp_path / "out")
    assert outcome.status in (1, 2)
    assert "attention_every: expected less than num_layers, which is 2, or 0, got 2" in outcome.error_lines[-1]
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_run_from_before_resumes_without_attention(tmp_path: Path, trained: Trained, codegrid: Codegrid) -> None:
    """Neither its config nor its settings name it; its first kernel is the one it has."""
    command = ["train-prior", "--codes", trained.codes, "--channels", 2, "--num-layers", 3]
    before, new = tmp_path / "before", tmp_path / "new"
    assert codegrid(*command, "--attention-every", 0, "--steps", 1, "--out", before).status == 0
    content = json.loads((before / "config.json").read_text("utf-8"))
    del content["config"]["attention_every"], content["training"]["attention_every"], content["checksum"]
    (before / "config.json").write_text(json.dumps(content), encoding="utf-8")
    refused = codegrid(*command, "--steps", 3, "--out", before, "--resume", "--attention-every", 2)
    assert "--resume with attention-every 0, as the run was started, got 2" in refused.error_lines[0]
    outcome = codegrid(*command, "--steps", 3, "--out", before, "--resume", "--attention-every", 0)
    assert (outcome.status, outcome.error_lines) == (0, [])
    assert codegrid(*command, "--attention-every", 0, "--steps", 3, "--out", new).status == 0
    assert load_prior(before).config.attention_every == 0
    assert digest_of(before)["model.safetensors"] == digest_of(new)["model.safetensors"]
