"""A stranger's checkpoint can at worst be refused: in one line, in little memory and time, whatever its files hold."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import load_prior, load_tokenizer
from pipeline.errors import InputError
from pipeline.evaluation.evaluate import evaluate
from pipeline.models import checkpoint
from pipeline.models.checkpoint import CONFIG, MODEL
from pipeline.models.restore import restore
from tokenizer import TokenizerConfig
from tokenizer.networks import Decoder

from ..decoders import save_decoder, wide_decoder
from ..mutations import DEEP, mutated_bytes, mutated_json, watched
from ..support import ROOT, bits_of, brightness_tokenizer, load_weights, save_prior, save_tokenizer, tiny_prior
from .forgery import (
    DELETED,
    change,
    config_of,
    join_file,
    result_or_line,
    split_file,
    write_config,
    write_model,
    write_sparse,
)

NAMES = ("disc", "line", "été")
MEMORY = 64 * 2**20  # bytes; a hundred times the files
KINDS = ("tokenizer", "decoder", "prior")
LOAD: dict[str, Callable[[Path], torch.nn.Module]] = {
    "tokenizer": load_tokenizer,
    "decoder": lambda folder: restore(folder, "decoder", TokenizerConfig, Decoder)[0],
    "prior": load_prior,
}


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory, grey_folder: Path) -> Path:
    """A tokenizer, a decoder and a prior, in folders of these names."""
    folder = tmp_path_factory.mktemp("valid")
    info = save_tokenizer(folder / "tokenizer", brightness_tokenizer(), grey_folder, NAMES)
    save_decoder(folder / "decoder", wide_decoder(), info)
    save_prior(folder / "prior", tiny_prior(num_classes=3), info.fingerprint, NAMES)
    return folder


@pytest.fixture(autouse=True)
def _one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "ATTEMPTS", 1)


def copy_of(valid: Path, kind: str, folder: Path) -> Path:
    return Path(shutil.copytree(valid / kind, folder / kind, dirs_exist_ok=True))


def check_refused(folder: Path, kind: str) -> None:
    """Assert that loading ends in one short line that names a file of the folder, or what is wrong with the number."""
    with watched() as seen, pytest.raises(InputError) as error:
        LOAD[kind](folder)
    line = str(error.value)
    assert "\n" not in line
    assert len(line) < 1500
    assert str(folder) in line
    assert seen.peak < MEMORY
    assert all(path.is_relative_to(folder) for path in seen.opened)


# One value at a time

HUGE = 10**12
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"prior {name} {value}": ("prior", {f"config__{name}": value})
        for name in ("num_layers", "channels", "kernel_size", "first_kernel_size", "num_codes", "output_channels")
        for value in (2**31, 2**31 + 1, HUGE + 1, 2**63, 10**400, -1, 0, True, 2.0, "3", None, [3], {})
    },
    **{
        f"tokenizer {name} {value}": ("tokenizer", {f"config__{name}": value})
        for name in ("hidden_channels", "num_residual_layers", "in_channels", "downsample", "num_codes", "code_dim")
        for value in (2**31, 2**31 + 1, HUGE + 1, 2**63, 10**400, -1, True, 2.0, "3", None, [3], {})
    },
    **{
        f"decoder {name} {value}": ("decoder", {f"config__{name}": value})
        for name in ("hidden_channels", "num_residual_layers", "in_channels", "downsample", "code_dim")
        for value in (2**31, HUGE + 1, 10**400, -1, True, 2.0, "3", None)
    },
    **{
        f"tokenizer {name} {value}": ("tokenizer", {f"config__{name}": value})
        for name in ("kl_weight", "commitment_weight", "ema_decay", "revival_threshold", "data_variance")
        for value in ([0.1], "0.1", None, -1, 10**400, "<infinity>", float("nan"), False)
    },
    **{
        f"prior attention_every {value}": ("prior", {"config__attention_every": value})
        for value in (1, -1, True, 2.0, "3", None, [3], {})
    },
    **{
        f"prior label_dropout {value}": ("prior", {"config__label_dropout": value})
        for value in (0.1, 1, -1, 10**400, True, "0.1", None, [0.1], "<infinity>", float("nan"))
    },
    "as many layers as tensors are possible": ("prior", {"config__num_layers": 4_000}),
    "a kernel larger than any memory": ("prior", {"config__kernel_size": 65_535, "config__channels": 65_536}),
    "classes without names": ("prior", {"config__num_classes": 2**31}),
    "fewer names": ("prior", {"class_names": ["a"]}),
    "no names": ("prior", {"class_names": []}),
    "numbers as names": ("prior", {"class_names": [1, 2, 3]}),
    "an object of names": ("prior", {"class_names": {"a": 0, "b": 1, "c": 2}}),
    "null for a name": ("tokenizer", {"class_names": [None]}),
    "a text of names": ("tokenizer", {"class_names": "abc"}),
    "another bottleneck": ("tokenizer", {"config__bottleneck": "other"}),
    "an unknown field of a decoder": ("decoder", {"config__other": 1}),
    "a decoder in place of a tokenizer": ("tokenizer", {"kind": "decoder"}),
    "no bottleneck": ("tokenizer", {"config__bottleneck": None}),
    "a list of updates": ("tokenizer", {"config__codebook_update": ["ema"]}),
    "an unknown field": ("tokenizer", {"config__other": 1}),
    "a long unknown field": ("prior", {"config__" + "x" * 10_000: 1}),
    "a list as config": ("tokenizer", {"config": [1]}),
    "no config": ("prior", {"config": DELETED}),
    "no codes": ("prior", {"config__num_codes": DELETED}),
    "deep lists": ("tokenizer", {"training": "<deep list>"}),
    **{f"preprocessing {value}": ("tokenizer", {"preprocessing": value}) for value in ([], None, {}, "8x12", 3)},
    **{
        f"preprocessing {name} {value}": (kind, {f"preprocessing__{name}": value})
        for kind in KINDS
        for name in ("height", "width", "channels")
        for value in (0, -8, HUGE, 10**400, "8", 8.0, None, DELETED, True)
    },
    "sizes that do not fit the cells": ("tokenizer", {"preprocessing__height": 7}),
    "another number of channels": ("tokenizer", {"preprocessing__channels": 3}),
    **{f"step {value}": ("tokenizer", {"step": value}) for value in (-1, "7", None, 7.0, True, [7], DELETED)},
    **{f"fingerprint {value}": ("prior", {"fingerprint": value}) for value in (1, None, "", "0" * 64, ["a"])},
    **{f"training {value}": ("prior", {"training": value}) for value in ([], None, "x", 3, DELETED)},
    **{f"metrics {value}": ("prior", {"metrics": value}) for value in ([], None, {"a": "b"}, {"a": None}, 3)},
    **{f"versions {value}": ("prior", {"versions": value}) for value in ([], None, {"torch": 2})},
    **{f"kind {value}": ("prior", {"kind": value}) for value in (1, None, "tokenizer", "x\n\x1b[2J" * 99, DELETED)},
    **{f"version {value}": ("prior", {"format_version": value}) for value in (3, 0, "2", None, 2.0, 10**400, True)},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_with_one_absurd_value_is_refused(valid: Path, name: str, tmp_path: Path) -> None:
    kind, fields = CONFIGS[name]
    folder = copy_of(valid, kind, tmp_path)
    change(folder, **fields)
    check_refused(folder, kind)


TEXTS = {
    "empty": b"",
    "not UTF-8": b'{"kind": "\xff"}',
    "UTF-16": json.dumps({"kind": "prior"}).encode("utf-16"),
    "brackets": b"[" * 10**5,
    "closed brackets": b"[" * DEEP + b"]" * DEEP,
    "objects": b'{"a":' * 10**5,
    "many digits": b'{"step": ' + b"9" * 10**5 + b"}",
    "NaN": b'{"step": NaN}',
    "too large": b"[" + b"0," * 2**23 + b"0]",
    "a text": b'"prior"',
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_config_that_is_no_json_is_refused(valid: Path, text: str, tmp_path: Path) -> None:
    for kind in KINDS:
        folder = copy_of(valid, kind, tmp_path)
        (folder / CONFIG).write_bytes(TEXTS[text])
        check_refused(folder, kind)


@pytest.mark.parametrize("value", [7, None, ["glyphs"], {"a": 1}, True, DELETED])
@pytest.mark.parametrize("field", ["data", "data_root"])
def test_a_source_that_is_no_text_is_refused(valid: Path, field: str, value: Any, tmp_path: Path) -> None:
    if field == "data_root" and (value is None or value is DELETED):
        return  # then there is none
    folder = copy_of(valid, "tokenizer", tmp_path)
    change(folder, **{f"training__{field}": value})
    with pytest.raises(InputError, match="name them with --data"):
        evaluate(folder, device="cpu")


# Weights


def tensors_but(change_one: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], bytes]:
    """Return a function: a checkpoint -> its weights, of which the largest is changed."""

    def write(folder: Path) -> bytes:
        tensors = load_weights(folder)
        name = max(tensors, key=lambda name: tensors[name].numel())
        return safetensors.torch.save(tensors | {name: change_one(tensors[name]).contiguous()})

    return write


def header_but(change_header: Callable[[dict[str, Any]], Any], numbers: bytes | None = None) -> Callable[[Path], bytes]:
    """Return a function: a checkpoint -> its weights, whose header is changed."""

    def write(folder: Path) -> bytes:
        header, own = split_file((folder / MODEL).read_bytes())
        changed = change_header(header)
        return join_file(header if changed is None else changed, own if numbers is None else numbers)

    return write


def first_of(header: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = next(entry for name, entry in header.items() if name != "__metadata__" and entry["shape"])
    return entry


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[0] = torch.nan
    return tensor


def with_infinity(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, torch.inf)


EMPTY = {"dtype": "F32", "shape": [0, 2**40, 2**20], "data_offsets": [0, 0]}
WEIGHTS: dict[str, Callable[[Path], bytes]] = {
    "NaN": tensors_but(with_nan),
    "infinity": tensors_but(with_infinity),
    "float64": tensors_but(torch.Tensor.double),
    "bfloat16": tensors_but(torch.Tensor.bfloat16),
    "integers": tensors_but(torch.Tensor.long),
    "another shape": tensors_but(lambda tensor: tensor[:1]),
    "one dimension": tensors_but(torch.Tensor.flatten),
    "empty": tensors_but(lambda tensor: tensor[:0]),
    "nothing": lambda folder: safetensors.torch.save({}),
    "one is missing": lambda folder: safetensors.torch.save(dict(list(load_weights(folder).items())[1:])),
    "one too many": lambda folder: safetensors.torch.save(load_weights(folder) | {"x" * 9_999: torch.zeros(1)}),
    "an empty one of a huge shape": header_but(lambda header: header.update(more=EMPTY)),
    "empty ones of a huge shape in their place": header_but(
        lambda header: {name: EMPTY for name in header if name != "__metadata__"}, numbers=b""
    ),
    "very many": header_but(lambda header: {f"{i}": EMPTY for i in range(40_000)}, numbers=b""),
    "no file": lambda folder: b"",
    "seven bytes": lambda folder: bytes(7),
    "a header beyond the file": lambda folder: (2**40).to_bytes(8, "little") + b"{}",
    "a header beyond all numbers": lambda folder: b"\xff" * 8 + b"{}",
    "a header that is not UTF-8": lambda folder: join_file(b'{"\xff": 1}', b""),
    "a header that is a list": lambda folder: join_file([1, 2], b""),
    "a header of brackets": lambda folder: join_file(b"[" * 10**5, b""),
    "a header of closed brackets": lambda folder: join_file(b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}", b""),
    "an entry that is a number": header_but(lambda header: header.update(more=3)),
    "an entry without a shape": header_but(lambda header: first_of(header).pop("shape")),
    "an unknown type": header_but(lambda header: first_of(header).update(dtype="F4")),
    "a type that is a list": header_but(lambda header: first_of(header).update(dtype=["F32"])),
    "a shape below 0": header_but(lambda header: first_of(header).update(shape=[-1, -4])),
    "a shape beyond all numbers": header_but(lambda header: first_of(header).update(shape=[2**62, 2**62])),
    "a shape of many digits": header_but(lambda header: first_of(header).update(shape=[10**400])),
    "a shape of floats": header_but(lambda header: first_of(header).update(shape=[2.0])),
    "offsets below 0": header_but(lambda header: first_of(header).update(data_offsets=[-8, 0])),
    "offsets beyond the file": header_but(lambda header: first_of(header).update(data_offsets=[2**40, 2**40 + 8])),
    "offsets in reverse": header_but(lambda header: first_of(header).update(data_offsets=[8, 0])),
    "one offset": header_but(lambda header: first_of(header).update(data_offsets=[0])),
    "all at the same place": header_but(
        lambda header: {
            name: entry | {"data_offsets": [0, entry["data_offsets"][1] - entry["data_offsets"][0]]}
            for name, entry in header.items()
            if name != "__metadata__"
        }
    ),
    "metadata that is a list": header_but(lambda header: header.update(__metadata__=[1])),
    "a byte too many": lambda folder: (folder / MODEL).read_bytes() + b"\0",
    "a byte too few": lambda folder: (folder / MODEL).read_bytes()[:-1],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_not_those_of_the_model_are_refused(valid: Path, kind: str, name: str, tmp_path: Path) -> None:
    folder = copy_of(valid, kind, tmp_path)
    write_model(folder, WEIGHTS[name](folder))
    check_refused(folder, kind)


def huge_entry(size: int) -> bytes:
    return join_file({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}, b"")


SPARSE = {
    "a header of 2 GB": ((2**31).to_bytes(8, "little") + b"{", 2**31 + 8),
    "a header of 8 GB": ((2**33).to_bytes(8, "little") + b"{", 2**33 + 8),
    "a header of zeros": ((2**22).to_bytes(8, "little"), 2**31),
    "zeros": (b"", 2**33),
    "a tensor of 2 GB": (huge_entry(2**31), 2**31 + len(huge_entry(2**31))),
    "a tensor of 1 TB": (huge_entry(2**40), 2**40 + len(huge_entry(2**40))),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SPARSE)
def test_a_file_that_is_larger_than_what_is_in_it_is_refused(valid: Path, kind: str, name: str, tmp_path: Path) -> None:
    """Its hash is never computed: what the header says is compared with the config first."""
    folder = copy_of(valid, kind, tmp_path)
    write_sparse(folder, *SPARSE[name])
    check_refused(folder, kind)


CHILD = """
import resource, signal, sys
from contextlib import suppress
from pathlib import Path
import torch
from pipeline.errors import InputError
from pipeline.models import checkpoint
from tests.models.test_strangers import LOAD
checkpoint.ATTEMPTS = 1
torch.set_num_threads(1)
for kind in LOAD:
    LOAD[kind](Path(sys.argv[1], kind))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for folder in map(Path, sys.stdin.read().split("\\n")):
    before = peak()
    signal.alarm(60)
    try:
        LOAD[folder.name](folder)
        found = "loaded"
    except BaseException as error:
        found = "refused" if isinstance(error, InputError) else type(error).__name__
    print(found, peak() - before, folder, flush=True)
