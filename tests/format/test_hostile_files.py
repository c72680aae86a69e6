"""A file that was made to harm, or was damaged, is refused with the reason, and quickly: no crash, hang or flood."""

from __future__ import annotations

import io
import json
import pickle
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from allele.format import AdapterShape, ShapeMismatch, StateShape, import_peft
from allele.format.shape import TARGETS
from tests.format.folders import save

Table = dict[str, Any]


def parts(packed: bytes) -> tuple[Table, bytes]:
    """Header and data."""
    end = 8 + int.from_bytes(packed[:8], "little")
    return json.loads(packed[8:end]), packed[end:]


def made(header: Table | str | bytes, data: bytes) -> bytes:
    if isinstance(header, dict):
        header = json.dumps(header)
    text = header.encode() if isinstance(header, str) else header
    return len(text).to_bytes(8, "little") + text + data


@pytest.fixture
def refused(shape: AdapterShape, row: np.ndarray, tmp_path: Path) -> Callable[[bytes, str], None]:
    """Both ways in refuse these bytes, soon, in one printable line."""
    folder = save(tmp_path / "a", shape.views(row))

    def check(data: bytes, message: str) -> None:
        (folder / "adapter_model.safetensors").write_bytes(data)
        for read in (lambda: import_peft(folder, shape), lambda: shape.unpack(data)):
            begun = time.process_time()
            with pytest.raises(ShapeMismatch, match=message) as error:
                read()
            assert time.process_time() - begun < 2  # a tenth of it where nothing else runs
            text = str(error.value)
            assert text.isprintable() and len(text) < 1500

    return check


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
LAST = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
SECOND = "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"

