"""Text from results: lines for the terminal and tables for the READMEs.

A README asks for a table by two comment lines, and everything between them is generated:

    <!-- benchmark:nvidia-h200/nf4_dequantize:begin -->
    <!-- benchmark:nvidia-h200/nf4_dequantize:end -->

The name is DEVICE/OP, DEVICE/OP/VIEW, or compare/DEVICE for the comparison of methods. A view is a mode, "tokens" (a
line per shape and number of tokens), "bandwidth" (shares of the copy bandwidth) or "frozen" (times over those of the
layer without its adapter). The device "gpu" stands for every
GPU with results of the op, plots included; while there are none, nothing is written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import comparison
from benchmarks.arms import TRAINING
from benchmarks.results import FROZEN, OURS, RESULTS, arms, best_rows, common_arms, label, read

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(
    r"(?P<begin><!-- benchmark:(?P<name>[^\s:]+):begin -->\n)(?P<body>.*?)(?P<end><!-- benchmark:(?P=name):end -->)",
    re.DOTALL,
)
_MARKER = re.compile(r"<!-- benchmark:[^>]*-->")
WITHHELD = "withheld: checks failed"
EVERY_GPU = "gpu"


def readmes(root: Path = ROOT) -> list[Path]:
    """The project's README, the ops' and the optimizers'."""
    own = (root / "README.md", root / "peftkern/optim/README.md")
    return [path for path in (*own, *sorted(root.glob("peftkern/ops/*/README.md"))) if path.exists()]


def update_readmes(root: Path = ROOT, results: Path = RESULTS) -> list[Path]:
    """Rewrites the tables of every README; returns the files that changed.

    Raises:
        ValueError: a marker without its pair, or one that names results that do not exist.
    """
    changed = []
    for path in readmes(root):
        text = path.read_text()
        new = regenerate(text, results, path)
        if new != text:
            path.write_text(new)
            changed.append(path)
    return changed


def stale_readmes(root: Path = ROOT, results: Path = RESULTS) -> list[Path]:
    """READMEs whose tables are not what the results say."""
    return [path for path in readmes(root) if regenerate(path.read_text(), results, path) != path.read_text()]


def regenerate(text: str, results: Path, readme: Path) -> str:
    """The text with every table made anew."""
    blocks = list(_BLOCK.finditer(text))
    if len(_MARKER.findall(text)) != 2 * len(blocks):
        raise ValueError(f"benchmarks: {readme} has a benchmark marker without its pair; write both begin and end")
    return _BLOCK.sub(lambda m: f"{m['begin']}{_named_table(m['name'], results, readme.parent)}{m['end']}", text)


def _named_table(name: str, results: Path, folder: Path) -> str:
    device, _, rest = name.partition("/")
    if device == comparison.FOLDER:
        return comparison.table(comparison.read(results / device / rest / "compare.json"))
    op, _, view = rest.partition("/")
    if device != EVERY_GPU:
        return _view(read(results / device / f"{op}.json"), view)
    texts = []
    for path in sorted(results.glob(f"*/{op}.json")):
        document, png = read(path), path.with_suffix(".png")
        if document["device"]["type"] != "cuda":
            continue
        texts.append(_view(document, view))
        if png.exists():
            title = f"{op} on {document['device']['name']}: share of the floor"
            texts.append(f"![{title}]({Path(os.path.relpath(png, folder)).as_posix()})\n")
    return "\n".join(texts)


def _view(document: dict[str, Any], view: str) -> str:
    tables = {"tokens": tokens_table, "bandwidth": bandwidth_table, "frozen": frozen_table}
    if view in tables:
        return tables[view](document)
    return table(document, view or None)


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


def tokens_table(document: dict[str, Any]) -> str:
    """A matmul's times by shape and tokens, each in the mode to look at (`results.best_rows`)."""
    groups, names, constant = _best(document)
    header = ["shape", "M", "mode", "floor us", f"{OURS} us", "x floor", *(f"{label(document, n)} us" for n in names)]
    lines = [_conditions(document, constant), "", _line(header), _line(["---"] * len(header))]
    for group in groups:
        first, ours = next(iter(group.values())), group.get(OURS, {})
        sizes, mode = first["sizes"], ours.get("mode", first["mode"])
        measured = "median_us" in ours and "error" not in ours
        times = f"{ours['median_us'] / ours['floor_us']:.2f}" if measured else "-"
        cells = [f"{sizes['K']}->{sizes['N']}", str(sizes["M"]), mode, _floor(group), _time(ours), times]
        lines.append(_line(cells + [_best_cell(group.get(name), mode, document) for name in names]))
    return "\n".join(lines) + "\n"


