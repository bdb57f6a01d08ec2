"""Results on disk, tables and plots; and the READMEs hold what the committed results say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plots, report, results


def _row(case: str, arm: str, median: float, **more: Any) -> dict[str, Any]:
    row = {"case": case, "sizes": {"M": 1}, "dtype": "bfloat16", "pass": "forward", "mode": "graph", "arm": arm}
    times = {"median_us": median, "floor_us": 2.0, "share_of_floor": 2.0 / median, "peak_extra_bytes": 1_500_000}
    return row | times | more


def _fixed_document() -> dict[str, Any]:
    return {
        "schema_version": results.SCHEMA_VERSION,
        "op": "toy",
        "commit": "0123456789abcdef",
        "dirty": False,
        "date": "2026-11-23T00:00:00+00:00",
        "device": {"type": "cuda", "name": "NVIDIA H200", "slug": "nvidia-h200"},
        "versions": {"torch": "2.11.0", "bitsandbytes": "0.50.2"},
        "checks": {"passed": True, "failures": []},
        "ceilings": {"copy_bytes_per_s": 4.28e12, "gemm_flops_per_s": {"bfloat16": 6.8e14}},
        "missing_peers": {"unsloth": "not installed"},
        "measurements": [
            _row("M=1", "eager", 100.0, ratio=25.0),
            _row("M=1", "peftkern", 4.0, ratio=1.0),
            _row("M=1", "bitsandbytes", 3.0, ratio=0.75),
            _row("M=2", "peftkern", 1234.5, ratio=1.0),
            {**_row("M=2", "bitsandbytes", 1.0), "error": "RuntimeError: boom"},
        ],
    }


def _disk_full(handle: int) -> None:
    raise OSError("disk full")


def test_results_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = _fixed_document()
    path = results.write(document, tmp_path)
    assert path == tmp_path / document["device"]["slug"] / "toy.json"
    assert results.read(path) == json.loads(json.dumps(document))
    before = path.read_bytes()
    monkeypatch.setattr(results.os, "fsync", _disk_full)
    with pytest.raises(OSError, match="disk full"):
        results.write({**document, "commit": "other"}, tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["toy.json"]
    with pytest.raises(ValueError, match=r"no results at .*absent.json; run python -m benchmarks --op absent"):
        results.read(tmp_path / "absent.json")
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        results.read(path)


def test_table_shows_wins_losses_and_failures() -> None:
    lines = report.table(_fixed_document()).splitlines()
    assert lines[0] == (
        "NVIDIA H200; torch 2.11.0, bitsandbytes 0.50.2; commit 0123456789ab, 2026-11-23. Ceilings of the same run: "
        "copy 4.28 TB/s, bfloat16 GEMM 680 TFLOP/s. Medians of interleaved rounds, bfloat16, forward, graph; in "
        "brackets a peer's time over peftkern's, so below 1 the peer wins. Not here: unsloth (not installed)."
    )
    assert lines[2] == "| case | floor us | peftkern us | share of floor | extra MB | eager us | bitsandbytes us |"
    assert lines[4] == "| M=1 | 2 | 4 | 50% | 1.5 | 100 (25.00x) | 3 (0.75x) |"
    assert lines[5] == "| M=2 | 2 | 1234 | 0% | 1.5 | - | failed |"


def test_readmes_get_their_tables(tmp_path: Path) -> None:
    found = tmp_path / "results"
    results.write(_fixed_document(), found)
    begin, end = "<!-- benchmark:nvidia-h200/toy/graph:begin -->", "<!-- benchmark:nvidia-h200/toy/graph:end -->"
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{begin}\n{end}\nafter\n")
    assert report.stale_readmes(tmp_path, found) == [readme]
    assert report.update_readmes(tmp_path, found) == [readme]
    text = readme.read_text()
    assert text.startswith(f"before\n{begin}\nNVIDIA H200;")
    assert text.endswith(f"| failed |\n{end}\nafter\n")
    assert report.update_readmes(tmp_path, found) == []
    readme.write_text(text.replace("0.75x", "1.75x"))
    assert report.stale_readmes(tmp_path, found) == [readme]
    readme.write_text(f"{begin}\nno end\n")
    with pytest.raises(ValueError, match=r"README.md has a benchmark marker without its pair"):
        report.update_readmes(tmp_path, found)
    readme.write_text(f"{begin}\n{end}\n".replace("toy", "absent"))
    with pytest.raises(ValueError, match="no results at"):
        report.update_readmes(tmp_path, found)


def test_committed_readmes_hold_what_the_results_say() -> None:
    assert report.stale_readmes() == [], "run: python -m benchmarks --report"


@pytest.mark.parametrize("sweep", [True, False])
def test_plot_is_a_png(tmp_path: Path, sweep: bool) -> None:
    pytest.importorskip("matplotlib")
    drawn = _fixed_document()
    if sweep:
        rows = [_row(f"M={m}", arm, 4.0 + m) for m in (1, 2, 16) for arm in ("peftkern", "eager")]
        drawn["measurements"] = [{**row, "sizes": {"M": int(row["case"][2:]), "K": 8, "N": 8}} for row in rows]
    assert plots.panels(drawn)[0] == sweep
    path = plots.plot(drawn, tmp_path / "toy.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_shows_arms_that_are_not_captured_by_their_eager_time() -> None:
    drawn = _fixed_document()
    drawn["measurements"].append(_row("M=1", "peftkern", 5.0, mode="eager", ratio=1.0))
    drawn["measurements"].append(_row("M=1", "uncaptured", 8.0, mode="eager", ratio=1.6))
    _, [(_, curves)] = plots.panels(drawn)
    assert curves["peftkern"][0] == ("M=1", 0.5)  # the graph's, not the eager 5 us
    assert curves["uncaptured"] == [("M=1", 0.25)]


def _sweep_document() -> dict[str, Any]:
    """Two token counts in both modes; of the peers one fails to be captured and one covers too few cases."""
    document = _fixed_document()
    document["ceilings_after"] = {"copy_bytes_per_s": 4.1e12, "gemm_flops_per_s": {"bfloat16": 6.5e14}}
    rows = []
    for m in (64, 128, 256):
        for mode, ours in (("graph", 4.0), ("eager", 8.0)):
            for arm, times in (("peftkern", 1), ("torch dense", 2), ("bitsandbytes", 3)):
                row = _row(f"M={m}", arm, ours * times, mode=mode, ratio=float(times))
                rows.append(row | {"sizes": {"M": m, "N": 8, "K": 16}})
                if mode == "graph" and arm == "bitsandbytes":
                    rows[-1]["error"] = "RuntimeError: operation not permitted when stream is capturing"
    rows.append(_row("M=64", "eager", 100.0, ratio=25.0) | {"sizes": {"M": 64, "N": 8, "K": 16}})
    document["measurements"] = rows
    return document


def test_few_tokens_are_shown_in_the_graph_and_many_in_eager_mode() -> None:
    lines = report.tokens_table(_sweep_document()).splitlines()
    assert lines[0].endswith(
        "Medians of interleaved rounds, bfloat16, forward; in brackets a peer's time over peftkern's, so below 1 the "
        "peer wins. The same ceilings after the run: copy 4.1 TB/s, bfloat16 GEMM 650 TFLOP/s. Not here: unsloth (not "
        "installed)."
    )
    assert lines[2] == "| shape | M | mode | floor us | peftkern us | x floor | dense cuBLAS us | bitsandbytes us |"
    assert lines[4:] == [
        "| 16->8 | 64 | graph | 2 | 4 | 2.00 | 8 (2.00x) | 24 (3.00x) eager |",
        "| 16->8 | 128 | eager | 2 | 8 | 4.00 | 16 (2.00x) | 24 (3.00x) |",
        "| 16->8 | 256 | eager | 2 | 8 | 4.00 | 16 (2.00x) | 24 (3.00x) |",
    ]


def test_shares_of_the_copy_bandwidth() -> None:
    document = _fixed_document()
    document["measurements"].append(_row("M=2", "uncaptured", 2469.0, mode="eager", ratio=2.0))
    lines = report.bandwidth_table(document).splitlines()
    header = "| case | mode | floor us | peftkern us | share of copy bandwidth |"
    assert lines[2] == f"{header} eager us | share | bitsandbytes us | share | uncaptured us | share |"
    assert lines[4] == "| M=1 | graph | 2 | 4 | 50% | 100 (25.00x) | 2% | 3 (0.75x) | 67% | - | - |"
    assert lines[5] == "| M=2 | graph | 2 | 1234 | 0% | - | - | failed | - | 2469 (2.00x) eager | 0% |"


def test_times_over_the_frozen_layer() -> None:
    document = _fixed_document()
    times = {"torch frozen": 8.0, "peftkern": 8.4, "peft": 12.0}
    training = {"mode": "eager", "ratio": 1.0, "pass": "forward+backward"}
    document["measurements"] = [_row("r16", arm, us, **training) for arm, us in times.items()]
    document["measurements"].append({**_row("r16", "compiled", 9.0, **training), "error": "RuntimeError"})
    document["measurements"].append(
        _row("r16", "peftkern", 1.0, mode="eager", ratio=1.0)
    )  # the forward alone: not here
    lines = report.frozen_table(document).splitlines()
    assert lines[0].endswith(
        "of each arm its time over that of the frozen layer alone, and in brackets what it holds beside its arguments. "
        "Not here: unsloth (not installed)."
    )
    assert lines[2] == "| case | torch frozen us | peftkern / frozen | peft / frozen | compiled / frozen |"
    assert lines[4:] == ["| r16 | 8 (1.5 MB) | 1.05 (1.5 MB) | 1.50 (1.5 MB) | failed |"]
    del document["measurements"][1]["peak_extra_bytes"]
    assert report.frozen_table(document).splitlines()[4] == "| r16 | 8 (1.5 MB) | 1.05 | 1.50 (1.5 MB) | failed |"
    document["checks"] = {"passed": False, "failures": ["toy"]}
    assert (
        report.frozen_table(document)
        .splitlines()[4]
        .startswith("| r16 | 8 (1.5 MB) | 8.4 us (withheld) | 12 us (withheld)")
    )


def test_withheld_ratios_and_failures_of_ours_are_shown() -> None:
    document = _sweep_document()
    document["checks"] = {"passed": False, "failures": ["toy"]}
    document["measurements"] = [
        {**row, "error": "RuntimeError: no kernel"} if row["arm"] == "peftkern" else {**row, "ratio": None}
        for row in document["measurements"]
    ]
    line = report.tokens_table(document).splitlines()[4]
    assert line == "| 16->8 | 64 | graph | 2 | failed | - | 8 (withheld) | 24 (withheld) eager |"


def test_a_view_shows_one_dtype() -> None:
    document = _fixed_document()
    document["measurements"].append(_row("M=1", "peftkern", 5.0, ratio=1.0) | {"dtype": "float16"})
    with pytest.raises(ValueError, match="one dtype and pass"):
        report.bandwidth_table(document)


def test_every_gpu_with_results_is_shown(tmp_path: Path) -> None:
    found = tmp_path / "benchmarks" / "results"
    readme = tmp_path / "peftkern" / "ops" / "toy" / "README.md"
    readme.parent.mkdir(parents=True)
    begin, end = "<!-- benchmark:gpu/toy/bandwidth:begin -->\n", "<!-- benchmark:gpu/toy/bandwidth:end -->\n"
    readme.write_text(begin + end)
    assert report.stale_readmes(tmp_path, found) == []
    for kind, name in (("cuda", "NVIDIA H200"), ("cuda", "NVIDIA H100 80GB HBM3"), ("cpu", "Xeon")):
        document = _fixed_document()
        slug = name.lower().replace(" ", "-")
        results.write({**document, "device": {"type": kind, "name": name, "slug": slug, "threads": 2}}, found)
    (found / "nvidia-h200" / "toy.png").touch()
    assert report.update_readmes(tmp_path, found) == [readme]
    text = readme.read_text()
    assert text.index("NVIDIA H100 80GB HBM3;") < text.index("NVIDIA H200;")
    assert "Xeon" not in text
    assert text.count("![") == 1
    assert "](../../../benchmarks/results/nvidia-h200/toy.png)\n" + end in text
    assert report.stale_readmes(tmp_path, found) == []


def test_plot_of_a_sweep_has_a_panel_per_shape_and_the_tables_modes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    document = _sweep_document()
    wide = [{**row, "case": f"wide {row['case']}"} for row in document["measurements"]]
    document["measurements"] += [{**row, "sizes": {**row["sizes"], "N": 32}} for row in wide]
    sweep, found = plots.panels(document)
    assert sweep
    assert [title for title, _ in found] == ["16->8, bfloat16, forward", "16->32, bfloat16, forward"]
    for _, curves in found:
        assert curves == {
            "peftkern": [(64, 0.5), (128, 0.25), (256, 0.25)],
            "dense cuBLAS": [(64, 0.25), (128, 0.125), (256, 0.125)],
            "bitsandbytes": [(64, 2 / 24), (128, 2 / 24), (256, 2 / 24)],
        }
    assert plots.plot(document, tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")
