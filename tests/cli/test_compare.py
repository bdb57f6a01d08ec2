"""`peftkern compare`: each method in its own process, one table, JSON and a picture."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from peftkern.cli import main
from peftkern.training.compare import render, table_row
from peftkern.training.plot import plot_comparison


def report(loss: float, trainable: int = 100, speed: float = 10.0) -> dict:
    return {
        "learning_rate": 1e-3,
        "trainable_parameters": trainable,
        "total_parameters": 1000,
        "peak_memory_bytes": 700,
        "memory_before_model_bytes": 500,
        "tokens_per_second": speed,
        "heldout": {"loss_before": 4.0, "loss_after": loss, "perplexity_after": 2.0},
    }


def test_rows_are_relative_to_full_fine_tuning() -> None:
    row = table_row("lora", report(2.2, speed=15.0), report(2.0, trainable=1000))
    assert row["quality"] == pytest.approx(0.9)
    assert row["relative_speed"] == pytest.approx(1.5)
    assert row["trainable_percent"] == pytest.approx(10)
    assert row["memory_bytes"] == 200
    assert table_row("lora", report(2.2), report(4.1))["quality"] is None


def test_table_and_plot(tmp_path: Path) -> None:
    full = report(2.0, trainable=1000)
    rows = [table_row("full", full, full), table_row("lora", report(2.2), full)]
    console = Console(file=io.StringIO(), width=200)
    console.print(render(rows))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "full fine-tuning" in text
    assert "90.0 %" in text
    plot_comparison(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["plot.png"]


def test_compare(
    base: Path, texts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out"
    arguments = ["compare", f"--model={base}", f"--data={texts[0]}", f"--eval-data={texts[1]}", f"--output={out}"]
    arguments += ["--max-length=32", "--max-steps=8", "--sample-tokens=0", "--methods=lora"]
    assert main([*arguments, "--learning-rates=lora=1e-2", "--learning-rates=full=5e-3"]) == 0
    result = json.loads((out / "compare.json").read_text())
    assert [row["method"] for row in result["rows"]] == ["full", "lora"]
    assert [row["learning_rate"] for row in result["rows"]] == [5e-3, 1e-2]
    assert result["rows"][0]["quality"] == result["rows"][0]["relative_speed"] == 1
    assert result["reports"]["full"]["tokens"] == result["reports"]["lora"]["tokens"]
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "quality" in capsys.readouterr().out

    assert main([*arguments, "--overwrite", "--text-field=body"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("peftkern: error: full: ")
    assert "no field 'body'" in error
    assert json.loads((out / "compare.json").read_text()) == result