def bandwidth_table(document: dict[str, Any]) -> str:
    """Times of an op that only moves bytes, with everyone's share of the copy bandwidth."""
    groups, names, constant = _best(document)
    header = ["case", "mode", "floor us", f"{OURS} us", "share of copy bandwidth"]
    for name in names:
        header += [f"{label(document, name)} us", "share"]
    lines = [_conditions(document, constant), "", _line(header), _line(["---"] * len(header))]
    for group in groups:
        first, ours = next(iter(group.values())), group.get(OURS, {})
        mode = ours.get("mode", first["mode"])
        cells = [first["case"], mode, _floor(group), _time(ours), _share(ours)]
        for name in names:
            cells += [_best_cell(group.get(name), mode, document), _share(group.get(name, {}))]
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def frozen_table(document: dict[str, Any]) -> str:
    """An adapter's cost in training: everyone's time over the frozen layer's, the GEMM library's without an adapter."""
    groups, names, constant = _best(document, TRAINING)
    names = [OURS, *(name for name in names if name != FROZEN)]
    header = ["case", f"{FROZEN} us", *(f"{label(document, name)} / frozen" for name in names)]
    reading = (
        "of each arm its time over that of the frozen layer alone, and in brackets what it holds beside its arguments"
    )
    lines = [_conditions(document, constant, reading), "", _line(header), _line(["---"] * len(header))]
    for group in groups:
        first, frozen = next(iter(group.values())), group.get(FROZEN, {})
        cells = [first["case"], _time(frozen) + _held(frozen)]
        lines.append(_line(cells + [_over(group.get(name, {}), frozen, document) for name in names]))
    return "\n".join(lines) + "\n"


def _over(row: dict[str, Any], frozen: dict[str, Any], document: dict[str, Any]) -> str:
    if "error" in row or not {"median_us"} <= row.keys() & frozen.keys():
        return _time(row)
    if not document["checks"]["passed"]:
        return f"{_time(row)} us (withheld)"
    return f"{row['median_us'] / frozen['median_us']:.2f}" + _held(row)


def _held(row: dict[str, Any]) -> str:
    return f" ({_megabytes(row)} MB)" if "peak_extra_bytes" in row else ""


def _best(
    document: dict[str, Any], pass_name: str | None = None
) -> tuple[list[dict[str, dict[str, Any]]], list[str], list[str]]:
    """The rows to show, by arm for each case; the arms besides ours; dtype and pass, which must not vary."""
    rows = [row for row in best_rows(document) if pass_name in (None, row["pass"])]
    groups: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["dtype"], row["pass"]), {})[row["arm"]] = row
    kinds = list(dict.fromkeys(key[1:] for key in groups))
    if len(kinds) > 1:
        raise ValueError(f"benchmarks: {document['op']} was measured in {kinds}; this view shows one dtype and pass")
    names = [name for name in common_arms(document, rows) if name != OURS]
    return list(groups.values()), names, list(kinds[0]) if kinds else []


def _floor(group: dict[str, dict[str, Any]]) -> str:
    return _number(next((row["floor_us"] for row in group.values() if "floor_us" in row), None))


def _best_cell(row: dict[str, Any] | None, mode: str, document: dict[str, Any]) -> str:
    cell = _peer_cell(row, document["checks"]["passed"])
    return cell if row is None or "error" in row or row["mode"] == mode else f"{cell} {row['mode']}"


_READING = f"in brackets a peer's time over {OURS}'s, so below 1 the peer wins"


def _conditions(document: dict[str, Any], constant: list[str], reading: str = _READING) -> str:
    versions, device = document["versions"], document["device"]
    packages = [f"{name} {versions[name]}" for name in versions if name not in ("python", "driver", "cuda", OURS)]
    dirty = " with changes" if document["dirty"] else ""
    where = device["name"] + (f", {device['threads']} threads" if device["type"] == "cpu" else "")
    text = (
        f"{where}; {', '.join(packages)}; commit {document['commit'][:12]}{dirty}, {document['date'][:10]}. "
        f"Ceilings of the same run: {_ceilings(document['ceilings'])}. "
        f"Medians of interleaved rounds{''.join(f', {name}' for name in constant)}; {reading}."
    )
    if "ceilings_after" in document:
        text += f" The same ceilings after the run: {_ceilings(document['ceilings_after'])}."
    if document["missing_peers"]:
        missing = (f"{name} ({why})" for name, why in document["missing_peers"].items())
        text += f" Not here: {', '.join(missing)}."
    return text if document["checks"]["passed"] else f"{text} Speedups {WITHHELD}."


def _ceilings(ceilings: dict[str, Any]) -> str:
    rates = [f"{name} GEMM {rate / 1e12:.3g} TFLOP/s" for name, rate in ceilings["gemm_flops_per_s"].items()]
    return ", ".join([f"copy {ceilings['copy_bytes_per_s'] / 1e12:.3g} TB/s", *rates, *_links(ceilings)])


def _links(ceilings: dict[str, Any]) -> list[str]:
    rates = sorted(rate / 1e9 for rate in ceilings.get("link_bytes_per_s", ()))
    return [f"link {rates[0]:.1f} to {rates[-1]:.1f} GB/s each way"] if rates else []


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
    return f"{row['share_of_floor']:.0%}" if "share_of_floor" in row and "error" not in row else "-"


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
    rates += "".join(f", {link}" for link in _links(ceilings))
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
