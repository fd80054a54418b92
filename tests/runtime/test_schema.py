"""JSON against the fields of a dataclass: what fits comes back as it is, everything else is refused by name."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.runtime.schema import LONGEST, checked, from_json
from pipeline.runtime.sealed_json import CHECKSUM, check_seal, sealed
from pipeline.runtime.untrusted_files import parse_json


@dataclass(frozen=True)
class Inner:
    start: int
    files: dict[str, str]


@dataclass(frozen=True)
class Outer:
    count: int
    share: float
    grid: tuple[int, int]
    inner: list[Inner]
    kind: Literal["a", "b"] = "a"
    total: int | None = None
    other: dict[str, Any] = field(default_factory=dict)


GOOD = Outer(3, 0.5, (2, 5), [Inner(0, {"x": "y"}), Inner(7, {})], "b", 9, {"any": [1, None, {"z": True}]})


def content(**changes: Any) -> dict[str, Any]:
    """Return the JSON of GOOD, with changes."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(GOOD)))
    return {**found, **changes}


def test_what_a_dataclass_writes_it_reads() -> None:
    assert from_json(Outer, content()) == GOOD
    assert from_json(Outer, content(unknown=1)) == GOOD
    minimal = {name: content()[name] for name in ("count", "share", "grid", "inner")}
    assert from_json(Outer, minimal) == Outer(3, 0.5, (2, 5), GOOD.inner)
    assert from_json(Outer, content(share=1)).share == 1  # a whole number is a float


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": True}, "the bool True as count"),
        ({"count": 3.0}, "the float 3.0 as count"),
        ({"count": None}, "the NoneType None as count"),
        ({"share": "0.5"}, "the str '0.5' as share"),
        ({"share": float("nan")}, "the float nan as share"),
        ({"share": 10**400}, "as share"),
        ({"grid": [2]}, "the list [2] as grid"),
        ({"grid": [2, 5, 1]}, "as grid"),
        ({"grid": {"0": 2, "1": 5}}, "the dict {'0': 2, '1': 5} as grid"),
        ({"inner": [{"start": 0, "files": {}}, {"start": 1}]}, "no inner[1].files"),
        ({"inner": [{"start": 0, "files": {"x": 1}}]}, "the int 1 as inner[0].files[x]"),
        ({"inner": [[]]}, "in place of inner[0]"),
        ({"kind": "c"}, "the str 'c' as kind"),
        ({"total": "9"}, "the str '9' as total"),
        ({"other": []}, "the list [] as other"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the message is compared here)
        from_json(Outer, content(**changes))
    assert message in str(refused.value)


def test_a_missing_field_and_no_object() -> None:
    without = content()
    del without["count"]
    with pytest.raises(ValueError, match="no count"):
        from_json(Outer, without)
    with pytest.raises(ValueError, match="the list"):
        from_json(Outer, [1])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(name=st.sampled_from(list(content())), value=JSON)
def test_any_json_in_any_field_is_taken_as_it_is_or_refused(name: str, value: Any) -> None:
    try:
        found = from_json(Outer, content(**{name: value}))
    except ValueError:
        pass
    else:
        assert json.dumps(asdict(found)) == json.dumps(content(**{name: value}))


@pytest.mark.parametrize("value", [10**4000, "x" * 10**6, [[]] * 10**6, {str(i): i for i in range(10**5)}])
def test_messages_about_large_values_are_short(value: Any) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        checked(bool, value, "it")
    assert len(str(refused.value)) < 2 * LONGEST


@given(content=st.dictionaries(st.text(), JSON.filter(lambda value: "NaN" not in json.dumps(value))))
def test_a_sealed_object_is_read_and_a_changed_one_refused(content: dict[str, Any]) -> None:
    content = {name: value for name, value in json.loads(json.dumps(content)).items() if name != CHECKSUM}
    if "Infinity" in json.dumps(content):
        return
    read = parse_json(sealed(content))
    assert {name: value for name, value in read.items() if name != CHECKSUM} == content
    check_seal(read)
    check_seal(content)  # without a checksum nothing is compared
    with pytest.raises(ValueError, match="another content"):
        check_seal({**read, "an added name": 1})


@pytest.mark.parametrize(
    "data", [b"", b"[", b"NaN", b"[Infinity]", b"\xff\xfe", b"[" * 10**5, b'{"a":' * 10**5, b"9" * 5000]
)
def test_what_is_no_json_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        parse_json(data)
