"""G1: what the README says can be done, can be done."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

import cli
from pipeline.codes.export import export_codes
from pipeline.images.glyph_drawing import CLASS_NAMES

from .support import brightness_tokenizer, fill_with_cells, save_prior, save_tokenizer, tiny_prior

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PROGRAMS = ("codegrid ", "python cli.py ")
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
INDENTED = [line.partition(" #")[0].strip() for line in README.splitlines() if line.startswith("    ")]
INLINE = re.findall(r"`([^`\n]+)`", README)
COMMANDS = [line for line in [*INDENTED, *INLINE] if line.startswith(PROGRAMS)]
TORCHRUN = get_args_parser()
LAUNCHES = [line for line in re.sub(r" *\\\n *", " ", README).splitlines() if re.match(r" *(srun )?torchrun ", line)]
SCRIPTS = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
IN_TABLES = [line for line in INLINE if line.split()[0] in cli.cli.commands]


def arguments_of(line: str) -> list[str]:
    for program in PROGRAMS:
        line = line.removeprefix(program)
    return shlex.split(line)


def test_there_is_something_to_check() -> None:
    assert len(COMMANDS) >= 3
    assert PYTHON
    assert IN_TABLES
    assert any("--" in line for line in IN_TABLES)
    assert {arguments_of(line)[0] for line in [*COMMANDS, *IN_TABLES]} >= {"train-tokenizer", "train-prior", "sample"}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_line_is_one_that_the_program_takes(line: str) -> None:
    """Parsed with every value checked, but not run."""
    arguments = arguments_of(line)
    if arguments[0] in ("...", "--help"):
        return
    command = cli.cli.commands[arguments[0]]
    command.make_context(arguments[0], arguments[1:])


@pytest.mark.parametrize("line", LAUNCHES)
def test_a_line_of_torchrun_is_one_that_it_and_the_program_take(line: str) -> None:
    words = shlex.split(line.partition(" #")[0].rstrip(" &"))
    launch = TORCHRUN.parse_args(words[words.index("torchrun") + 1 :])
    if launch.no_python:
        assert launch.training_script == "codegrid"
    else:
        assert (ROOT / launch.training_script).is_file()
    name, *arguments = launch.training_script_args
    cli.cli.commands[name].make_context(name, arguments)


def test_there_are_lines_of_torchrun_for_one_machine_and_for_several() -> None:
    assert {"--standalone" in line for line in LAUNCHES} == {True, False}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_one_that_bash_takes(script: str) -> None:
    assert subprocess.run(["bash", "-n"], input=script, text=True, stderr=subprocess.PIPE).stderr == ""


@pytest.mark.parametrize("line", IN_TABLES)
def test_an_option_in_a_table_is_one_that_the_command_has(line: str) -> None:
    name, *words = line.split()
    known = {option for parameter in cli.cli.commands[name].params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_an_option_anywhere_is_one_that_some_command_has() -> None:
    known = {option for command in cli.cli.commands.values() for p in command.params for option in p.opts}
    named = {word for line in INLINE for word in re.findall(r"(?<!\S)--[a-z][a-z-]*", line)}
    assert len(named) > 10
    known |= {option for action in TORCHRUN._actions for option in action.option_strings}
    assert named <= known | {"--help", "--debug", "--version"}


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks in order, in one namespace, with the checkpoints where a user would have them."""
    monkeypatch.chdir(tmp_path)
    images = fill_with_cells(tmp_path / "images", [f"{name}/{i}.png" for name in CLASS_NAMES for i in range(2)])
    tokenizer, prior = Path("checkpoints/tokenizer"), Path("checkpoints/prior")
    fingerprint = save_tokenizer(tokenizer, brightness_tokenizer(), images, CLASS_NAMES).fingerprint
    save_prior(prior, tiny_prior(num_classes=len(CLASS_NAMES)), fingerprint, CLASS_NAMES)
    for folder in (prior / "codes", Path("codes/train")):
        export_codes(tokenizer, folder, device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    namespace: dict[str, object] = {}
    for number, block in enumerate(PYTHON):
        exec(compile(block, f"README.md, block {number}", "exec"), namespace)


def test_make_targets_exist() -> None:
    named = {word for line in [*INDENTED, *INLINE] for word in re.findall(r"^make ([a-z]+)$", line)}
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert named
    assert named <= targets


def test_links_to_files_of_the_project_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert sum("://" not in link for link in links) > 1
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert missing == []


def test_the_tests_that_the_list_of_traps_names_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "tests" / "README.md").read_text("utf-8")))
    files = [path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(named) > 40
    assert named <= {name for text in files for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}
