"""The 8-bit AdamW op: exact codes, accuracy against float64, skipped steps, every way to call it."""

from __future__ import annotations

import bisect
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkern import adamw8bit_step_
from peftkern.ops._code_tables import DYNAMIC_MAP_SIGNED, DYNAMIC_MAP_UNSIGNED, dynamic_map
from peftkern.ops.adamw8bit import reference
from peftkern.ops.adamw8bit.spec import SPECS
from peftkern.testing.numerics import assert_within
from peftkern.testing.spec import Case

(SPEC,) = SPECS
ROOT = Path(__file__).resolve().parents[2]
STATES = ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(case: str | dict[str, Any], dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Any]:
    if isinstance(case, dict):
        return SPEC.make(Case("here", case), dtype, device, seed)
    return SPEC.make(next(c for c in SPEC.cases if c.name == case), dtype, device, seed)


def written(args: dict[str, Any]) -> list[torch.Tensor]:
    return [t for name in ("params", *STATES) for t in args[name]]


def clones(args: dict[str, Any]) -> dict[str, Any]:
    return {
        k: [t.clone() for t in v] if isinstance(v, list) else v.clone() if isinstance(v, torch.Tensor) else v
        for k, v in args.items()
    }


def fresh(values: torch.Tensor, blocksize: int, first: torch.Tensor) -> dict[str, Any]:
    """A call whose new first moment is `values` exactly, and whose second moment is their square."""
    blocks = -(-values.numel() // blocksize)
    codes = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    scales = torch.zeros(blocks, device=values.device)
    return {
        "params": [torch.zeros_like(values)],
        "grads": [values.clone()],
        "exp_avg": [codes.clone()],
        "exp_avg_sq": [codes.clone()],
        "exp_avg_absmax": [scales.clone()],
        "exp_avg_sq_absmax": [scales.clone()],
        "exp_avg_qmap": first,
        "exp_avg_sq_qmap": dynamic_map(False, values.device),
        "lr": 1e-3,
        "beta1": 0.0,
        "beta2": 0.0,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "step": 1,
        "blocksize": blocksize,
    }


def around(values: torch.Tensor, ulps: int) -> torch.Tensor:
    bits = values.view(torch.int32).unsqueeze(1) + torch.arange(-ulps, ulps + 1, dtype=torch.int32)
    return bits.view(torch.float32).reshape(-1)


def blocks_of_absmax_one(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Each block of 64 gets one value of magnitude 1, alternately at its start and at its end, so that x is itself."""
    values = torch.cat([values, values.new_zeros(-values.numel() % 63)]).view(-1, 63)
    one = torch.ones(len(values), 1)
    rows = torch.cat([values, one], 1)
    rows[1::2] = torch.cat([one, values], 1)[1::2]
    return rows.flatten().to(device)


@pytest.mark.parametrize("code", [DYNAMIC_MAP_SIGNED, DYNAMIC_MAP_UNSIGNED], ids=["signed", "unsigned"])
def test_every_midpoint_and_its_neighbours(code: tuple[float, ...], device: torch.device) -> None:
    book = torch.tensor(code, dtype=torch.float32)
    midpoints = (book[:-1] + book[1:]) / 2
    zero = torch.tensor([0.0, -0.0])
    x = torch.cat([around(midpoints, 1), around(book[book != 0], 1), zero]).clamp(-1, 1)
    x = x[x >= min(code[0], 0)]
    values = blocks_of_absmax_one(x, device)
    args = fresh(values, 64, book.to(device))
    adamw8bit_step_(**args)
    got = args["exp_avg"][0].cpu().tolist()
    points = midpoints.tolist()
    exact = book.double()
    for value, c in zip(values.cpu().tolist(), got):
        assert c == bisect.bisect_left(points, value), f"{value!r} took code {c}"
        distance = (exact - value).abs()
        # The midpoint is rounded to float32, by up to half a unit in the last place: twice that is the distances' gap.
        assert distance[c] <= distance.min() + 2**-23 * abs(value)
    assert set(got) == set(range(256)), "not every code was taken"


def test_second_moment_is_nearest_but_never_zero(device: torch.device) -> None:
    book = dynamic_map(False)
    midpoints = (book[:-1] + book[1:]) / 2
    values = blocks_of_absmax_one(torch.cat([around(midpoints.sqrt(), 6), torch.tensor([0.0, 1e-9, 1e-15])]), device)
    args = fresh(values, 64, dynamic_map(True, device))
    adamw8bit_step_(**args)
    points = midpoints.tolist()
    for v, c in zip((values * values).cpu().tolist(), args["exp_avg_sq"][0].cpu().tolist()):
        assert c == (max(bisect.bisect_left(points, v), 1) if v > 0 else 0), f"{v!r} took code {c}"


def test_codes_of_any_value(device: torch.device) -> None:
    """Every exponent with either sign, and both zeros; the second moments are the squares."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 0x3F800000, (63 * 4096,), generator=generator, dtype=torch.int32)
    x = bits.view(torch.float32) * (1 - 2 * torch.randint(0, 2, bits.shape, generator=generator))
    values = blocks_of_absmax_one(torch.cat([x, torch.tensor([0.0, -0.0])]), device)
    args = fresh(values, 64, dynamic_map(True, device))
    adamw8bit_step_(**args)
    for name, value in (("exp_avg", values.cpu()), ("exp_avg_sq", (values * values).cpu())):
        book = args[f"{name}_qmap"].cpu()
        expected = torch.searchsorted((book[:-1] + book[1:]) / 2, value)
        if name == "exp_avg_sq":
            expected = torch.where(value > 0, expected.clamp(min=1), 0)
        assert torch.equal(args[name][0].cpu().long(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_obey_the_error_rule(dtype: torch.dtype, device: torch.device) -> None:
    """Against torch.optim.AdamW in float64, started from the decoded states."""
    args = make("several-threads", dtype, device)
    moments = [
        [
            reference.decode(c, a.double(), args[f"{name}_qmap"].double(), 256).view(c.shape)
            for c, a in zip(args[name], args[f"{name}_absmax"])
        ]
        for name in ("exp_avg", "exp_avg_sq")
    ]

    def torch_adamw(dtype: torch.dtype) -> list[torch.Tensor]:
        params = [torch.nn.Parameter(p.to(dtype)) for p in args["params"]]
        optimizer = torch.optim.AdamW(
            params, lr=args["lr"], betas=(0.9, 0.999), eps=args["eps"], weight_decay=args["weight_decay"], foreach=False
        )
        for i, (p, g) in enumerate(zip(params, args["grads"])):
            p.grad = g.to(dtype)
            m, v = (moment[i].to(dtype) for moment in moments)
            optimizer.state[p] = {"step": torch.tensor(args["step"] - 1.0), "exp_avg": m, "exp_avg_sq": v}
        optimizer.step()
        return [p.detach() for p in params]

    eager, truth = torch_adamw(torch.float32), torch_adamw(torch.float64)
    adamw8bit_step_(**args)
    for got, e, t in zip(args["params"], eager, truth):
        assert_within(got, e.to(dtype), t)


@pytest.mark.parametrize("first", [math.nan, math.inf, -math.inf, 1e19], ids=str)
@pytest.mark.parametrize("where", [0, 1, -1])
def test_bad_gradient_leaves_everything(first: float, where: int, device: torch.device) -> None:
    args = make({"shapes": [(700,), (33, 5), (70000,)]}, torch.float32, device)
    before = clones(args)
    args["grads"][where].view(-1)[where] = first
    adamw8bit_step_(**args)
    for a, b in zip(written(args), written(before)):
        assert torch.equal(a, b)
    found = torch.zeros((), device=device)
    torch.ops.peftkern.adamw8bit_found_inf_(args["grads"], None, found, None, [], None)
    assert found.item() == 1
    torch.ops.peftkern.adamw8bit_found_inf_(before["grads"], None, found, None, [], None)
    assert found.item() == 1, "a flag that is set stays set"
    found.zero_()
    torch.ops.peftkern.adamw8bit_found_inf_(before["grads"], None, found, None, [], None)
    assert found.item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_found_inf_sees_every_position(dtype: torch.dtype, device: torch.device) -> None:
    grad = torch.ones(65536 + 7, dtype=dtype, device=device)
    for position in (*range(0, 40), *range(16300, 16400, 7), 49152, 65535, 65536, 65542):
        grad[position] = math.nan
        found = torch.zeros((), device=device)
        torch.ops.peftkern.adamw8bit_found_inf_([grad[:3], grad], None, found, None, [], None)
        assert found.item() == 1, position
        grad[position] = 1


def test_found_inf_is_believed_and_the_scale_applied(device: torch.device) -> None:
    args = make("ragged", torch.float32, device)
    before = clones(args)
    adamw8bit_step_(**args, found_inf=torch.ones((), device=device))
    assert all(torch.equal(a, b) for a, b in zip(written(args), written(before)))
    scaled = clones(before) | {
        "grads": [g * 256 for g in before["grads"]],
        "grad_scale": torch.tensor(256.0, device=device),
    }
    adamw8bit_step_(**args, found_inf=torch.zeros((), device=device))
    adamw8bit_step_(**scaled)
    assert all(torch.equal(a, b) for a, b in zip(written(args), written(scaled)))
    assert torch.equal(scaled["grads"][3], before["grads"][3] * 256), "gradients are left as they are"
    # What overflows only unscaled is caught too.
    tiny = clones(before) | {"grad_scale": torch.tensor(1e-24, device=device)}
    adamw8bit_step_(**tiny)
    assert all(torch.equal(a, b) for a, b in zip(written(tiny), written(before)))


@pytest.mark.parametrize("step", [1, 2, 3, 7, 10, 99, 1000, 4095, 65537, 10**6, 2**24])
def test_numbers_and_tensors_agree(step: int, device: torch.device) -> None:
    plain = make("ragged", torch.float32, device) | {"step": step, "lr": 0.05}
    devices = {device, torch.device("cpu")}
    for where in devices:
        args = clones(plain)
        args["lr"] = torch.tensor(plain["lr"], dtype=torch.float64, device=where)
        args["step"] = torch.tensor(float(plain["step"]), device=where)
        expected = clones(plain)
        adamw8bit_step_(**args)
        adamw8bit_step_(**expected)
        assert all(torch.equal(a, b) for a, b in zip(written(args), written(expected)))


def test_zero_gradients_move_nothing(device: torch.device) -> None:
    args = make({"shapes": [(300, 7)], "fresh": True, "zero_grads": True, "weight_decay": 0.0}, torch.float32, device)
    before = args["params"][0].clone()
    for step in range(1, 501):
        adamw8bit_step_(**args | {"step": step})
    assert torch.equal(args["params"][0], before)
    assert not args["exp_avg_absmax"][0].any()


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-30, 1e-20, 1e-10, 1e10, 9e18])
def test_extreme_gradients_stay_finite(scale: float, device: torch.device) -> None:
    args = make({"shapes": [(1000,)], "fresh": True}, torch.float32, device)
    for step in range(1, 4):
        args["grads"] = [torch.randn(1000, device=device).clamp(-1, 1) * scale]
        adamw8bit_step_(**args | {"step": step})
        for t in (args["params"][0], args["exp_avg_absmax"][0], args["exp_avg_sq_absmax"][0]):
            assert torch.isfinite(t).all()
        decoded = reference.decode(args["exp_avg"][0], args["exp_avg_absmax"][0], args["exp_avg_qmap"], 256)
        assert torch.isfinite(decoded).all()


def test_result_does_not_depend_on_threads_or_neighbours() -> None:
    args = make({"shapes": [(513,), (70001,), (64, 65), (131072,)]}, torch.bfloat16, torch.device("cpu"))
    together, alone = clones(args), clones(args)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        adamw8bit_step_(**together)
    finally:
        torch.set_num_threads(threads)
    for i in range(4):
        adamw8bit_step_(**{k: v[i : i + 1] if isinstance(v, list) else v for k, v in alone.items()})
    assert all(torch.equal(a, b) for a, b in zip(written(together), written(alone)))


def reversed_dims(t: torch.Tensor) -> torch.Tensor:
    return t.permute(tuple(reversed(range(t.dim()))))


SHAPES = st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(
    shapes=SHAPES,
    blocksize=st.sampled_from([64, 256, 1024]),
    dtype=st.sampled_from(DTYPES),
    grad_dtype=st.sampled_from(DTYPES),
    transpose=st.booleans(),
    step=st.integers(1, 2**20),
    seed=st.integers(0, 99),
)
def test_any_shape_and_stride(
    shapes: list[tuple[int, ...]],
    blocksize: int,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    transpose: bool,
    step: int,
    seed: int,
) -> None:
    sizes = {"shapes": shapes, "blocksize": blocksize, "grad_dtype": grad_dtype, "step": step}
    args = make(sizes, dtype, torch.device("cpu"), seed)
    expected = clones(args)
    if transpose:
        for name in ("params", "grads"):
            args[name] = [reversed_dims(reversed_dims(t).contiguous()) for t in args[name]]
    adamw8bit_step_(**args)
    SPEC.reference(**expected)
    for a, b in zip(written(args), written(expected)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_loops_for_lesser_cpus_give_the_same_bits(capability: str) -> None:
    """The C++ backend without AVX-512, and without AVX2 too, which torch's own switch turns off."""
    code = (
        "import sys; sys.path.insert(0, 'tests/ops')\n"
        "from test_adamw8bit import *; from peftkern.testing.checks import check_case\n"
        "for case in SPEC.test_cases('cpu'):\n"
        "    for dtype in DTYPES: check_case(SPEC, case, dtype, torch.device('cpu'))\n"
        "for book in (DYNAMIC_MAP_SIGNED, DYNAMIC_MAP_UNSIGNED):\n"
        "    test_every_midpoint_and_its_neighbours(book, torch.device('cpu'))\n"
        "test_second_moment_is_nearest_but_never_zero(torch.device('cpu'))\n"
        "test_codes_of_any_value(torch.device('cpu'))\n"
        "test_any_shape_and_stride()\n"
    )
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("blocksize", [64, 256])
@pytest.mark.parametrize("backend", ["op", "reference"])
def test_parts_of_a_tensor_round_as_the_whole(backend: str, blocksize: int, device: torch.device) -> None:
    """With the places of the parts, which may come in any order and in several calls."""
    shapes = [(5, 13), (9001,), (3, 256)]
    whole = make({"shapes": shapes, "blocksize": blocksize, "seed": 3}, torch.bfloat16, device)
    parts = clones(whole)
    adamw8bit_step_(**whole)
    starts = [0, 128, 128 + 9024]
    cuts = [(0, 0, 65), (2, 0, 512), (1, 1024, 9001), (2, 512, 768), (1, 0, 1024)]
    run = torch.ops.peftkern.adamw8bit_step_ if backend == "op" else reference.step_
    for some in (cuts[:3], cuts[3:]):
        lists = [
            [parts[name][i].view(-1)[begin:end] for i, begin, end in some]
            for name in ("params", "grads", "exp_avg", "exp_avg_sq")
        ]
        lists += [
            [parts[name][i][begin // blocksize : -(-end // blocksize)] for i, begin, end in some]
            for name in ("exp_avg_absmax", "exp_avg_sq_absmax")
        ]
        numbers = [parts[name] for name in ("exp_avg_qmap", "exp_avg_sq_qmap", "lr")] + [None, parts["step"], None]
        numbers += [parts[name] for name in ("beta1", "beta2", "eps", "weight_decay", "blocksize")]
        places = [starts[i] + begin for i, begin, _ in some]
        run(*lists, *numbers, None, None, False, 0.0, None, parts["seed"], None, places)
    assert all(torch.equal(a, b) for a, b in zip(written(whole), written(parts)))


def test_places_are_checked(device: torch.device) -> None:
    args = make({"shapes": [(300,), (8, 9)]}, torch.bfloat16, device)
    lists = [args[name] for name in ("params", "grads", *STATES)]
    rest = (1e-3, None, 3.0, None, 0.9, 0.999, 1e-8, 0.01, 256, None, None, False, 0.0, None, 1, None)
    books = (args["exp_avg_qmap"], args["exp_avg_sq_qmap"])
    for places, message in (
        ([0], "one number per parameter, 2, got 1"),
        ([0, 8], "multiples of 64"),
        ([-64, 0], "-64"),
    ):
        with pytest.raises(RuntimeError, match=f"adamw8bit_step_: places must .*{message}"):
            torch.ops.peftkern.adamw8bit_step_(*lists, *books, *rest, places)


def test_far_places_have_random_numbers_of_their_own(device: torch.device) -> None:
    """Beyond 2^32 calls of eight elements the counter's second word counts."""
    results = []
    for place in (0, 64, 2**35, 2**35 + 64):
        args, expected = (make({"shapes": [(40, 64)], "seed": 3}, torch.bfloat16, device) for _ in range(2))
        for run, call in ((torch.ops.peftkern.adamw8bit_step_, args), (reference.step_, expected)):
            lists = [call[name] for name in ("params", "grads", *STATES)]
            books = (call["exp_avg_qmap"], call["exp_avg_sq_qmap"])
            numbers = (0.1, None, 3.0, None, 0.9, 0.999, 1e-8, 0.01, 256, None, None, False, 0.0, None, 3, None)
            run(*lists, *books, *numbers, [place])
        assert all(torch.equal(a, b) for a, b in zip(written(args), written(expected)))
        results.append(args["params"][0])
    assert not any(torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


def test_random_numbers_start_anywhere() -> None:
    values = torch.full((64,), 1.0) + 2**-9
    whole = reference.round_stochastically(values, 8, 1, 1)
    assert torch.equal(reference.round_stochastically(values[43:], 51, 1, 1), whole[43:])


def test_opcheck(device: torch.device) -> None:
    args = make({"shapes": [(300,), (8, 9)]}, torch.float32, device)
    lists = [args[name] for name in ("params", "grads", *STATES)]
    books = (args["exp_avg_qmap"], args["exp_avg_sq_qmap"])
    one = torch.tensor(3.0, device=device)
    flag = torch.zeros((), device=device)
    for numbers in ((1e-3, None, 3.0, None), (0.0, one * 1e-3, 0.0, one)):
        rest = (*numbers, 0.9, 0.999, 1e-8, 0.01, 256, None, flag, False)
        torch.library.opcheck(torch.ops.peftkern.adamw8bit_step_.default, (*lists, *books, *rest))
        torch.library.opcheck(torch.ops.peftkern.adamw8bit_step_.default, (*lists, *books, *rest, 1.0, one, 5))
    counts = ([one.clone(), one.clone()], torch.zeros((), dtype=torch.int64, device=device))
    for outputs in ((None, [], None), (one.clone(), *counts)):
        torch.library.opcheck(torch.ops.peftkern.adamw8bit_found_inf_.default, (args["grads"], one, flag, *outputs))


def test_compiles_in_one_graph(device: torch.device) -> None:
    compiled = torch.compile(adamw8bit_step_, fullgraph=True, backend="aot_eager")
    args = make("ragged", torch.float32, device)
    expected = clones(args)
    compiled(**args)
    adamw8bit_step_(**expected)
    assert all(torch.equal(a, b) for a, b in zip(written(args), written(expected)))


def test_autograd_notices_the_write(device: torch.device) -> None:
    args = make({"shapes": [(300,)]}, torch.float32, device)
    weight = args["params"][0].requires_grad_()
    loss = (weight * weight).sum()
    adamw8bit_step_(**args)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocksize": 100}, "blocksize must be one of"),
        ({"blocksize": 512}, r"exp_avg_absmax\[0\] must have shape \[1\] for blocks of 512"),
        ({"lr": -1e-3}, "lr must be at least 0"),
        ({"lr": math.nan}, "lr must be at least 0"),
        ({"beta1": 1.0}, r"beta1 must be in \[0, 1\)"),
        ({"beta2": -0.1}, r"beta2 must be in \[0, 1\)"),
        ({"eps": -1e-8}, "eps must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"lr": torch.zeros(2)}, "lr as a tensor must hold one element"),
        ({"grads": []}, "grads must have one tensor per parameter, 1, got 0"),
        ({"grads": [torch.zeros(3)]}, r"grads\[0\] must have shape \[20, 20\]"),
        ({"grads": [torch.zeros(20, 20).to_sparse()]}, r"grads\[0\] must be dense"),
        ({"grads": [torch.zeros(20, 20, dtype=torch.complex64)]}, r"grads\[0\] must be dense"),
        ({"params": [torch.zeros(20, 20, dtype=torch.int32)]}, r"params\[0\] must be float32"),
        ({"params": [torch.zeros(20, 1).expand(20, 20)]}, r"params\[0\] is expanded"),
        ({"exp_avg": [torch.zeros(20, 20)]}, r"exp_avg\[0\] must be torch.uint8"),
        (
            {"exp_avg_sq": [torch.zeros(20, 20, dtype=torch.uint8).t()[::1].t().T]},
            r"exp_avg_sq\[0\] must be contiguous",
        ),
        ({"exp_avg_qmap": torch.zeros(16)}, r"exp_avg_qmap must be float32 \[256\]"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    args = make({"shapes": [(20, 20)]}, torch.float32, torch.device("cpu"))
    before = clones(args)
    with pytest.raises(ValueError, match=f"^adamw8bit_step_: .*{message}"):
        adamw8bit_step_(**args | change)
    assert all(torch.equal(a, b) for a, b in zip(written(args), written(before)))


def test_a_code_book_that_does_not_ascend_is_refused() -> None:
    args = make({"shapes": [(20, 20)]}, torch.float32, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="exp_avg_qmap must ascend"):
        adamw8bit_step_(**args | {"exp_avg_qmap": dynamic_map(True).flip(0)})
