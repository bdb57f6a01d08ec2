"""PyTorch itself: dense linear layers on the unpacked weight, and the fused AdamW with float states."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear

from benchmarks.peers import Adapter, Peer, Prepared
from peftkern.ops._activations import activate
from peftkern.ops.bottleneck.spec import eager as eager_bottleneck
from peftkern.ops.nf4.reference import dequantize_out
from peftkern.ops.nf4.weight import NF4Weight


def dense(weight: torch.Tensor | NF4Weight, dtype: torch.dtype) -> torch.Tensor:
    """The weight as a dense tensor of `dtype`, by the reference."""
    if not isinstance(weight, NF4Weight):
        return weight
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    dequantize_out(*weight.tensors(), weight.blocksize, weight.nested_blocksize, out)
    return out


def _matmul(args: dict[str, Any]) -> Prepared:
    x, bias = args["x"], args["bias"]
    weight = dense(args["q"], x.dtype)
    return Prepared(lambda: linear(x, weight, bias), (x,))


def _matmul_dx(args: dict[str, Any]) -> Prepared:
    dy = args["dy"]
    weight = dense(args["q"], dy.dtype)
    return Prepared(lambda: dy @ weight)


def _frozen(args: dict[str, Any]) -> Prepared:
    """The layer without its adapter: forward, and dX where backward is timed."""
    x, bias = args["x"], args["bias"]
    weight = dense(args["weight"], x.dtype)
    return Prepared(lambda: linear(x, weight, bias), (x,))


def _frozen_qkv(args: dict[str, Any]) -> Prepared:
    x, biases = args["x"], [args.get(f"bias{index}") for index in range(len(args["weights"]))]
    weights = [dense(weight, x.dtype) for weight in args["weights"]]
    return Prepared(lambda: tuple(linear(x, weight, bias) for weight, bias in zip(weights, biases)), (x,))


def _frozen_mlp(args: dict[str, Any]) -> Prepared:
    x, activation = args["x"], args["activation"]
    gate, up, down = (
        (dense(weight, x.dtype), args.get(f"bias{index}")) for index, weight in enumerate(args["weights"])
    )
    return Prepared(lambda: linear(activate(linear(x, *gate), activation) * linear(x, *up), *down), (x,))


def _compiled_bottleneck(args: dict[str, Any]) -> Prepared:
    """The eager baseline by torch.compile, with torch's own dropout."""
    torch.compiler.reset()  # or it falls back to eager after a few shapes
    compiled = torch.compile(eager_bottleneck, dynamic=False)
    names = ("x", "down_weight", "down_bias", "up_weight", "up_bias", "residual")
    return Prepared(lambda: compiled(**args), tuple(args[name] for name in names if args[name] is not None))


def parameters(args: dict[str, Any]) -> list[torch.nn.Parameter]:
    """The arguments of our optimizer op as parameters that carry their gradients."""
    params = []
    for value, grad in zip(args["params"], args["grads"]):
        param = torch.nn.Parameter(value)
        param.grad = grad.to(value.dtype)
        params.append(param)
    return params


def hyper(args: dict[str, Any]) -> dict[str, Any]:
    """The same as the keyword arguments of torch's optimizers."""
    return {
        "lr": float(args["lr"]),
        "betas": (args["beta1"], args["beta2"]),
        "eps": args["eps"],
        "weight_decay": args["weight_decay"],
    }


def _fused_adamw(args: dict[str, Any]) -> Prepared:
    return Prepared(torch.optim.AdamW(parameters(args), fused=True, **hyper(args)).step)


def _foreach_adamw(args: dict[str, Any]) -> Prepared:
    return Prepared(torch.optim.AdamW(parameters(args), foreach=True, **hyper(args)).step)


PEER = Peer(
    name="torch",
    module="torch",
    adapters={
        "nf4_matmul": {"dense": Adapter(_matmul)},
        "nf4_matmul_dx": {"dense": Adapter(_matmul_dx)},
        "bottleneck": {"compiled": Adapter(_compiled_bottleneck, devices=("cuda",))},
        "lora_matmul": {"frozen": Adapter(_frozen)},
        "lora_few_tokens": {"frozen": Adapter(_frozen)},
        "lora_qkv": {"frozen": Adapter(_frozen_qkv)},
        "lora_mlp": {"frozen": Adapter(_frozen_mlp)},
        # Not captured: outside `capturable` mode their step counter lives on the host.
        "adamw8bit": {
            "fused AdamW": Adapter(_fused_adamw, graph=False),
            "foreach AdamW": Adapter(_foreach_adamw, graph=False, devices=("cuda",)),  # on the CPU it is a loop
        },
    },
)
