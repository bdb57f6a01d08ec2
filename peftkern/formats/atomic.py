"""Files that are either complete or not there, and safetensors files read with errors that say what to do.

A save writes every file under a temporary name in its own directory, forces it to the disk, and only then renames it
over the old one. Where anything fails before, the old files stay as they were and the temporary ones are removed.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

PathLike = str | os.PathLike

_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch.save's zip, raw pickles


@contextlib.contextmanager
def atomic_group() -> Iterator[Callable[[PathLike, Callable[[str], None]], None]]:
    """Several files that change together.

    Yields `add(path, write)`: `write` is called at once with a temporary name and fills that file. The renames happen
    when the block ends without an error, in the order of the calls.

    Raises:
        OSError: one line with the path and the reason; every file is then as it was before.
    """
    staged: list[tuple[Path, Path]] = []

    def add(path: PathLike, write: Callable[[str], None]) -> None:
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        staged.append((temporary, target))
        with saving(target):
            write(str(temporary))
            _sync(temporary)

    try:
        yield add
        for temporary, target in staged:
            with saving(target):
                os.replace(temporary, target)
        for directory in dict.fromkeys(target.parent for _, target in staged):
            _sync_directory(directory)
    finally:
        for temporary, _ in staged:
            with contextlib.suppress(OSError):
                temporary.unlink()


def atomic_write_bytes(path: PathLike, data: bytes) -> None:
    """Writes `data` to `path`, completely or not at all; raises OSError, in one line, where the disk refuses."""
    with atomic_group() as add:
        add(path, bytes_writer(data))


def atomic_write_text(path: PathLike, data: str) -> None:
    """Writes `data` to `path` as UTF-8; see `atomic_write_bytes`."""
    atomic_write_bytes(path, data.encode("utf-8"))


def atomic_save_safetensors(
    tensors: Mapping[str, torch.Tensor], path: PathLike, metadata: dict[str, str] | None = None
) -> None:
    """Saves named tensors of any device, strides and sharing to a safetensors file, completely or not at all.

    Args:
        tensors: names to tensors; those that share memory are stored once each.
        path: of the file.
        metadata: strings to keep beside the tensors; {"format": "pt"} is added, which other loaders look for.

    Raises:
        OSError: in one line, where the disk does not let it; an older file at `path` is then untouched.
        ValueError: a sharded tensor.
    """
    with atomic_group() as add:
        add(path, safetensors_writer(tensors, metadata))


def bytes_writer(data: bytes) -> Callable[[str], None]:
    """A `write` for `atomic_group` that puts `data` into the file."""

    def write(name: str) -> None:
        with open(name, "xb") as file:
            file.write(data)

    return write


def safetensors_writer(
    tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> Callable[[str], None]:
    """A `write` for `atomic_group` that puts `tensors` into the file; see `atomic_save_safetensors`."""
    storable: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if hasattr(tensor, "device_mesh"):
            raise ValueError(f"safetensors: {name} is a sharded DTensor; gather it first with its full_tensor()")
        if tensor.is_meta:
            raise ValueError(f"safetensors: {name} is on the meta device and holds no values; load the model first")
        tensor = tensor.detach().contiguous()
        # The format forbids two names for one piece of memory.
        storage = tensor.untyped_storage().data_ptr()
        storable[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return lambda name: save_file(storable, name, metadata={"format": "pt", **(metadata or {})})


def load_safetensors(path: PathLike) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        ValueError: in one line with its cure: no such file, a pickle, a truncated or corrupt file.
    """
    path = Path(path)
    _check_readable(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise _corrupt(path, error) from None


def load_safetensors_metadata(path: PathLike) -> dict[str, str]:
    """The strings kept beside the tensors of a safetensors file. Raises ValueError as `load_safetensors` does."""
    from safetensors import safe_open

    path = Path(path)
    _check_readable(path)
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise _corrupt(path, error) from None


def _check_readable(path: Path) -> None:
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from None
    # A safetensors header starts with its own length, which may look like a pickle; its ninth byte tells them apart.
    if start[8:] != b"{" and start.startswith(_PICKLE_STARTS):
        raise ValueError(
            f"{path} is a pickle, which can run code when loaded, so it is refused; {conversion_cure(path.name)}"
        )


def conversion_cure(name: str) -> str:
    """How to turn a pickle that one trusts into a safetensors file."""
    return (
        f"if you trust it, convert it: safetensors.torch.save_file(torch.load({name!r}, weights_only=True), "
        f"{Path(name).stem + '.safetensors'!r})"
    )


def _corrupt(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{path} is not a whole safetensors file ({reason}); copy or save it again")


@contextlib.contextmanager
def saving(target: Path) -> Iterator[None]:
    """Turns what a failing disk raises into one OSError that names the file and what became of the old one."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        kept = "the old file is untouched" if target.exists() else "nothing was left behind"
        if target.is_dir():
            kept = "what it held is untouched"
        raise OSError(f"cannot save {target}: {reason}; {kept}; free space or pick a writable directory") from error


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    """Makes renames in `directory` durable. Where a platform cannot open directories, renames are still atomic."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse; the file itself is on the disk already
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
