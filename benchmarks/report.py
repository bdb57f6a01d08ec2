"""Text from results: lines for the terminal and tables for the READMEs.

A README asks for a table by two comment lines, and everything between them is generated:

    <!-- benchmark:nvidia-h200/nf4_dequantize:begin -->
    <!-- benchmark:nvidia-h200/nf4_dequantize:end -->

The name is DEVICE/OP, DEVICE/OP/MODE, or compare/DEVICE for the comparison of methods.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import comparison
from benchmarks.results import OURS, RESULTS, arms, read

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(
    r"(?P<begin><!-- benchmark:(?P<name>[^\s:]+):begin -->\n)(?P<body>.*?)(?P<end><!-- benchmark:(?P=name):end -->)",
    re.DOTALL,
)
_MARKER = re.compile(r"<!-- benchmark:[^>]*-->")
WITHHELD = "withheld: checks failed"


def readmes(root: Path = ROOT) -> list[Path]:
    """The project's README and the ops'."""
    return [path for path in (root / "README.md", *sorted(root.glob("peftkern/ops/*/README.md"))) if path.exists()]


def update_readmes(root: Path = ROOT, results: Path = RESULTS) -> list[Path]:
    """Rewrites the tables of every README; returns the files that changed.

    Raises:
        ValueError: a marker without its pair, or one that names results that do not exist.
    """
    changed = []
    for path in readmes(root):
        text = path.read_text()
        new = regenerate(text, results, str(path.relative_to(root)))
        if new != text:
            path.write_text(new)
            changed.append(path)
    return changed


def stale_readmes(root: Path = ROOT, results: Path = RESULTS) -> list[Path]:
    """READMEs whose tables are not what the results say."""
    return [p for p in readmes(root) if regenerate(p.read_text(), results, str(p.relative_to(root))) != p.read_text()]


def regenerate(text: str, results: Path, where: str) -> str:
    """The text with every table made anew."""
    blocks = list(_BLOCK.finditer(text))
    if len(_MARKER.findall(text)) != 2 * len(blocks):
        raise ValueError(f"benchmarks: {where} has a benchmark marker without its pair; write both begin and end")
    return _BLOCK.sub(lambda m: f"{m['begin']}{_named_table(m['name'], results)}{m['end']}", text)


def _named_table(name: str, results: Path) -> str:
    device, _, rest = name.partition("/")
    if device == comparison.FOLDER:
        return comparison.table(comparison.read(results / device / rest / "compare.json"))
    op, _, mode = rest.partition("/")
    return table(read(results / device / f"{op}.json"), mode or None)


def table(document: dict[str, Any], mode: str | None = None) -> str:
    """A Markdown table with a line on its conditions; every case measured is in it."""
    rows = [row for row in document["measurements"] if mode in (None, row["mode"])]
    names = [name for name in arms(document) if any(row["arm"] == name for row in rows)]
    groups: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["dtype"], row["pass"], row["mode"]), {})[row["arm"]] = row
    # A column that never varies goes into the line above the table.
    labels = ("case", "dtype", "pass", "mode")
    shown = [i for i in range(4) if i == 0 or len({key[i] for key in groups}) > 1]
    constant = [next(iter(groups))[i] for i in range(1, 4) if i not in shown] if groups else []
    header = [labels[i] for i in shown] + ["floor us", f"{OURS} us", "share of floor", "extra MB"]
    header += [f"{name} us" for name in names if name != OURS]
    lines = [_conditions(document, constant), "", _line(header), _line(["---"] * len(header))]
    passed = document["checks"]["passed"]
    for key, group in groups.items():
        ours = group.get(OURS, {})
        floor = next((row["floor_us"] for row in group.values() if "floor_us" in row), None)
        cells = [key[i] for i in shown] + [_number(floor), _time(ours), _share(ours), _megabytes(ours)]
        cells += [_peer_cell(group.get(name), passed) for name in names if name != OURS]
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _conditions(document: dict[str, Any], constant: list[str]) -> str:
    versions, device, ceilings = document["versions"], document["device"], document["ceilings"]
    packages = [f"{name} {versions[name]}" for name in versions if name not in ("python", "driver", "cuda", OURS)]
    rates = [f"{name} GEMM {rate / 1e12:.3g} TFLOP/s" for name, rate in ceilings["gemm_flops_per_s"].items()]
    dirty = " with changes" if document["dirty"] else ""
    where = device["name"] + (f", {device['threads']} threads" if device["type"] == "cpu" else "")
    text = (
        f"{where}; {', '.join(packages)}; commit {document['commit'][:12]}{dirty}, {document['date'][:10]}. "
        f"Ceilings of the same run: copy {ceilings['copy_bytes_per_s'] / 1e12:.3g} TB/s, {', '.join(rates)}. "
        f"Medians of interleaved rounds{''.join(f', {name}' for name in constant)}; "
        f"in brackets a peer's time over {OURS}'s, so below 1 the peer wins."
    )
    if document["missing_peers"]:
        missing = (f"{name} ({why})" for name, why in document["missing_peers"].items())
        text += f" Not here: {', '.join(missing)}."
    return text if document["checks"]["passed"] else f"{text} Speedups {WITHHELD}."


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    """Three significant digits, never an exponent."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _time(row: dict[str, Any]) -> str:
    return "failed" if "error" in row else _number(row.get("median_us"))


