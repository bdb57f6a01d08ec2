"""The comparison of methods is kept with its commit, and its table shows every method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import comparison


def _written(directory: Path) -> Path:
    def row(method: str, quality: float | None) -> dict[str, Any]:
        return {
            "method": method,
            "learning_rate": 1e-3,
            "trainable_percent": 7.665,
            "memory_bytes": 123_400_000,
            "relative_speed": 0.987,
            "heldout_perplexity": 17.234,
            "quality": quality,
        }

    full = {
        "tokens": 221_184,
        "dtype": "float32",
        "device": "x86_64",
        "threads": 2,
        "heldout": {"perplexity_before": 73.76},
        "settings": {"output": str(directory / "full")},
    }
    document = {"rows": [row("full", 1.0), row("lora", 0.9512), row("prompt", None)], "reports": {"full": full}}
    directory.mkdir()
    (directory / "compare.json").write_text(json.dumps(document))
    (directory / "compare.png").write_bytes(b"picture")
    return directory


def test_a_comparison_is_kept_and_shown(tmp_path):
    path = comparison.keep(_written(tmp_path / "run"), "0123456789abcdef", tmp_path / "results")
    assert path.parent.parent.name == comparison.FOLDER
    assert (path.parent / "compare.png").read_bytes() == b"picture"
    table = comparison.table(comparison.read(path))
    assert "221,184 tokens each, float32, 2 threads" in table
    assert "Commit 0123456789" in table
    assert "| LoRA | 0.001 | 7.67% | 123 | 0.99 | 17.23 | 95.1% |" in table
    assert "| prompt tuning | 0.001 | 7.67% | 123 | 0.99 | 17.23 | - |" in table


def test_a_kept_comparison_names_no_place(tmp_path):
    path = comparison.keep(_written(tmp_path / "run"), "0123456789abcdef", tmp_path / "results")
    assert comparison.read(path)["reports"]["full"]["settings"]["output"] == "full"
    assert str(tmp_path) not in path.read_text()


def test_what_is_no_comparison_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no comparison at .*run peftkern compare"):
        comparison.keep(tmp_path)
    directory = _written(tmp_path / "run")
    (directory / "compare.png").unlink()
    with pytest.raises(ValueError, match=r"no .*compare.png; run peftkern compare"):
        comparison.keep(directory)
    (directory / "compare.json").write_text("{}")
    with pytest.raises(ValueError, match="is not what peftkern compare writes"):
        comparison.keep(directory)
