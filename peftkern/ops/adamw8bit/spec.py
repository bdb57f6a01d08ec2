"""The spec of adamw8bit: one step of a list of tensors, bitwise against the reference."""

from __future__ import annotations

import math
from typing import Any

import torch

from peftkern.ops._code_tables import dynamic_map
from peftkern.ops.adamw8bit import reference
from peftkern.ops.adamw8bit.function import adamw8bit_step_
from peftkern.testing.spec import Case, Spec

PARAM_STD, GRAD_STD = 0.02, 1e-3  # of a trained projection and its gradient
WRITTEN = ("params", "exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")


def lora_shapes(rank: int = 16, layers: int = 32, hidden: int = 4096, mlp: int = 11008) -> list[tuple[int, ...]]:
    """A and B on every projection of a 7B Llama: 448 tensors of 40.0 M parameters."""
    projections = [(hidden, hidden)] * 4 + [(mlp, hidden)] * 2 + [(hidden, mlp)]
    return [shape for _ in range(layers) for n, k in projections for shape in ((rank, k), (n, rank))]


def _cases() -> tuple[Case, ...]:
    ragged = [(1,), (15,), (16, 1), (17,), (3, 85), (256,), (257,), (40, 130), (0, 7), ()]
    return (
        Case("one-block", {"shapes": [(16, 16)]}),
        Case("ragged", {"shapes": ragged}),
        Case("no-tensors", {"shapes": []}),
        Case("from-zero", {"shapes": ragged, "fresh": True, "step": 1}),
        Case("zero-gradients", {"shapes": [(3, 200)], "zero_grads": True}),
        Case("zero-gradients-from-zero", {"shapes": [(3, 200)], "zero_grads": True, "fresh": True}),
        Case("block64", {"shapes": ragged, "blocksize": 64}),
        Case("block4096", {"shapes": [(70, 130), (4096,), (5,)], "blocksize": 4096}),
        Case("maximize", {"shapes": ragged, "maximize": True}),
        Case("scaled", {"shapes": ragged, "grad_scale": 1024.0}),
        Case("float32-gradients", {"shapes": ragged, "grad_dtype": torch.float32}),
        Case("bfloat16-gradients", {"shapes": ragged, "grad_dtype": torch.bfloat16}),
        Case("float16-gradients", {"shapes": ragged, "grad_dtype": torch.float16}),
        Case("clipped", {"shapes": ragged, "max_norm": 0.02}),
        Case("clipped-to-nothing", {"shapes": ragged, "max_norm": 0.0}),
        Case("within-the-norm", {"shapes": ragged, "max_norm": 100.0, "grad_scale": 1024.0}),
        Case("clipped-many-pieces", {"shapes": [(700, 130), (3,), (8193,), (129, 513)], "max_norm": 0.1}),
        Case("infinite-norm", {"shapes": ragged, "bad": math.inf, "max_norm": 1.0, "check_finite": False}),
        Case("stochastic", {"shapes": [*ragged, (9001,), (3, 8192)], "seed": 0x123456789ABCDEF}),
        Case("stochastic-float32-gradients", {"shapes": ragged, "grad_dtype": torch.float32, "seed": 1}),
        Case("no-look", {"shapes": ragged, "check_finite": False}),
        Case("no-decay", {"shapes": ragged, "weight_decay": 0.0}),
        Case("other-code-books", {"shapes": ragged, "linear_maps": True}),
        Case("infinite-gradient", {"shapes": ragged, "bad": math.inf}),
        Case("nan-gradient", {"shapes": ragged, "bad": math.nan}),
        Case("strided", {"shapes": [(40, 130), (7, 300)], "transposed": True}),
        Case("many-decades", {"shapes": [(64, 128)], "decades": 9}),
        Case("several-threads", {"shapes": [(700, 130), (129, 513), (300, 401)]}),
        Case("lora-7b-r16", {"shapes": lora_shapes()}, bench=True),
        Case("16.8M", {"shapes": [(4096, 4096)]}, bench=True),
        Case("268M", {"shapes": [(16384, 16384)]}, bench=True, devices=("cuda",)),
    )


