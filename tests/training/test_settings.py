"""Settings of a run: override, else what the resumed run has, else the default; and where the help takes them from."""

import re
from dataclasses import fields
from typing import Any

import pytest

import cli
from pipeline.errors import InputError
from pipeline.training.recipes import LARGE_TOKENIZER, DecoderSettings, PriorSettings, TokenizerSettings
from pipeline.training.settings import recorded, resolve

STAGES = {"train-tokenizer": TokenizerSettings, "train-decoder": DecoderSettings, "train-prior": PriorSettings}
CHANGEABLE = {"accumulate", "steps", "precision", "compile", "sharp", "data_root", "tokenizer"}


def another(name: str, value: Any) -> Any:
    """Return another value of a setting than `value`."""
    others = {"precision": "bf16", "optimizer": "adam", "image_size": (8, 12)}
    numbers = {"steps": 7, "channels": 3, "compile": True, "label_dropout": 0.25, "attention_every": 3}
    if name in others or (name in numbers and value is None):
        return (others | numbers)[name]
    return {bool: lambda: not value, int: lambda: value + 1, float: lambda: value + 0.5}.get(
        type(value), lambda: "another"
    )()


@pytest.mark.parametrize("settings_class", STAGES.values())
def test_an_override_replaces_the_default_and_none_does_not(settings_class: type) -> None:
    default = settings_class()
    for name, value in vars(default).items():
        override = another(name, value)
        assert vars(resolve(settings_class, {name: override}, None)) == {**vars(default), name: override}
        assert resolve(settings_class, {name: None}, None) == default


@pytest.mark.parametrize("settings_class", STAGES.values())
def test_a_resumed_run_keeps_its_settings_and_changes_those_that_may(settings_class: type) -> None:
    """Of every setting of both stages and of the decoder."""
    started = settings_class(**{name: another(name, value) for name, value in vars(settings_class()).items()})
    assert resolve(settings_class, {}, recorded(started)) == started
    assert resolve(settings_class, vars(started), recorded(started)) == started
    for name, default in vars(settings_class()).items():
        override = default if default is not None else 9 if name == "steps" else "elsewhere"
        if name == "precision":  # what "auto" came to was recorded
            assert resolve(settings_class, {name: "auto"}, recorded(started)) == started
            override = "fp32"
        if name in CHANGEABLE:
            resolved = resolve(settings_class, {name: override}, recorded(started))
            assert vars(resolved) == {**vars(started), name: override}
        else:
            with pytest.raises(InputError, match=rf"--resume with {name.replace('_', '-')} .*got {override}; omit"):
                resolve(settings_class, {name: override}, recorded(started))


def test_a_setting_that_older_versions_recorded_and_this_one_lacks_is_ignored() -> None:
    assert resolve(PriorSettings, {}, {"steps": 3, "no_such_setting": 1}) == PriorSettings(steps=3)


def test_a_size_is_the_same_before_and_after_json() -> None:
    recorded_size = recorded(TokenizerSettings(image_size=(8, 12)))["image_size"]
    assert recorded_size == [8, 12]
    resolve(TokenizerSettings, {"image_size": (8, 12)}, {"image_size": recorded_size})
    with pytest.raises(InputError, match="--resume with image-size"):
        resolve(TokenizerSettings, {"image_size": (12, 8)}, {"image_size": recorded_size})


@pytest.mark.parametrize(
    ("settings_class", "name", "before", "now", "same"),
    [
        (TokenizerSettings, "data", "{cwd}/mnist", "./mnist", True),
        (TokenizerSettings, "data", "{cwd}/mnist", "mnist", False),  # the source of that name, and a folder
        (TokenizerSettings, "data", "mnist", "mnist", True),
        (PriorSettings, "codes", "{cwd}/codes", ["codes/"], True),
        (PriorSettings, "codes", ["{cwd}/a", "{cwd}/b"], ["a", "b"], True),
        (PriorSettings, "codes", ["{cwd}/a", "{cwd}/b"], ["b", "a"], False),
        (PriorSettings, "codes", None, ["a"], False),
    ],
)
def test_paths_are_compared_by_where_they_lead(
    tmp_path: Any, settings_class: type, name: str, before: Any, now: Any, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fill = lambda path: path.format(cwd=tmp_path)  # noqa: E731
    before = [fill(path) for path in before] if isinstance(before, list) else before and fill(before)
    if same:
        assert getattr(resolve(settings_class, {name: now}, {name: before}), name) == before
    else:
        with pytest.raises(InputError, match=f"--resume with {name} "):
            resolve(settings_class, {name: now}, {name: before})


# The help of the command line


@pytest.mark.parametrize("command", STAGES)
def test_the_help_shows_the_default_of_every_setting(command: str) -> None:
    """A default of None, as of the size of images, is described in words."""
    shown = {option.name: option.help or "" for option in cli.cli.commands[command].params}  # type: ignore[attr-defined]
    flags = ("compile", "sharp")
    settings = [field.name for field in fields(STAGES[command]) if field.name in shown and field.name not in flags]
    assert len(settings) >= 8
    for name in settings:
        (default_text,) = re.findall(r"\[default: (.+)\]", shown[name]) or [""]
        position = {"train-tokenizer": 0, "train-decoder": 0, "train-prior": -1}[command]
        value = re.sub(r" in (stage one|two)$", "", default_text.split(", ")[position])
        default = getattr(STAGES[command](), name)
        if isinstance(default, (int, float)):
            assert float(value) == default, name
        elif default is not None:
            assert value == default, name
        else:
            assert name in (
                "data_root",
                "image_size",
                "channels",
                "codes",
                "tokenizer",
                "label_dropout",
                "attention_every",
                *(("data", "steps") if command == "train-decoder" else ()),
            )


# Recipes


def test_the_large_recipe_departs_in_its_residual_blocks_alone() -> None:
    """benchmarks/README.md: six residual blocks of 64 inner channels on either side, else the same."""
    default = vars(TokenizerSettings())
    changed = {name: value for name, value in vars(LARGE_TOKENIZER).items() if value != default[name]}
    assert changed == {"num_residual_layers": 6, "residual_channels": 64}
