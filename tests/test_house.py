"""The house reads top-down: cli -> pipeline -> {tokenizer, prior} -> torch; nothing is a pickle; `--help` is quick."""

import ast
import configparser
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = ("tokenizer", "prior")
PACKAGES = (*STAGES, "pipeline")
SOURCES = [*sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")), ROOT / "cli.py"]
TOP_LEVEL = {
    *("tokenizer", "prior", "pipeline", "cli.py", "checkpoints", "docs", "tests", "setup.cfg"),
    *("README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "Makefile", "benchmarks", ".ci", ".gitignore"),
}
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def imports_of(source: str, package: str) -> set[str]:
    """The top-level names of everything imported anywhere in a file of `package`, under `if` and `def` too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.add(package if node.level == 1 else "..")
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def pickling_in(source: str) -> Iterator[str]:
    """Whatever writes or reads a pickle; `numpy.save` does unless told otherwise."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        called, options = ast.unparse(node.func), [ast.unparse(keyword) for keyword in node.keywords]
        if called in ("torch.load", "torch.save"):
            yield called
        if called in ("np.save", "np.load", "numpy.save", "numpy.load") and "allow_pickle=False" not in options:
            yield f"{called} without allow_pickle=False"


def test_the_two_readers_see_what_they_look_for() -> None:
    source = (
        "import torch.nn\ndef f():\n    from pipeline.codes import x\nif 0:\n    from . import y\nfrom ..cli import z"
    )
    assert imports_of(source, "prior") == {"torch", "pipeline", "prior", ".."}
    assert list(pickling_in("torch.load(p)")) == ["torch.load"]
    assert list(pickling_in("np.save(p, a); np.load(p, allow_pickle=True)")) == [
        "np.save without allow_pickle=False",
        "np.load without allow_pickle=False",
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_from_the_floor_below_only(path: Path) -> None:
    package = path.parent.name if path.parent != ROOT else "cli"
    below = {
        "tokenizer": {"torch", "einops"},
        "prior": {"torch", "einops"},
        "pipeline": {"torch", "torchvision", "einops", "numpy", "PIL", "safetensors", "tqdm", "platformdirs", *STAGES},
        "cli": {"click", "pipeline"},
    }[package]
    if path.name == "code_tables.py":
        below.add("pyarrow")  # the extra codegrid[parquet]
    found = imports_of(path.read_text("utf-8"), package)
    assert found - sys.stdlib_module_names - below - {package} == set()
    assert found & PICKLERS == set()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_reads_or_writes_a_pickle(path: Path) -> None:
    assert list(pickling_in(path.read_text("utf-8"))) == []


def test_what_is_imported_is_declared() -> None:
    """PIL is the module of pillow; all others are named as their distribution."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = [*setup["options"]["install_requires"].split(), *setup["options.extras_require"]["parquet"].split()]
    declared = {line.partition(">")[0].replace("pillow", "PIL") for line in lines}
    found = set().union(*(imports_of(path.read_text("utf-8"), path.parent.name) for path in SOURCES))
    assert found - sys.stdlib_module_names - {*PACKAGES, "cli"} == declared


def test_the_top_level_holds_what_people_expect() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    found = {line.strip('"').partition("/")[0] for line in listed.stdout.splitlines()}
    assert found - TOP_LEVEL == set()
    assert {"tokenizer", "prior", "pipeline", "cli.py", "tests", "setup.cfg"} <= found


def test_help_never_imports_torch() -> None:
    code = (
        "import contextlib, io, sys, cli\n"
        "for command in ['', *cli.cli.commands]:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as shown:\n"
        "        cli.main([*command.split(), '--help'])\n"
        "    assert 'Usage: codegrid' in shown.getvalue(), command\n"
        "heavy = {'torch', 'torchvision', 'numpy', 'PIL', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_help_of_the_file_as_a_program_never_imports_torch() -> None:
    command = [sys.executable, "-X", "importtime", "cli.py", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    assert "click" in imported
    assert "torch" not in imported


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("tokenizer", "TokenizerConfig VQVAE VectorQuantizer"),
        ("prior", "PriorConfig GatedPixelCNN sample_codes"),
        ("pipeline", "CodeDataset ImagePipeline load_tokenizer load_prior"),
    ],
)
def test_the_public_names_are_there(module: str, names: str) -> None:
    package = importlib.import_module(module)
    assert set(names.split()) <= set(package.__all__)
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError, match="nosuch"):
        _ = package.nosuch