def _make(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Any]:
    """Parameters, gradients, and the states of a run under way."""
    sizes = case.sizes
    generator = torch.Generator(device).manual_seed(seed)
    shapes, blocksize = sizes["shapes"], sizes.get("blocksize", 256)

    def normal(shape: tuple[int, ...], std: float) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, device=device) * std
        if "decades" in sizes:
            values *= 10 ** (-sizes["decades"] * torch.rand(shape, generator=generator, device=device))
        return values

    if sizes.get("linear_maps"):
        qmaps = [torch.linspace(low, 1.0, 256, device=device) for low in (-1.0, 0.0)]
    else:
        qmaps = [dynamic_map(signed, device) for signed in (True, False)]
    # Gradients of float16 keep away from its denormals, as GradScaler sees to.
    scale = sizes.get("grad_scale", 1.0)
    grads = [(normal(shape, GRAD_STD) * scale).to(sizes.get("grad_dtype", dtype)) for shape in shapes]
    if sizes.get("zero_grads"):
        grads = [torch.zeros_like(grad) for grad in grads]
    if "bad" in sizes:
        grads[-2 if grads[-1].numel() == 0 else -1].view(-1)[-1:].fill_(sizes["bad"])
    states = []
    for shape in shapes:
        moments = normal(shape, GRAD_STD).view(-1), normal(shape, GRAD_STD).view(-1).square()
        encoded = [
            reference.encode(moment * (not sizes.get("fresh")), qmap, blocksize, positive_stays_positive=second)
            for moment, qmap, second in zip(moments, qmaps, (False, True))
        ]
        states.append((encoded[0][0].view(shape), encoded[1][0].view(shape), encoded[0][1], encoded[1][1]))
    params = [normal(shape, PARAM_STD).to(dtype) for shape in shapes]
    if sizes.get("transposed"):
        params, grads = ([t.t().contiguous().t() for t in tensors] for tensors in (params, grads))
    names = ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")
    return {
        "params": params,
        "grads": grads,
        **{name: [state[i] for state in states] for i, name in enumerate(names)},
        "exp_avg_qmap": qmaps[0],
        "exp_avg_sq_qmap": qmaps[1],
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": sizes.get("weight_decay", 0.01),
        "step": sizes.get("step", 7),
        "blocksize": blocksize,
        "grad_scale": torch.tensor(scale, device=device) if "grad_scale" in sizes else None,
        "maximize": sizes.get("maximize", False),
        "seed": sizes.get("seed"),
        "max_norm": sizes.get("max_norm"),
        "check_finite": sizes.get("check_finite", True),
    }


def _run(**args: Any) -> dict[str, list[torch.Tensor]]:
    adamw8bit_step_(**args)
    return {name: args[name] for name in WRITTEN}


def _reference(
    lr: float, step: float, max_norm: float | None = None, check_finite: bool = True, **args: Any
) -> dict[str, list[torch.Tensor]]:
    device = args["exp_avg_qmap"].device
    found_inf = torch.zeros((), device=device)
    norm = None if max_norm is None else torch.zeros((), device=device)
    reference.found_inf_(args["grads"], args["grad_scale"], found_inf, norm)
    reference.step_(
        lr=lr,
        lr_tensor=None,
        step=step,
        step_tensor=None,
        found_inf=found_inf if check_finite else None,
        max_norm=max_norm or 0.0,
        grad_norm=norm,
        **args,
    )
    return {name: args[name] for name in WRITTEN}


def _bytes(case: Case, dtype: torch.dtype) -> int:
    """Parameter in and out, gradient in, two codes in and out, two scales per block in and out: 10.06 bytes a parameter
    in 16 bits, 16.06 in float32."""
    numels = [math.prod(shape) for shape in case.sizes["shapes"]]
    blocks = sum(-(-numel // case.sizes.get("blocksize", 256)) for numel in numels)
    return sum(numels) * (3 * dtype.itemsize + 4) + 16 * blocks


def _flops(case: Case, dtype: torch.dtype) -> int:
    """Nothing beside the bytes."""
    return 0


SPECS = (
    Spec(
        op="adamw8bit",
        cases=_cases(),
        make=_make,
        run=_run,
        reference=_reference,
        bytes=_bytes,
        flops=_flops,
        exact=True,
    ),
)