def _share(row: dict[str, Any]) -> str:
    return f"{row['share_of_floor']:.0%}" if "share_of_floor" in row else "-"


def _megabytes(row: dict[str, Any]) -> str:
    nbytes = row.get("peak_extra_bytes")
    return "-" if nbytes is None else f"{nbytes / 1e6:.1f}"


def _peer_cell(row: dict[str, Any] | None, passed: bool) -> str:
    if row is None:
        return "-"
    if "error" in row:
        return "failed"
    if not passed:
        return f"{_time(row)} (withheld)"
    return _time(row) if row["ratio"] is None else f"{_time(row)} ({row['ratio']:.2f}x)"


def terminal(document: dict[str, Any]) -> Iterator[str]:
    """A line per measurement, under a heading per op."""
    device, ceilings = document["device"], document["ceilings"]
    rates = "".join(f", {name} {rate / 1e12:.4g} TFLOP/s" for name, rate in ceilings["gemm_flops_per_s"].items())
    passed = document["checks"]["passed"]
    yield (
        f"{document['op']} on {device['name']}: copy {ceilings['copy_bytes_per_s'] / 1e9:.4g} GB/s{rates}, checks "
        + ("passed" if passed else "FAILED")
    )
    name = max([len(row["case"]) for row in document["measurements"]], default=4)
    arm = max([len(row["arm"]) for row in document["measurements"]], default=4)
    yield (
        f"  {'case':{name}}  {'dtype':8}  {'pass':16}  {'mode':5}  {'arm':{arm}}  {'median us':>10}  {'p10':>10}  "
        f"{'p90':>10}  {'floor':>9}  {'share':>6}  {'vs ours':>8}  {'extra MB':>9}"
    )
    for row in document["measurements"]:
        start = f"  {row['case']:{name}}  {row['dtype']:8}  {row['pass']:16}  {row['mode']:5}  {row['arm']:{arm}}  "
        if "error" in row:
            yield start + f"failed: {row['error']}"
            continue
        ratio = "" if row["arm"] == OURS else WITHHELD if row["ratio"] is None else f"{row['ratio']:.2f}x"
        yield start + (
            f"{row['median_us']:10.2f}  {row['p10_us']:10.2f}  {row['p90_us']:10.2f}  {row['floor_us']:9.2f}  "
            f"{_share(row):>6}  {ratio:>8}  {_megabytes(row):>9}"
        )
