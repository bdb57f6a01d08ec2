"""The benchmark harness: order, arithmetic, files and tables; and the READMEs hold what the results say."""

from __future__ import annotations

import contextlib
import itertools
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import arms, environment, peers, report, results, runner, timing
from benchmarks.ceilings import Ceilings
from peftkern.testing.spec import Case, Spec, all_specs

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e10, {"float32": 1e11, "bfloat16": 2e11})


def _make(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Any]:
    return {"x": torch.full((case.sizes["M"], 8), 2.0, dtype=dtype, device=device), "w": torch.ones(8, dtype=dtype)}


def _product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * w


SPEC = Spec(
    op="toy",
    cases=(Case("test", {"M": 2}), *(Case(f"M={m}", {"M": m, "K": 8, "N": 8}, bench=True) for m in (1, 4, 16))),
    make=_make,
    run=_product,
    reference=_product,
    bytes=lambda case, dtype: 1000 * case.sizes["M"],
    flops=lambda case, dtype: 10,
    dtypes=(torch.float32,),
    grads=("x", "w"),
    baselines={"eager": _product},
    train_bytes=lambda case, dtype: 3000 * case.sizes["M"],
    train_flops=lambda case, dtype: 30,
)


def _fail(args: dict[str, Any]) -> peers.Prepared:
    raise RuntimeError("no such kernel\ndetails")


def _refuse(args: dict[str, Any]) -> peers.Prepared:
    raise peers.NotApplicable("never")


def _slow(args: dict[str, Any]) -> peers.Prepared:
    x, w = args["x"], args["w"]

    def call() -> torch.Tensor:
        time.sleep(0.002)
        return x * w

    return peers.Prepared(call, (x, w))


PEER = peers.Peer(
    "toypeer",
    "torch",
    {"toy": {"": peers.Adapter(_slow), "broken": peers.Adapter(_fail), "unable": peers.Adapter(_refuse)}},
)


def _settings(**changes: Any) -> runner.Settings:
    values = {"device": CPU, "dtypes": (torch.float32,), "modes": ("cpu",), "budget_s": 0.01, **changes}
    return runner.Settings(**values)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return runner.run(SPEC, _settings(given_commit="abc123"), [PEER], CEILINGS, lambda line: None)