LIES: dict[str, tuple[Callable[[Table], object], str]] = {
    "overlap": (lambda t: t[SECOND].update(data_offsets=t[FIRST]["data_offsets"]), "gap or overlap"),
    "gap": (lambda t: t[FIRST].update(data_offsets=[4, 516]), "expected offset 0.*found 4: gap or overlap"),
    "far beyond the end": (
        lambda t: t[LAST].update(data_offsets=[1 << 40, (1 << 40) + 512]),
        r"expected offset \d+, .*found 1099511627776: gap",
    ),
    "beyond the end": (
        lambda t: t[LAST].update(shape=[1 << 38, 4], data_offsets=[17408, 17408 + (1 << 42)]),
        r"expected 4398046528512 bytes of data, found 17920 \(truncated\)",
    ),
    "negative": (lambda t: t[FIRST].update(data_offsets=[-512, 0]), "not negative.*offsets -512 and 0"),
    "backwards": (lambda t: t[FIRST].update(data_offsets=[512, 0]), r"expected 512 bytes.*offsets 512 to 0"),
    "huge": (lambda t: t[FIRST].update(data_offsets=[0, 10**4000]), "offsets 0 and 1000"),
    "more than 64 bits": (lambda t: t[FIRST].update(data_offsets=[1 << 64, (1 << 64) + 512]), "offsets 18446744"),
    "fractions": (lambda t: t[FIRST].update(data_offsets=[0.0, 512.0]), "whole numbers"),
    "truth values": (lambda t: t[FIRST].update(shape=[True, 128]), "whole numbers"),
    "texts": (lambda t: t[FIRST].update(data_offsets="ab"), "whole numbers.*'a' and 'b'"),
    "one offset": (lambda t: t[FIRST].update(data_offsets=[0]), "two data_offsets"),
    "no offsets": (lambda t: t[FIRST].pop("data_offsets"), r"two data_offsets.*KeyError"),
    "no object": (lambda t: t.update({FIRST: 7}), r"two data_offsets, found 7 \(TypeError\)"),
    "nothing": (lambda t: t.update({FIRST: None}), "two data_offsets"),
    "wide shape": (lambda t: t[FIRST].update(shape=[4, 64]), r"expected 1024 bytes for F32 \[4, 64\], found offsets 0"),
    "huge shape": (lambda t: t[FIRST].update(shape=[1 << 61] * 8), "expected .* bytes for F32"),
    "many dimensions": (lambda t: t[FIRST].update(shape=[1] * 200_000), "at most 8 sizes"),
    "negative shape": (lambda t: t[FIRST].update(shape=[-4, -32]), "not negative"),
    "endless product": (lambda t: t[FIRST].update(shape=[10**4000] * 100), "at most 8 sizes"),
    "unknown dtype": (lambda t: t[FIRST].update(dtype="F31"), "expected a dtype of safetensors, found 'F31'"),
    "dtype of lower case": (lambda t: t[FIRST].update(dtype="f32"), "found 'f32'"),
    "dtype no text": (lambda t: t[FIRST].update(dtype=["F32"]), "expected a dtype"),
    "other dtype, same bytes": (lambda t: t[FIRST].update(dtype="I32"), "F32.*found I32"),
    "metadata no object": (lambda t: t.update(__metadata__=[1]), "__metadata__"),
    "extra": (lambda t: t.update({"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}), "x: expected"),
    "missing": (lambda t: t.pop(FIRST), "gap or overlap"),
    "name on many lines": (
        lambda t: t.update({"a\n\ud800\x1b[31m" * 400: t[FIRST] | {"dtype": 7}}),
        r"a\\n\\ud800\\x1b.*found 7",
    ),
    "empty": (lambda t: t.clear(), "expected 0 bytes, found"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused(
    shape: AdapterShape, row: np.ndarray, refused: Callable[[bytes, str], None], lie: str
) -> None:
    table, data = parts(shape.pack(row))
    change, message = LIES[lie]
    change(table)
    refused(made(table, data), message)


def test_equal_sizes_in_each_others_place_are_no_lie(shape: AdapterShape, row: np.ndarray, tmp_path: Path) -> None:
    """The library reads such a file likewise: offsets say where a tensor is."""
    table, data = parts(shape.pack(row))
    table[FIRST]["data_offsets"], table[SECOND]["data_offsets"] = (
        table[SECOND]["data_offsets"],
        table[FIRST]["data_offsets"],
    )
    folder = save(tmp_path / "a", {})
    (folder / "adapter_model.safetensors").write_bytes(made(table, data))
    got = shape.views(import_peft(folder, shape).row)
    theirs = safetensors.numpy.load(made(table, data))
    assert all(np.array_equal(got[name], theirs[name]) for name in theirs)
    np.testing.assert_array_equal(got[FIRST], shape.views(row)[SECOND])


def test_what_is_no_header_is_refused(
    shape: AdapterShape, row: np.ndarray, refused: Callable[[bytes, str], None]
) -> None:
    table, data = parts(shape.pack(row))
    text = json.dumps(table)
    first = f'"{FIRST}"'
    assert text.count(first) == 1
    entry = json.dumps(table[FIRST])
    refused(b"\x07", "1 bytes with no whole header")
    refused((1 << 63).to_bytes(8, "little") + text.encode(), "with no whole header")
    refused((len(text) + len(data) + 1).to_bytes(8, "little") + text.encode() + data, "with no whole header")
    refused(made(b"\xff\xfe" + text.encode(), data), "UnicodeDecodeError")
    refused(made(text.encode("utf-16"), data), "UnicodeDecodeError")
    refused(made("\ufeff" + text, data), "JSONDecodeError")
    refused(made("[]", data), "JSON that is no object but a list")
    refused(made("7", data), "no object but a int")
    refused(made("", data), "JSONDecodeError")
    refused(made(text[:-1], data), "JSONDecodeError")
    refused(made("[" * 200_000, data), "RecursionError")
    refused(made('{"a":' * 150_000, data), "RecursionError")
    refused(made(text.replace(first, f"{first}: {entry}, {first}", 1), data), rf"key '{FIRST}' twice")
    refused(made(text.replace('"dtype"', '"dtype": "F32", "dtype"', 1), data), "key 'dtype' twice")
    refused(made('{"a": ' + "9" * 5000 + "}", data), "ValueError.*digits")
    refused(made("{" + ",".join(f'"{i}":0' for i in range(90_000)) + "}", data), "two data_offsets")
    refused(made('{"a":[' + "[]," * 300_000 + "[]]}", data), "two data_offsets")
    refused(made(text + " " * (2 << 20), data), r"header: expected at most 1\d+ bytes for 28 tensors, found 2\d+ bytes")
    refused(made(text, data + b"\0"), r"data: expected \d+ bytes, found \d+ bytes")
    refused(made(text, data[:-1]), r"down_proj\.lora_B\S*: expected \d+ bytes of data, found \d+ \(truncated\)")


@pytest.mark.parametrize("text", ['{"a":[' + "[]," * 340_000 + "[]]}", '{"a":' * 150_000, "[" * 1_000_000])
def test_a_header_that_swells_when_it_is_parsed_stays_small(shape: AdapterShape, text: str) -> None:
    data = made(text, b"")
    tracemalloc.start()
    with pytest.raises(ShapeMismatch):
        shape.unpack(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 48 << 20


def test_an_empty_file_is_refused(shape: AdapterShape) -> None:
    with pytest.raises(ShapeMismatch, match="found an empty file"):
        shape.unpack(b"")


def test_a_header_of_gigabytes_in_a_sparse_file_is_refused_unread(
    shape: AdapterShape, row: np.ndarray, tmp_path: Path
) -> None:
    folder = save(tmp_path / "a", shape.views(row))
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write((200 << 30).to_bytes(8, "little") + b"{")
        file.truncate(300 << 30)
    with pytest.raises(ShapeMismatch, match=r"header: expected at most \d+ bytes for 28 tensors, found 214748364800"):
        import_peft(folder, shape)


def test_a_pickle_in_disguise_is_refused_and_not_run(
    shape: AdapterShape, row: np.ndarray, tmp_path: Path, refused: Callable[[bytes, str], None]
) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "harm",))

    harm = pickle.dumps({FIRST: Harm()})
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("archive/data.pkl", harm)
    refused(archive.getvalue(), "expected a safetensors file, found .*a zip archive, as torch.save writes it")
    refused(harm, "expected a safetensors file, found .*a pickle")
    assert not (tmp_path / "harm").exists()


def test_a_header_whose_length_begins_as_a_pickle_is_read(shape: AdapterShape, row: np.ndarray, tmp_path: Path) -> None:
    table, data = parts(shape.pack(row))
    text = json.dumps(table)
    text += " " * (-(len(text) - 0x80) % 0x100)
    assert len(text) & 0xFF == 0x80
    folder = save(tmp_path / "a", {})
    (folder / "adapter_model.safetensors").write_bytes(made(text, data))
    assert import_peft(folder, shape).row == row.tobytes()


def test_a_hostile_state_is_refused(shape: AdapterShape, row: np.ndarray) -> None:
    layout = StateShape(shape)
    table, data = parts(layout.pack(weights=row, exp_avg=row, exp_avg_sq=row, step=3))
    for change, message in (
        ({"exp_avg": table["weights"]}, "gap or overlap"),
        ({"step": table["step"] | {"data_offsets": [0, 8]}}, "gap or overlap"),
        ({"step": table["step"] | {"dtype": "U64"}}, r"step: expected I64 \[1\], found U64 \[1\]"),
    ):
        with pytest.raises(ShapeMismatch, match=message):
            layout.unpack(made(table | change, data))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "adapter_config.json: expected 1 to .*found 0 bytes"),
        (b"\xff{}", "UnicodeDecodeError"),
        (b"[]", "no object but a list"),
        (b"{" * 100_000, "JSONDecodeError|RecursionError"),
        (b"[" * 100_000, "RecursionError"),
        (b'{"r": 4, "r": 8}', "key 'r' twice"),
        (b" " * (5 << 20), "expected 1 to 4194304 bytes"),
        (b'{"r": 4, "lora_alpha": 1e400}', "lora_alpha: expected a number above 0, found inf"),
    ],
)
def test_a_hostile_config_is_refused(
    shape: AdapterShape, row: np.ndarray, tmp_path: Path, text: bytes, message: str
) -> None:
    folder = save(tmp_path / "a", shape.views(row))
    (folder / "adapter_config.json").write_bytes(text)
    with pytest.raises(ShapeMismatch, match=message):
        import_peft(folder, shape)


def test_patterns_by_the_thousand_take_no_time(config: dict[str, Any], tmp_path: Path) -> None:
    shape = AdapterShape.from_model(config | {"num_hidden_layers": 200}, rank=4, targets=TARGETS)
    names = {f"layers.{i}.self_attn.q_proj": 4 for i in range(200, 70_000)} | dict.fromkeys(TARGETS, 4)
    folder = save(tmp_path / "a", shape.views(np.ones(shape.numel, dtype="<f4")), rank_pattern=names)
    begun = time.process_time()
    assert import_peft(folder, shape).scale == 2.0
    assert time.process_time() - begun < 4
