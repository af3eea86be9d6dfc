"""YAML of any shape is settings, or one short sentence with the place: never a traceback."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kava_core.errors import KavaError
from kava_core.settings import load_pipeline
from kava_core.settings.document import read_yaml
from kava_core.wording import shorten, shown
from tests.faults.conftest import Tell
from tests.settings.test_pipeline import SMALL

SHORT = 500
MEGABYTES = 100


def written(folder: Path, text: str) -> Path:
    path = folder / "pipelines.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return path


def with_evict(line: str) -> str:
    """A right pipeline but for one line of its section `evict`."""
    text = yaml.safe_dump({"pipeline": "small", "pipelines": {"small": SMALL}})
    assert "budget: 4" in text
    return text.replace("budget: 4", line)


def refusal(path: Path) -> str:
    """What is said, without the name of the file."""
    with pytest.raises(KavaError) as error:
        load_pipeline(path)
    said = str(error.value)
    assert said.startswith(str(path)) and len(said) < SHORT, said
    return said.removeprefix(str(path))


BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))])
WHERE = "pipelines.small.evict.budget"
HOSTILE: dict[str, tuple[str, str]] = {
    "lists 5,000 deep": ("a: " + "[" * 5000 + "]" * 5000, "in at most 40 others"),
    "lists 500,000 deep": ("[" * 500_000, "in at most 40 others"),
    "lists 60 deep": ("a: " + "[" * 60 + "]" * 60, "in at most 40 others"),
    "mappings 5,000 deep": ("{a: " * 5000, "in at most 40 others"),
    "!!int abc": (with_evict("budget: !!int abc"), f"{WHERE}: expected int, found 'abc'"),
    "!!float abc": (with_evict("budget: !!float abc"), f"{WHERE}: expected float, found 'abc'"),
    "!!bool abc": (with_evict("budget: !!bool abc"), f"{WHERE}: expected bool, found 'abc'"),
    "a month of 13": (
        with_evict("budget: 2026-13-45"),
        f"{WHERE}: expected timestamp, found '2026-13-45'",
    ),
    "an integer of 5,000 digits": (
        with_evict("budget: " + "1" * 5000),
        f"{WHERE}: expected int, found '1111",
    ),
    "a hexadecimal of 5,000 digits": (
        with_evict("budget: 0x" + "f" * 5000),
        f"{WHERE}: expected int, found '0xff",
    ),
    "a value of 10,000 characters": (
        with_evict("budget: " + "x" * 10_000),
        f"{WHERE}: Input should be a valid integer, found 'xxx",
    ),
    "a list of 10,000 values": (with_evict(f"budget: {[1] * 10_000}"), f"{WHERE}: Input should"),
    "a key of 1,000 characters": (with_evict("x" * 1_000 + ": 1"), "pipelines.small.evict.xxx"),
    "a thousand wrong keys": (
        with_evict("\n      ".join(f"k{i}: 1" for i in range(1000))),
        "1001 wrong setting(s)",
    ),
    "aliases of aliases": (BOMB, "found more once every alias"),
    "an alias of itself": ("a: &a [*a]", "an alias stands inside of what it names"),
    "a name of 300 letters": (
        f"pipeline: {'n' * 300}\npipelines: {{{'n' * 300}: {{}}}}",
        "must be of at most 100 letters",
    ),
    "no pipelines": ("pipelines: 3", "has no `pipelines:` mapping"),
    "nothing": ("", "has no `pipelines:` mapping"),
    "two documents": ("a: 1\n---\nb: 2", "is not valid YAML"),
    "a foreign tag": ("a: !!python/object/apply:os.system [ls]", "is not valid YAML"),
    "a list for a key": ("? [a]\n: b", "is not valid YAML"),
    "control characters": ('"\\e[2J": &x\n  - "\\0"\npipelines: 1', "has no `pipelines:`"),
    "a terminal's orders for a key": (with_evict('"\\e[2J": 1'), r"evict.\x1b[2J: no such setting"),
    "a million values": ("a: " + str([0] * 1_000_000), "expected at most 1,048,576 bytes"),
    "not UTF-8": ("a: \ud800", "is not valid YAML"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_one_short_sentence_with_the_place(tmp_path: Path, kind: str, tell: Tell) -> None:
    text, message = HOSTILE[kind]
    path = written(tmp_path, text)
    tracemalloc.start()
    try:
        said = refusal(path)
        peak = tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()
    assert message in said and peak < MEGABYTES
    assert "\x1b" not in said
    tell(
        "crafted settings",
        "a kind of YAML (the test names them)",
        "a short sentence with the place",
    )


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "pipelines.yaml"
    os.mkfifo(path)
    assert "a folder, a pipe or a device" in refusal(path)
    path.unlink()
    path.mkdir()
    assert "a folder, a pipe or a device" in refusal(path)
    path.rmdir()
    assert "is missing. Run this where pipelines.yaml lies." in refusal(path)


def test_ordinary_yaml_is_what_it_always_was(tmp_path: Path) -> None:
    text = """
    base: &base {a: 1, b: [x, 2026-01-02, 1e-3, yes, null]}
    other: {<<: *base, a: 2}
    both: [*base, *base]
    words: 'quoted: "text"'
    """
    assert read_yaml(written(tmp_path, text)) == yaml.safe_load(text)


SCALARS = st.sampled_from(
    [
        *["1", "x", "~", "yes", "!!int a", "!!float b", "!!bool c", "!!null d", "!!timestamp e"],
        *["2026-99-99", "1:2:3", "0x" + "f" * 2000, "1" * 4999, ".inf", ".nan", "'\u202e'"],
        *['"\\u0000"', "*a", "&a 1", "=", "<<", "!!binary '?'", "!!set {a, b}", "!!omap [a: 1]"],
        *["!x y", "- 1", "%", "@", "`", "|", "? a"],
    ]
)
KEYS = st.sampled_from(
    ["pipeline", "pipelines", "small", "evict", "budget", "policy", "students", "<<", "1", "~"]
)
VALUES = st.recursive(
    st.integers() | st.text() | st.none(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
DOCUMENTS = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda x: f"[{', '.join(x)}]")
        | st.lists(st.tuples(KEYS, inner), max_size=4).map(
            lambda x: "{" + ", ".join(f"{key}: {value}" for key, value in x) + "}"
        )
    ),
    max_leaves=20,
)


FEW, MANY = 150, 5000


@pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_any_document_is_settings_or_a_sentence(tmp_path: Path, examples: int, tell: Tell) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(document=DOCUMENTS, evict=DOCUMENTS, nested=st.booleans())
    def look(document: str, evict: str, nested: bool) -> None:
        path = written(tmp_path, with_evict(f"budget: {evict}") if nested else document)
        try:
            load_pipeline(path)
        except KavaError as error:
            assert len(str(error)) < SHORT

    look()
    for _ in range(examples):
        tell("settings of any shape", "a document made at random", "settings, or a short sentence")


@given(value=VALUES)
def test_values_are_shown_as_python_does_as_far_as_there_is_room(value: Any) -> None:
    assert len(shown(value, 40)) <= 40
    if len(repr(value)) < 40:
        assert shown(value, 40) == repr(value)


def test_words_are_shortened_in_their_middle() -> None:
    assert shorten("abc") == "abc" and shorten("a\nb") == "a\\nb"
    assert len(shorten("x" * 1000)) == 59 and shorten("a" + "x" * 1000 + "b").startswith("axx")
