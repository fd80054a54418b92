"""The house reads top-down: cli -> pipeline -> {tokenizer, prior} -> torch; nothing is a pickle; `--help` is quick.

Inside `pipeline/` a folder (a room) imports only from itself and from the rooms before it in ROOMS.
"""

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
MODULES = ("cli", "codegrid")
SOURCES = [
    *sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")),
    *(ROOT / f"{module}.py" for module in MODULES),
]
ROOMS = (  # of pipeline/, each of which may import those before it
    *("errors", "runtime", "images", "models", "codes", "generation", "evaluation", "training", "compression"),
    *("report", "server"),
)
WITHOUT_MODELS = {"errors", "runtime", "images"}  # which import neither stage
LIBRARIES = {"torch", "torchvision", "einops", "numpy", "PIL", "safetensors", "tqdm", "platformdirs"}
EXTRAS = {  # codegrid[parquet], codegrid[fidelity]
    "pipeline.codes.tables": {"pyarrow"},
    "pipeline.evaluation.inception": {"torch_fidelity"},
}
TOP_LEVEL = {
    *("tokenizer", "prior", "pipeline", "cli.py", "codegrid.py", "checkpoints", "docs", "tests", "setup.cfg"),
    *("README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "Makefile", "benchmarks", ".ci", ".gitignore"),
}
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def module_of(path: Path) -> str:
    """Return the name that a file is imported by: "pipeline.codes.writer", "pipeline" for its `__init__.py`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, module: str, *, is_package: bool = False) -> set[str]:
    """Return the full name of every module that a module imports (or imports from), under `if` and `def` too."""
    package = module if is_package else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base} if node.module else {f"{base}.{alias.name}" for alias in node.names}
    return found


def imports_of_file(path: Path) -> set[str]:
    return imports_of(path.read_text("utf-8"), module_of(path), is_package=path.name == "__init__.py")


def top(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def room_of(module: str) -> str | None:
    """Return the room of a module of `pipeline`; None for what is not in one."""
    parts = module.split(".")
    return parts[1] if parts[0] == "pipeline" and len(parts) > 1 else None


def pickling_in(source: str) -> Iterator[str]:
    """Yield whatever writes or reads a pickle; `numpy.save` does unless told otherwise."""
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
        "import torch.nn\n"
        "def f():\n    from pipeline.codes.shard import x\n"
        "if 0:\n    from . import y\n"
        "from ..errors import z\nfrom .shard import w\nfrom .. import v\n"
    )
    assert imports_of(source, "pipeline.codes.writer") == {
        *("torch.nn", "pipeline.codes.shard", "pipeline.codes.y", "pipeline.errors", "pipeline.v"),
    }
    assert imports_of("from .codes.dataset import x", "pipeline", is_package=True) == {"pipeline.codes.dataset"}
    assert list(pickling_in("torch.load(p)")) == ["torch.load"]
    assert list(pickling_in("np.save(p, a); np.load(p, allow_pickle=True)")) == [
        "np.save without allow_pickle=False",
        "np.load without allow_pickle=False",
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_from_the_floor_below_only(path: Path) -> None:
    module = module_of(path)
    below = {
        "tokenizer": {"torch", "einops"},
        "prior": {"torch", "einops"},
        "pipeline": LIBRARIES | (set() if room_of(module) in WITHOUT_MODELS else set(STAGES)),
        "cli": {"click", "pipeline"},
        "codegrid": set(PACKAGES),
    }[module.partition(".")[0]]
    found = top(imports_of_file(path))
    assert found - sys.stdlib_module_names - below - EXTRAS.get(module, set()) - top({module}) == set()
    assert found & PICKLERS == set()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "pipeline").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT / "pipeline"))
)
def test_a_room_imports_from_itself_and_those_before_it_only(path: Path) -> None:
    room = room_of(module_of(path))
    assert room is None or room in ROOMS, "a room that ROOMS does not name: where does it belong?"
    reach = ROOMS if room is None else ROOMS[: ROOMS.index(room) + 1]
    imported = {room_of(name) for name in imports_of_file(path) if name.startswith("pipeline")}
    assert imported - set(reach) == set()


def test_every_file_of_the_pipeline_is_in_a_room_and_the_rooms_load_nothing() -> None:
    """What is in a sub-package's `__init__.py` would be loaded with any file of it, and by `--help`."""
    assert {path.name for path in (ROOT / "pipeline").glob("*.py")} == {"__init__.py", "errors.py"}
    for folder in {path.parent for path in (ROOT / "pipeline").glob("*/*.py")}:
        assert (folder / "__init__.py").read_text("utf-8") == ""


def test_every_package_is_installed(tmp_path: Path) -> None:
    """setup.cfg finds the packages; what it finds is every folder with Python files, and no other."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    from setuptools import find_packages

    include = setup["options.packages.find"]["include"].split()
    found = set(find_packages(str(ROOT), include=include))
    folders = {path.parent.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert setup["options"]["packages"] == "find:"
    assert found == {".".join(folder.parts) for folder in folders}
    assert set(setup["options"]["py_modules"].replace(",", " ").split()) == set(MODULES)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_reads_or_writes_a_pickle(path: Path) -> None:
    assert list(pickling_in(path.read_text("utf-8"))) == []


def test_what_is_imported_is_declared() -> None:
    """PIL is the module of pillow; all others are named as their distribution, with _ in place of -."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].split()
    for extra in ("parquet", "fidelity"):
        lines += setup["options.extras_require"][extra].split()
    declared = {line.partition(">")[0].replace("pillow", "PIL").replace("-", "_") for line in lines}
    found = set().union(*(top(imports_of_file(path)) for path in SOURCES))
    assert found - sys.stdlib_module_names - {*PACKAGES, *MODULES} == declared


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
        "import contextlib, io, sys, cli, codegrid\n"
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
        (
            "codegrid",
            "TokenizerConfig VQVAE PriorConfig GatedPixelCNN sample_codes CodeDataset ImagePipeline load_prior",
        ),
    ],
)
def test_the_public_names_are_there(module: str, names: str) -> None:
    package = importlib.import_module(module)
    assert set(names.split()) <= set(package.__all__)
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError, match="nosuch"):
        _ = package.nosuch


def test_codegrid_offers_the_names_of_the_three_packages() -> None:
    """The same objects, under the name of the distribution."""
    import codegrid

    packages = [importlib.import_module(package) for package in PACKAGES]
    assert sorted(codegrid.__all__) == sorted(name for package in packages for name in package.__all__)
    assert all(getattr(codegrid, name) is getattr(package, name) for package in packages for name in package.__all__)
    assert {*codegrid.__all__, "__version__"} <= set(dir(codegrid))
    assert codegrid.__version__ == importlib.import_module("cli").__version__