assert "torch._dynamo" not in sys.modules, "the compiler is imported, which takes a second"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is in kilobytes there")
def test_the_process_grows_by_little(valid: Path, tmp_path: Path) -> None:
    """All of the above in one process, whose memory the system measures, and torch's is part of it."""
    folders = []

    def new(kind: str) -> Path:
        folders.append(copy_of(valid, kind, tmp_path / str(len(folders))))
        return folders[-1]

    for kind, fields in CONFIGS.values():
        change(new(kind), **fields)
    for kind in KINDS:
        for write in WEIGHTS.values():
            folder = new(kind)
            write_model(folder, write(folder))
        for start, size in SPARSE.values():
            write_sparse(new(kind), start, size)
    command = [sys.executable, "-c", CHILD, str(valid)]
    given = "\n".join(map(str, folders))
    ended = subprocess.run(command, input=given, capture_output=True, text=True, cwd=ROOT, timeout=300)
    lines = [line.split(" ", 2) for line in ended.stdout.splitlines()]
    assert (len(lines), ended.returncode) == (len(folders), 0), ended.stderr
    assert [line for line in lines if line[0] != "refused" or int(line[1]) * 1024 > MEMORY] == []


# Fuzzing


def loads_or_is_refused(folder: Path, kind: str, valid: Path) -> None:
    """Assert that the folder loads as a model of finite weights, or is refused in one line."""
    with watched() as seen:
        model = result_or_line(lambda: LOAD[kind](folder))
    if not isinstance(model, str):
        assert all(bool((tensor.isfinite() | (tensor.dim() == 0)).all()) for tensor in model.state_dict().values())
        assert {name: len(bits) for name, bits in bits_of(model).items()} == {
            name: len(bits) for name, bits in bits_of(LOAD[kind](valid / kind)).items()
        }
    assert seen.peak < MEMORY
    assert all(path.is_relative_to(folder) or path.is_relative_to(valid) for path in seen.opened)


