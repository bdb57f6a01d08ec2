"""Saves are complete or do not happen; damaged files give one line with a cure."""

from __future__ import annotations

import errno
import os
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftkern.formats import atomic
from peftkern.formats.atomic import (
    atomic_group,
    atomic_save_safetensors,
    atomic_write_bytes,
    atomic_write_text,
    bytes_writer,
    load_safetensors,
    load_safetensors_metadata,
)

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "empty": torch.zeros(0, 3)}


def test_round_trip(tmp_path):
    path = tmp_path / "t.safetensors"
    shared = torch.arange(12.0).reshape(3, 4)
    tensors = {**TENSORS, "x": shared, "same": shared, "transposed": shared.T, "slice": shared[1:]}
    atomic_save_safetensors(tensors, path, {"note": "hello"})
    loaded = load_safetensors(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert load_safetensors_metadata(path) == {"format": "pt", "note": "hello"}
    assert os.listdir(tmp_path) == ["t.safetensors"]


def test_text_and_bytes(tmp_path):
    atomic_write_text(tmp_path / "t", "grün")
    assert (tmp_path / "t").read_text(encoding="utf-8") == "grün"
    atomic_write_bytes(tmp_path / "t", b"\x00\x01")
    assert (tmp_path / "t").read_bytes() == b"\x00\x01"


def test_new_files_get_the_usual_permissions(tmp_path):
    atomic_write_text(tmp_path / "ours", "x")
    (tmp_path / "usual").write_text("x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_sharded_and_meta_tensors_are_refused(tmp_path):
    with pytest.raises(ValueError, match="meta device"):
        atomic_save_safetensors({"w": torch.empty(2, device="meta")}, tmp_path / "t")
    assert os.listdir(tmp_path) == []


def _no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace", "write", "save_file"])
def test_a_failing_disk_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "t.safetensors"
    atomic_save_safetensors(TENSORS, path)
    before = path.read_bytes()
    if failing == "write":
        monkeypatch.setattr(
            atomic, "save_file", lambda tensors, name, metadata: open(name, "xb").close() or _no_space()
        )
    elif failing == "save_file":
        from safetensors import SafetensorError

        def save_file(*args, **kwargs):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

        monkeypatch.setattr(atomic, "save_file", save_file)
    else:
        monkeypatch.setattr(failing, _no_space)
    with pytest.raises(OSError, match=r"cannot save .*t.safetensors: .*No space left") as error:
        atomic_save_safetensors({"other": torch.zeros(3)}, path)
    assert "\n" not in str(error.value)
    assert "old file is untouched" in str(error.value)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["t.safetensors"]


def test_one_failure_in_a_group_changes_no_file(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).write_text("old")

    def save(second):
        with atomic_group() as add:
            add(tmp_path / "one", bytes_writer(b"new"))
            second(add)

    def caller_fails(add):
        raise RuntimeError("the caller failed")

    with pytest.raises(OSError, match="two"):
        save(lambda add: add(tmp_path / "two", _no_space))
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {"one": "old", "two": "old"}
    with pytest.raises(RuntimeError, match="the caller failed"):
        save(caller_fails)
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {"one": "old", "two": "old"}


def test_a_missing_directory_is_one_line(tmp_path):
    with pytest.raises(OSError, match=r"cannot save .*No such file") as error:
        atomic_write_text(tmp_path / "no" / "where", "x")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_directory(tmp_path):
    atomic_write_text(tmp_path / "t", "old")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OSError, match="Permission denied"):
            atomic_write_text(tmp_path / "t", "new")
        assert (tmp_path / "t").read_text() == "old"
    finally:
        tmp_path.chmod(0o700)


def test_a_pickle_is_refused_unread(tmp_path):
    for protocol in (2, 4):
        path = tmp_path / "model.bin"
        if protocol == 2:
            torch.save({"w": torch.zeros(2)}, path)
        else:
            import pickle

            path.write_bytes(pickle.dumps({"w": 1}, protocol=protocol))
        with pytest.raises(ValueError, match=r"is a pickle.*convert it.*save_file"):
            load_safetensors(path)


def test_a_header_length_that_looks_like_a_pickle(tmp_path):
    """0x0480 bytes of header: the file starts as a protocol 4 pickle does."""
    path = tmp_path / "t.safetensors"
    entry = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    header = entry.ljust(0x0480)
    path.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<f", 2.5))
    assert load_safetensors(path)["w"].item() == 2.5


def test_missing_and_odd_paths(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        load_safetensors(tmp_path / "none")
    with pytest.raises(ValueError, match="cannot be read"):
        load_safetensors(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_safetensors(tmp_path / "empty")


@pytest.fixture(scope="module")
def good_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "t.safetensors"
    atomic_save_safetensors(TENSORS, path)
    return path, path.read_bytes()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_raise_one_line_or_load(good_file, data):
    """Truncation, flipped bytes and foreign bytes: a ValueError in one line, or tensors; never anything else."""
    path, good = good_file
    kind = data.draw(st.sampled_from(["truncate", "flip", "random", "header"]))
    if kind == "truncate":
        bad = good[: data.draw(st.integers(0, len(good) - 1))]
    elif kind == "flip":
        at = data.draw(st.integers(0, len(good) - 1))
        bad = good[:at] + bytes([data.draw(st.integers(0, 255))]) + good[at + 1 :]
    elif kind == "random":
        bad = data.draw(st.binary(max_size=200))
    else:
        offsets = data.draw(st.lists(st.integers(-5, 2**63), min_size=2, max_size=2))
        shape = data.draw(st.lists(st.integers(0, 2**63), max_size=3))
        entry = f'{{"w":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}'.encode()
        bad = struct.pack("<Q", len(entry)) + entry + b"\x00" * 16
    other = path.with_name("bad.safetensors")
    other.write_bytes(bad)
    for load in (load_safetensors, load_safetensors_metadata):
        message = ""
        try:
            load(other)
        except ValueError as error:
            message = str(error)
        assert "\n" not in message
        assert not message or "again" in message or "pickle" in message
