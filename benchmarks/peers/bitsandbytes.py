"""bitsandbytes: 4-bit quantization, Linear4bit, and the 8-bit optimizers. Our NF4 bytes are used as they are."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from benchmarks.peers import Adapter, Peer, Prepared
from benchmarks.peers.torch_baseline import hyper, parameters
from peftkern.ops.nf4.weight import NF4Weight


def quant_state(q: NF4Weight, dtype: torch.dtype) -> Any:
    """bitsandbytes' QuantState over our tensors, without copying them; it decodes to `dtype`."""
    from bitsandbytes.functional import QuantState, get_4bit_type

    nested = None
    if q.double_quant:
        nested = QuantState(
            absmax=q.nested_absmax, code=q.nested_code, blocksize=q.nested_blocksize, dtype=torch.float32
        )
    return QuantState(
        absmax=q.absmax,
        shape=q.shape,
        code=get_4bit_type("nf4", device=q.device),
        blocksize=q.blocksize,
        quant_type="nf4",
        dtype=dtype,
        offset=q.nested_offset,
        state2=nested,
    )


def linear4bit(q: NF4Weight, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.nn.Module:
    """A frozen bitsandbytes.nn.Linear4bit that computes in `dtype` on our bytes."""
    import bitsandbytes as bnb

    out_features, in_features = q.shape
    layer = bnb.nn.Linear4bit(
        in_features, out_features, bias=bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    layer.weight = bnb.nn.Params4bit(
        q.packed,
        requires_grad=False,
        quant_state=quant_state(q, dtype),
        blocksize=q.blocksize,
        compress_statistics=q.double_quant,
        quant_type="nf4",
        bnb_quantized=True,
        module=layer,
    )
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    return layer


def packs_on_cpu(q: NF4Weight) -> bool:
    """Whether its layer in eval mode can repack this weight for the CPU, its fast way; for other shapes it raises."""
    return q.shape[0] % 32 == 0 and q.numel % 2 == 0


def _quantize(args: dict[str, Any]) -> Prepared:
    from bitsandbytes.functional import quantize_4bit

    weight, blocksize, double_quant = args["weight"], args["blocksize"], args["double_quant"]
    return Prepared(
        lambda: quantize_4bit(weight, blocksize=blocksize, compress_statistics=double_quant, quant_type="nf4")
    )


def _dequantize(args: dict[str, Any]) -> Prepared:
    from bitsandbytes.functional import dequantize_4bit

    q = args["q"]
    state = quant_state(q, args["dtype"])
    return Prepared(lambda: dequantize_4bit(q.packed, state))


def _matmul(args: dict[str, Any]) -> Prepared:
    x = args["x"]
    layer = linear4bit(args["q"], args["bias"], x.dtype)
    layer.train(not packs_on_cpu(args["q"]))
    return Prepared(lambda: layer(x), (x,))


def _matmul_dx(args: dict[str, Any]) -> Prepared:
    """What the backward of its 4-bit matmul does."""
    from bitsandbytes.functional import dequantize_4bit

    dy, q = args["dy"], args["q"]
    state = quant_state(q, dy.dtype)
    return Prepared(lambda: torch.matmul(dy, dequantize_4bit(q.packed, state)))


def _adamw(name: str) -> Any:
    def prepare(args: dict[str, Any]) -> Prepared:
        import bitsandbytes as bnb

        return Prepared(getattr(bnb.optim, name)(parameters(args), **hyper(args)).step)

    return prepare


class _Host(ctypes.Structure):
    """A CUmemLocation: the host."""

    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]

    def __init__(self) -> None:
        super().__init__(2, 0)  # CU_MEM_LOCATION_TYPE_HOST


def _paged_adamw(args: dict[str, Any]) -> Prepared:
    """Its managed memory is moved to the host after every step, as other tensors would move it: by the driver, as
    bitsandbytes' prefetch_tensor(to_cpu=True) ends the process with CUDA 13."""
    import bitsandbytes as bnb

    move = ctypes.CDLL("libcuda.so.1").cuMemPrefetchAsync_v2
    move.argtypes = [ctypes.c_uint64, ctypes.c_size_t, _Host, ctypes.c_uint, ctypes.c_void_p]
    optimizer = bnb.optim.PagedAdamW8bit(parameters(args), **hyper(args))
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("state1", "state2")]

    def call() -> None:
        optimizer.step()
        for moment in moments:
            result = move(moment.data_ptr(), moment.nbytes, _Host(), 0, None)
            if result != 0:
                raise RuntimeError(f"cuMemPrefetchAsync returned {result}")

    return Prepared(call)


PEER = Peer(
    name="bitsandbytes",
    module="bitsandbytes",
    adapters={
        # Its quantize and optimizer kernels launch on the default stream whatever the current one is, and a failed
        # launch ends the process: never inside a capture.
        "nf4_quantize": {"": Adapter(_quantize, graph=False)},
        "nf4_dequantize": {"": Adapter(_dequantize)},
        "nf4_matmul": {"": Adapter(_matmul)},
        "nf4_matmul_dx": {"": Adapter(_matmul_dx)},
        "adamw8bit": {
            "AdamW8bit": Adapter(_adamw("AdamW8bit"), graph=False),
            "PagedAdamW8bit": Adapter(_adamw("PagedAdamW8bit"), graph=False, devices=("cuda",)),
        },
        "paged_adamw8bit": {"PagedAdamW8bit, pushed out": Adapter(_paged_adamw, graph=False, devices=("cuda",))},
    },
)