fuzzed = settings(max_examples=120, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("kind", KINDS)
def test_any_config(valid: Path, kind: str, tmp_path: Path) -> None:
    folder = copy_of(valid, kind, tmp_path)
    content = config_of(folder)

    @fuzzed
    @given(data=mutated_json(content), seal=st.booleans())
    def check(data: bytes, seal: bool) -> None:
        (folder / CONFIG).write_bytes(data)
        if seal:
            with suppress(ValueError, RecursionError):
                write_config(folder, json.loads(data))
        loads_or_is_refused(folder, kind, valid)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_any_header(valid: Path, kind: str, tmp_path: Path) -> None:
    folder = copy_of(valid, kind, tmp_path)
    header, numbers = split_file((folder / MODEL).read_bytes())

    @fuzzed
    @given(data=mutated_json(header))
    def check(data: bytes) -> None:
        write_model(folder, join_file(data, numbers))
        loads_or_is_refused(folder, kind, valid)

    check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [MODEL, CONFIG])
def test_any_bytes(valid: Path, kind: str, name: str, tmp_path: Path) -> None:
    folder = copy_of(valid, kind, tmp_path)
    original = (folder / name).read_bytes()

    @fuzzed
    @given(data=mutated_bytes(original))
    def check(data: bytes) -> None:
        if name == MODEL:
            write_model(folder, data)
        else:
            (folder / name).write_bytes(data)
        loads_or_is_refused(folder, kind, valid)

    check()


def test_the_forgeries_are_the_checkpoint_but_for_what_is_changed(valid: Path, tmp_path: Path) -> None:
    """Written anew with nothing changed, it loads: what is refused above is refused for what was changed."""
    for kind in KINDS:
        folder = copy_of(valid, kind, tmp_path)
        change(folder)
        write_model(folder, join_file(*split_file((folder / MODEL).read_bytes())))
        assert bits_of(LOAD[kind](folder)) == bits_of(LOAD[kind](valid / kind))
