"""LoRALinear and QLoRALinear: the formula and its gradients, state, moves, compile, autocast, checkpointing."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from peftkern import LoRALinear, NF4Linear, QLoRALinear
from peftkern.testing.numerics import assert_within

K, N, R = 40, 24, 4


def conv1d(k=K, n=N, **factory):
    module = pytest.importorskip("transformers.pytorch_utils")
    layer = module.Conv1D(n, k).to(**factory)
    nn.init.normal_(layer.bias)
    return layer


BASES = {
    "linear": lambda **f: nn.Linear(K, N, **f),
    "no bias": lambda **f: nn.Linear(K, N, bias=False, **f),
    "conv1d": conv1d,
    "nf4": lambda **f: NF4Linear.from_linear(nn.Linear(K, N, **f), blocksize=32),
}


def make(base="linear", device="cpu", dtype=torch.float32, cls=LoRALinear, **options):
    """A layer as after some training: lora_B not zero, both terms of the same size."""
    torch.manual_seed(0)
    layer = cls(BASES[base](device=device, dtype=dtype), rank=R, **{"lora_alpha": 8, **options})
    nn.init.normal_(layer.lora_B, std=0.3)
    return layer


def formula(layer, x, dtype):
    """The layer in plain PyTorch and `dtype`, every parameter a leaf of its own."""
    base = layer.base_layer
    weight = base.dequantize(torch.float32) if isinstance(base, NF4Linear) else base.weight
    weight = weight.T if type(base).__name__ == "Conv1D" else weight
    bias = None if base.bias is None else base.bias.detach().to(dtype).requires_grad_()
    A, B = (p.detach().to(dtype).requires_grad_() for p in (layer.lora_A, layer.lora_B))
    x = x.detach().to(dtype).requires_grad_()
    y = nn.functional.linear(x, weight.detach().to(dtype), bias) + layer.scaling * (x @ A.T) @ B.T
    return y, [t for t in (x, A, B, bias) if t is not None]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_are_the_formulas(device, base, dtype):
    layer = make(base, device, dtype)
    if layer.bias is not None:
        layer.bias.requires_grad_(True)
    x = torch.randn(3, 5, K, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(3, 5, N, device=device, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    y.backward(dy)
    truth, leaves = formula(layer, x, torch.float64)
    truth.backward(dy.double())
    eager, eager_leaves = formula(layer, x, dtype)
    eager.backward(dy)
    assert_within(y, eager, truth)
    ours = [x, layer.lora_A, layer.lora_B, *([] if layer.bias is None else [layer.bias])]
    for parameter, want, plain in zip(ours, leaves, eager_leaves, strict=True):
        assert parameter.grad.dtype == parameter.dtype
        assert_within(parameter.grad.to(dtype), plain.grad, want.grad)


def test_gradcheck_in_float64():
    layer = make(dtype=torch.float64)
    assert layer.lora_A.dtype == torch.float64
    x = torch.randn(3, K, dtype=torch.float64, requires_grad=True)

    def run(x, A, B):
        return torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, (x,))

    assert torch.autograd.gradcheck(run, (x, layer.lora_A, layer.lora_B), nondet_tol=0)


@pytest.mark.parametrize("base", BASES)
def test_a_new_layer_computes_its_base(device, base):
    inner = BASES[base](device=device)
    x = torch.randn(3, K, device=device)
    want = inner(x)
    layer = LoRALinear(inner, R)
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-6)
    assert layer.base_layer is inner
    bound = math.sqrt(1 / K) * math.sqrt(6 / (1 + 5))
    assert 0.5 * bound < layer.lora_A.abs().max() <= bound
    assert not layer.lora_B.any()


def test_what_trains_and_in_which_dtype(device):
    for dtype, adapter in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32)):
        layer = make(device=device, dtype=dtype)
        trainable = {name: p.dtype for name, p in layer.named_parameters() if p.requires_grad}
        assert trainable == {"lora_A": adapter, "lora_B": adapter}
        assert layer(torch.randn(2, K, device=device, dtype=dtype)).dtype == dtype
    assert {p.dtype for p in make(dtype=torch.bfloat16).bfloat16().parameters()} == {torch.bfloat16}


def test_scaling():
    assert LoRALinear(nn.Linear(4, 4), 8, 16).scaling == 2
    assert LoRALinear(nn.Linear(4, 4), 16, 8, use_rslora=True).scaling == 2
    layer = make()
    x = torch.randn(2, K)
    full, layer.scaling = layer(x), 0.0
    base, layer.scaling = layer(x), 1.0
    torch.testing.assert_close(layer(x), (full + base) / 2)


def test_alpha_zero_and_rank_beyond_the_layer():
    x = torch.randn(2, K)
    layer = LoRALinear(nn.Linear(K, N), rank=100, lora_alpha=0)
    nn.init.normal_(layer.lora_B)
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    layer.scaling = 0.5
    y, _ = formula(layer, x, torch.float32)
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)


def test_disabled_is_the_base():
    layer = make()
    x = torch.randn(2, K)
    layer.enabled = False
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enabled = True
    assert not torch.allclose(layer(x), layer.base_layer(x))


def test_dropout_only_while_training(device):
    layer = make(device=device, dropout=0.5)
    x = torch.randn(64, K, device=device)
    exact, _ = formula(layer, x, torch.float32)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    torch.manual_seed(5)
    a = layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), a)
    mean = torch.stack([layer(x) for _ in range(400)]).mean(0)
    assert (mean - exact).abs().mean() < 0.1 * (exact - layer.base_layer(x)).abs().mean()
    layer.eval()
    torch.testing.assert_close(layer(x), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("cls", [LoRALinear, QLoRALinear])
def test_activation_checkpointing_replays_dropout(device, cls, use_reentrant):
    layer = make(device=device, cls=cls, dropout=0.4).train()
    x = torch.randn(6, K, device=device, requires_grad=True)

    def gradients(run):
        torch.manual_seed(7)
        layer.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        return [t.grad.clone() for t in (x, layer.lora_A, layer.lora_B)]

    plain = gradients(layer)
    again = gradients(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant))
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cls", [LoRALinear, QLoRALinear])
def test_autocast(device, cls):
    layer = make(device=device, cls=cls)
    x = torch.randn(3, K, device=device, requires_grad=True)
    truth, leaves = formula(layer, x, torch.float64)
    truth.sum().backward()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    torch.testing.assert_close(y.double(), truth, rtol=3e-2, atol=3e-2)
    assert layer.lora_A.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad.double(), leaves[0].grad, rtol=3e-2, atol=5e-2)


@pytest.mark.parametrize("base", ["linear", "nf4"])
def test_compile_fullgraph(device, base):
    layer = make(base, device).train()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, K, device=device, requires_grad=True)
    y = compiled(x)
    torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    got = layer.lora_A.grad.clone()
    layer.zero_grad()
    layer(x).sum().backward()
    torch.testing.assert_close(got, layer.lora_A.grad, rtol=1e-5, atol=1e-5)
    layer.enabled = False
    assert torch.equal(compiled(x), layer.base_layer(x))


@pytest.mark.parametrize("base", BASES)
def test_state_dict_copy_and_pickle(device, base):
    layer = make(base, device, dropout=0.1, use_rslora=True)
    x = torch.randn(2, K, device=device)
    other = make(base, device)
    nn.init.zeros_(other.lora_A)
    other.load_state_dict(layer.state_dict())
    other.scaling = layer.scaling
    for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same.eval()(x), layer.eval()(x))
        assert list(same.state_dict()) == list(layer.state_dict())
        with torch.no_grad():
            same.lora_A.zero_()
        assert layer.lora_A.any()
    assert [k for k in layer.state_dict() if k.startswith("lora")] == ["lora_A", "lora_B"]


def test_moves_and_casts(device):
    layer = make("nf4").to(device, torch.bfloat16)
    assert layer.base_layer.absmax.dtype == torch.uint8
    assert layer.base_layer.nested_absmax.dtype == torch.float32
    assert layer.lora_A.dtype == torch.bfloat16
    assert layer(torch.randn(2, K, device=device, dtype=torch.bfloat16)).device.type == device.type


def test_meta_device():
    layer = LoRALinear(nn.Linear(K, N, device="meta"), R)
    assert layer.lora_A.is_meta
    layer.load_state_dict(make().state_dict(), assign=True)
    assert not layer.lora_A.is_meta


@pytest.mark.parametrize("base", ["linear", "no bias", "conv1d"])
def test_qlora_quantizes_its_base(device, base):
    dense = BASES[base](device=device, dtype=torch.bfloat16)
    weight = dense.weight.detach().clone()
    layer = QLoRALinear(dense, R, blocksize=32, double_quant=False, compute_dtype=torch.bfloat16)
    assert isinstance(layer.base_layer, NF4Linear)
    assert (layer.base_layer.blocksize, layer.base_layer.double_quant) == (32, False)
    expected = weight.T if base == "conv1d" else weight
    error = (layer.base_layer.dequantize() - expected).abs().max()
    assert 0 < error < expected.abs().max() * 0.2
    assert torch.equal(dense.weight, weight)  # the caller's layer is not touched
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    x = torch.randn(2, K, device=device)
    assert layer(x).dtype == torch.float32
    assert QLoRALinear(layer.base_layer, R, compute_dtype=torch.float16).base_layer.compute_dtype == torch.float16


def test_the_dense_weight_is_freed():
    import weakref

    dense = nn.Linear(K, N)
    alive = weakref.ref(dense.weight)
    layer = QLoRALinear(dense, R)
    del dense
    assert alive() is None
    assert layer.base_layer.packed.numel() == K * N // 2


def test_bitsandbytes_base(device):
    bnb = pytest.importorskip("bitsandbytes")
    theirs = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32).to(device)
    dense = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    for cls in (LoRALinear, QLoRALinear):
        layer = cls(theirs, R)
        assert isinstance(layer.base_layer, NF4Linear)
        assert layer.base_layer.packed.data_ptr() == theirs.weight.data_ptr()
        assert torch.equal(layer.base_layer.dequantize(), dense)
        assert layer.base_layer.compute_dtype == torch.float32


def test_layer_looks_like_its_base():
    layer = make()
    assert (layer.in_features, layer.out_features) == (K, N)
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
    assert "rank=4" in repr(layer)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LoRALinear(nn.Linear(4, 4), 0), "rank must be a positive integer, got 0"),
        (lambda: LoRALinear(nn.Linear(4, 4), -3), "rank must be a positive integer"),
        (lambda: LoRALinear(nn.Linear(4, 4), 2.5), "rank must be a positive integer"),
        (lambda: LoRALinear(nn.Linear(4, 4), True), "rank must be a positive integer"),
        (lambda: LoRALinear(nn.Linear(4, 4), 2, float("nan")), "lora_alpha must be a finite number"),
        (lambda: LoRALinear(nn.Linear(4, 4), 2, dropout=1.0), r"dropout must be a number in \[0, 1\)"),
        (lambda: LoRALinear(nn.Linear(4, 4), 2, dropout=-0.1), "dropout must be"),
        (lambda: LoRALinear(nn.Embedding(4, 4), 2), "got Embedding"),
        (lambda: LoRALinear(make(), 2), "got LoRALinear"),
        (lambda: LoRALinear(nn.Linear(4, 4).requires_grad_(False).to(torch.complex64), 2), "packed by another library"),
        (lambda: QLoRALinear(nn.Linear(4, 4), 2, blocksize=7), "blocksize must be one of"),
        (lambda: QLoRALinear(nn.Linear(4, 4, device="meta"), 2), "meta device"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build()


def test_a_wrong_input_names_the_op():
    with pytest.raises(ValueError, match="lora_matmul"):
        make()(torch.randn(2, K + 1))