class _Clock:
    """Stands in for torch.cuda: events read a clock that only `work` advances."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, []
        self.captured: list[str] = []
        self.fail_capture = False

    def work(self, name: str, ms: float) -> timing.Call:
        def call() -> torch.Tensor:
            self.log.append(name)
            self.now += ms
            return torch.zeros(1)

        return call

    def Event(self, enable_timing: bool) -> Any:
        clock = self

        class Event:
            time = 0.0

            def record(self) -> None:
                clock.log.append("event")
                self.time = clock.now

            def elapsed_time(self, end: Any) -> float:
                return end.time - self.time

        return Event()

    def synchronize(self) -> None:
        self.log.append("sync")

    def Stream(self) -> Any:
        return SimpleNamespace(wait_stream=lambda other: None)

    def current_stream(self) -> Any:
        return SimpleNamespace(wait_stream=lambda other: None)

    def set_stream(self, stream: Any) -> None:
        self.log.append("stream restored")

    def stream(self, stream: Any) -> Any:
        return contextlib.nullcontext()

    def CUDAGraph(self) -> Any:
        def replay() -> None:
            self.log.append("replay")
            self.now += 12.0

        return SimpleNamespace(replay=replay)

    @contextlib.contextmanager
    def graph(self, graph: Any, stream: Any) -> Any:
        if self.fail_capture:
            raise RuntimeError("capture failed")
        yield


def test_rounds_are_interleaved_and_the_first_is_not_counted() -> None:
    order: list[str] = []

    def sampler(name: str) -> Any:
        return SimpleNamespace(sample=lambda: order.append(name) or float(len(order)))

    times, errors = timing.interleave({n: sampler(n) for n in "ABC"}, budget_s=10, max_rounds=4)
    assert "".join(order) == "ABC" * 5
    assert {name: len(samples) for name, samples in times.items()} == {"A": 4, "B": 4, "C": 4}
    assert times["A"][0] == 4.0
    assert errors == {}
    times, _ = timing.interleave({"A": sampler("A")}, budget_s=0)
    assert len(times["A"]) == 3  # whatever it costs


def test_an_arm_that_fails_is_dropped_and_named() -> None:
    def fail() -> float:
        raise RuntimeError("out of\nmemory")

    samplers = {"good": SimpleNamespace(sample=lambda: 1.0), "bad": SimpleNamespace(sample=fail)}
    times, errors = timing.interleave(samplers, budget_s=0)
    assert times == {"good": [1.0, 1.0, 1.0]}
    assert errors == {"bad": "RuntimeError: out of"}
    assert timing.interleave({"bad": samplers["bad"]}, budget_s=60)[0] == {}


@pytest.mark.parametrize(("host_us", "flushes"), [(10.0, 2), (49.0, 2), (250.0, 6)])
def test_eager_times_the_call_alone_behind_flushes_that_outlast_its_launch(host_us, flushes, monkeypatch) -> None:
    clock = _Clock()
    host = itertools.count(0, int(host_us * 1e3))
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: next(host))
    calls = [clock.work("a", 3.0), clock.work("b", 5.0)]
    sampler = timing.EagerSampler(calls, clock.work("flush", 0.1), cuda=clock)
    clock.log.clear()
    assert [sampler.sample() for _ in range(3)] == pytest.approx([3000.0, 5000.0, 3000.0])
    assert clock.log[: flushes + 4] == ["flush"] * flushes + ["event", "a", "event", "sync"]


def test_graph_replays_all_copies_and_divides() -> None:
    clock = _Clock()
    sampler = timing.GraphSampler([clock.work("a", 1.0)] * 3, clock.work("flush", 100.0), cuda=clock)
    assert clock.log.count("a") == 2 + 3  # two to warm up on the side stream, three captured
    clock.log.clear()
    assert sampler.sample() == pytest.approx(4000.0)
    assert clock.log == ["flush", "event", "replay", "event", "sync"]


def test_a_failed_capture_gives_the_stream_back() -> None:
    clock = _Clock()
    clock.fail_capture = True
    with pytest.raises(RuntimeError, match="capture failed"):
        timing.GraphSampler([clock.work("a", 1.0)], clock.work("flush", 1.0), cuda=clock)
    assert clock.log[-1] == "stream restored"


def test_wall_waits_for_an_idle_device_on_both_sides() -> None:
    clock = _Clock()
    timing.WallSampler([clock.work("a", 1.0)], clock.work("flush", 1.0), cuda=clock).sample()
    assert clock.log == ["flush", "sync", "a", "sync"]


def test_peak_memory_counts_what_is_alive_together() -> None:
    def call() -> torch.Tensor:
        first = torch.ones(250_000)
        second = first + 1
        del first
        return second + 1

    call()
    assert 2_000_000 <= timing.peak_extra_bytes(call, CPU) < 2_100_000


def test_floor_is_the_larger_of_bytes_and_flops() -> None:
    assert CEILINGS.floor_us(10_000, 0, torch.float32) == pytest.approx(1.0)
    assert CEILINGS.floor_us(10_000, 10**9, torch.float32) == pytest.approx(1e4)
    assert CEILINGS.floor_us(10_000, 10**9, torch.bfloat16) == pytest.approx(5e3)


def test_baselines_are_timed_where_the_spec_says(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(SPEC, times_baselines=lambda case: case.sizes["M"] == 4)
    rows = runner.run(spec, _settings(), [PEER], CEILINGS, lambda line: None)["measurements"]
    assert {row["case"] for row in rows if row["arm"] == "eager"} == {"M=4"}
    assert {row["case"] for row in rows if row["arm"] == "peftkern"} == {"M=1", "M=4", "M=16"}


def test_the_forward_alone_and_graphs_are_timed_where_the_spec_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "make_sampler", lambda mode, calls, flush: timing.CpuSampler(calls))
    spec = replace(SPEC, times_forward=lambda case: case.sizes["M"] == 4)
    rows = runner.run(spec, _settings(modes=("eager", "graph")), [], CEILINGS, lambda line: None)["measurements"]
    seen = {(row["case"], row["pass"], row["mode"]) for row in rows}
    both = {("M=4", name, mode) for name in (arms.FORWARD, arms.TRAINING) for mode in ("eager", "graph")}
    assert seen == both | {(f"M={m}", arms.TRAINING, "eager") for m in (1, 16)}


def test_an_op_is_measured_and_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "select_specs", lambda names: [SPEC])
    monkeypatch.setattr(cli.ceilings, "measure", lambda device, dtypes: CEILINGS)
    arguments = ["--op", "toy", "--device", "cpu", "--peers", "none", "--dtype", "float32", "--quick"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/toy.json")
    assert f"wrote {path}" in capsys.readouterr().out
    document = results.read(path)
    assert document["ceilings"]["copy_bytes_per_s"] == 1e10
    assert all(row["runs"] >= 15 for row in document["measurements"])


def test_copies_exceed_the_cache_and_share_nothing() -> None:
    args = {"x": torch.zeros(1 << 20), "q": [torch.zeros(4)], "n": 3}
    assert arms.count_copies(args, "cuda") * 4 * (1 << 20) > 200_000_000
    assert arms.count_copies({"x": torch.zeros(1)}, "cuda") == arms.MAX_COPIES["cuda"]
    assert arms.count_copies({"x": torch.empty(1 << 33, device="meta")}, "cuda") == 2
    copy = arms.clone(args, grads=("x",))
    copy["q"][0].fill_(1)
    assert args["q"][0].sum() == 0
    assert copy["x"].requires_grad
    assert not args["x"].requires_grad


def test_run_records_every_arm_case_and_pass(document: dict[str, Any]) -> None:
    assert document["checks"] == {"passed": True, "failures": []}
    assert document["commit"] == "abc123"
    assert document["device"]["threads"] == torch.get_num_threads()
    rows = document["measurements"]
    seen = {(row["case"], row["pass"], row["arm"]) for row in rows}
    names = ("peftkern", "eager", "toypeer", "toypeer broken")  # "unable" has nothing to time
    assert seen == {(f"M={m}", p, n) for m in (1, 4, 16) for p in (arms.FORWARD, arms.TRAINING) for n in names}
    for row in rows:
        if row["arm"] == "toypeer broken":
            assert row["error"] == "RuntimeError: no such kernel"
            continue
        assert row["bytes"] == row["sizes"]["M"] * (1000 if row["pass"] == arms.FORWARD else 3000)
        assert row["floor_us"] == pytest.approx(row["bytes"] / 1e4, abs=1e-3)
        assert row["share_of_floor"] == pytest.approx(row["floor_us"] / row["median_us"], rel=1e-2)
        assert row["p10_us"] <= row["median_us"] <= row["p90_us"]
        assert row["runs"] >= 3
        assert row["peak_extra_bytes"] >= 0
        assert row["ratio"] > 0
        assert row["ratio"] == 1 or row["arm"] != "peftkern"
        assert row["ratio"] > 2 or row["arm"] != "toypeer"  # its time over ours


def test_graph_mode_takes_only_what_may_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_sampler(mode: str, calls: list[timing.Call], flush: timing.Call) -> timing.Sampler:
        if mode == "graph":
            raise RuntimeError("operation not permitted when stream is capturing")
        return timing.CpuSampler(calls)

    monkeypatch.setattr(timing, "make_sampler", make_sampler)
    settings = _settings(modes=("eager", "graph"), case_filter=("M=4",))
    spec = replace(SPEC, train_bytes=None, train_flops=None)
    rows = runner.run(spec, settings, [PEER], CEILINGS, lambda line: None)["measurements"]
    found = {(row["mode"], row["arm"]): row.get("error") for row in rows}
    assert found == {
        ("eager", "peftkern"): None,
        ("eager", "eager"): None,
        ("eager", "toypeer"): None,
        ("eager", "toypeer broken"): "RuntimeError: no such kernel",
        ("graph", "peftkern"): "RuntimeError: operation not permitted when stream is capturing",
        ("graph", "toypeer"): "RuntimeError: operation not permitted when stream is capturing",
        ("graph", "toypeer broken"): "RuntimeError: no such kernel",
    }


def test_forward_and_backward_reach_every_gradient() -> None:
    job = arms.Job(SPEC, SPEC.bench_cases()[0], torch.float32, CPU, training=True)
    ours = arms.arms_of(SPEC, "cpu", [])[0]
    (call,) = arms.calls(job, ours, job.arguments(), 1)
    _, (dx, dw) = call()
    assert dx.shape == (1, 8)
    assert dw.shape == (8,)


def test_speedups_are_withheld_while_checks_fail() -> None:
    wrong = replace(SPEC, run=lambda x, w: x + w + 1, train_bytes=None, train_flops=None)
    lines: list[str] = []
    found = runner.run(wrong, _settings(), [PEER], CEILINGS, lines.append)
    assert not found["checks"]["passed"]
    assert any(line.startswith("check failed: toy [test, float32]: output: max error") for line in lines)
    timed = [row for row in found["measurements"] if "error" not in row]
    assert timed
    assert all(row["ratio"] is None and row["median_us"] > 0 for row in timed)
    assert "x)" not in report.table(found)
    assert report.WITHHELD in report.table(found)
    assert report.WITHHELD in "\n".join(report.terminal(found))


def test_ops_are_selected_by_name_or_folder() -> None:
    assert {"nf4_quantize", "nf4_dequantize", "nf4_matmul", "nf4_matmul_dx"} == {s.op for s in cli.select_specs("nf4")}
    assert [s.op for s in cli.select_specs("nf4_dequantize")] == ["nf4_dequantize"]
    assert {s.op for s in cli.select_specs("")} == set(all_specs())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "nf5"], "no op 'nf5'"),
        (["--op", "nf4", "--peers", "nobody"], "no peer 'nobody'"),
        (["--op", "nf4", "--dtype", "int4"], "--dtype 'int4' is not one of"),
        (["--op", "nf4", "--device", "cpu", "--modes", "graph"], "--modes 'graph' is not one of cpu"),
        (["--op", "nf4", "--budget", "0"], "--budget must be a positive number"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_paging_on_the_cpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--op", "paged_adamw8bit", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error == "benchmarks: paged_adamw8bit needs --device cuda, got cpu; time adamw8bit there\n"


def test_cuda_without_a_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.main(["--op", "nf4", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "benchmarks: --device cuda, but torch finds no CUDA device; use --device cpu\n"


def test_missing_peers_are_named_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {
        "absent": peers.Peer("absent", "no_such_package"),
        "child": peers.Peer("child", "no_such", own_process=True),
    }
    monkeypatch.setattr(peers, "PEER_FILES", {"torch": "torch_baseline", **dict.fromkeys(absent, "")})
    load = peers.load
    monkeypatch.setattr(peers, "load", lambda name: absent.get(name) or load(name))
    usable, missing = cli.select_peers(None)
    assert [peer.name for peer in usable] == ["torch"]
    assert missing == {"absent": "not installed", "child": "not installed"}


def test_partial_runs_are_not_taken_for_complete_ones() -> None:
    def partial(*arguments: str) -> bool:
        return cli.make_settings(cli.parser().parse_args(["--device", "cpu", *arguments]), {}).partial

    assert not partial()
    assert not partial("--peers", "bitsandbytes")
    assert partial("--quick")
    assert partial("--case", "M=1")
    assert partial("--dtype", "float32")


def test_cases_are_filtered_and_thinned() -> None:
    assert [c.name for c in runner.select_cases(SPEC, _settings(case_filter=("=4", "=16")))] == ["M=4", "M=16"]
    assert [c.name for c in runner.select_cases(SPEC, _settings(max_cases=2))] == ["M=1", "M=16"]


def test_commit_is_known_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.commit("abc") == {"commit": "abc", "dirty": None}
    monkeypatch.setattr(environment, "_output", lambda *command: None)
    assert environment.commit() == {"commit": "unknown", "dirty": None}


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "intel-xeon-platinum-8481c"),
        ("AMD EPYC 9B14", "amd-epyc-9b14"),
    ],
)
def test_slugs(name: str, slug: str) -> None:
    assert environment.slug(name) == slug
