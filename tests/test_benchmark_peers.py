"""Peers do the same work as our ops, on the same values: otherwise their times would compare different things."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import arms, peers
from peftkern.ops.nf4.weight import NF4Weight
from peftkern.testing.spec import Case, Spec, all_specs

CPU = torch.device("cpu")
TOLERANCE = 0.05  # relative to the largest value, in bfloat16: finds wrong scales, codes and transposes
OPTIMIZER = "adamw8bit"


def _peer_arms(training: bool = False) -> list:
    return [
        pytest.param(spec, name, arm, id=f"{op}-{arm.replace(' ', '-')}")
        for op, spec in all_specs().items()
        for name in ("torch", "bitsandbytes", "peft", "peftkern")
        for arm in peers.load(name).arms(op, "cpu")
        if (spec.train_bytes is not None or not training) and arm != "torch frozen"
    ]


def _cases(spec: Spec) -> list[Case]:
    """Not the cases with dropout, which is random, nor what peers get wrong: tiny shapes and strided weights."""
    return [
        case
        for case in spec.test_cases("cpu")
        if not case.sizes.get("dropout_p")
        and not {0, 1} & {case.sizes.get(key) for key in "MNK"}
        and "transposed" not in case.sizes
    ]


def _adapter(peer_name: str, arm: str, spec: Spec) -> peers.Adapter:
    peer = peers.load(peer_name)
    if peer.missing():
        pytest.skip(f"{peer_name}: {peer.missing()}")
    return peer.arms(spec.op, "cpu")[arm]


def _dense(output: Any) -> list[torch.Tensor]:
    """The tensors of an output. Quantizers return ours, or bitsandbytes' (packed, state)."""
    if isinstance(output, NF4Weight):
        return [output.dequantize()]
    if isinstance(output, tuple) and not all(isinstance(part, torch.Tensor) for part in output):
        from bitsandbytes.functional import dequantize_4bit

        return [dequantize_4bit(*output)]
    return list(output) if isinstance(output, tuple) else [output]


def _assert_close(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    error = (got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-6)
    assert error < TOLERANCE, f"{what}: relative error {error:.3f}"


@pytest.mark.parametrize(("spec", "peer_name", "arm"), [p for p in _peer_arms() if p.values[0].op != OPTIMIZER])
def test_outputs_agree(spec: Spec, peer_name: str, arm: str) -> None:
    adapter = _adapter(peer_name, arm, spec)
    checked = 0
    for case in _cases(spec):
        args = spec.make(case, torch.bfloat16, CPU, 0)
        expected = spec.reference(**spec.make(case, torch.bfloat16, CPU, 0))
        try:
            with torch.no_grad():
                output = adapter.prepare(args).call()
        except peers.NotApplicable:
            continue
        for got, wanted in zip(_dense(output), _dense(expected), strict=True):
            _assert_close(got, wanted, case.name)
        checked += 1
    assert checked, "no case fits"


@pytest.mark.parametrize(("spec", "peer_name", "arm"), [p for p in _peer_arms() if p.values[0].op == OPTIMIZER])
def test_first_steps_agree(spec: Spec, peer_name: str, arm: str) -> None:
    """From zero states the first step does not depend on how states are stored; it moves a parameter by about lr."""
    adapter = _adapter(peer_name, arm, spec)
    case = next(case for case in spec.cases if case.sizes.get("fresh") and not case.sizes.get("zero_grads"))
    args = spec.make(case, torch.float32, CPU, 0)
    expected = spec.reference(**spec.make(case, torch.float32, CPU, 0))["params"]
    adapter.prepare(args).call()
    for got, wanted in zip(args["params"], expected):
        assert torch.allclose(got, wanted, rtol=0, atol=0.05 * args["lr"])


@pytest.mark.parametrize(("spec", "peer_name", "arm"), _peer_arms(training=True))
def test_gradients_agree(spec: Spec, peer_name: str, arm: str) -> None:
    """The leaves whose gradients are timed are ours, in our order (a bias is frozen in every peer of a LoRA op)."""
    adapter = _adapter(peer_name, arm, spec)
    for case in _cases(spec):
        args = arms.clone(spec.make(case, torch.bfloat16, CPU, 0), spec.grads)
        ours = arms.clone(args, spec.grads)
        prepared = adapter.prepare(args)
        outputs, expected = _dense(prepared.call()), _dense(spec.reference(**ours))
        frozen = "bias" if spec.op.startswith("lora") else "nothing"
        names = [name for name in spec.grads if frozen not in name and ours.get(name) is not None]
        dys = [torch.randn_like(output) for output in expected]
        got = torch.autograd.grad(outputs, prepared.leaves, dys)
        wanted = torch.autograd.grad(expected, [ours[name] for name in names], dys)
        assert len(got) == len(wanted)
        for name, a, b in zip(names, got, wanted):
            _assert_close(a, b, f"{case.name}: gradient of {name}")
