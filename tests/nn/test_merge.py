"""merge, unmerge and merge_and_unload: rounded once, restored bit for bit, a plain model at the end."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn as nn

import peftkern
from peftkern import LoRAConfig, LoRALinear, NF4Linear, PromptTuningConfig, QLoRAConfig, merge_and_unload

K, N, R = 48, 32, 4
IDS = torch.arange(12).reshape(2, 6)


def conv1d(**factory):
    module = pytest.importorskip("transformers.pytorch_utils")
    return module.Conv1D(N, K).to(**factory)


BASES = {
    "linear": lambda **f: nn.Linear(K, N, **f),
    "conv1d": conv1d,
    "nf4": lambda **f: NF4Linear.from_linear(nn.Linear(K, N, **f)),
    "nf4 of conv1d": lambda **f: NF4Linear.from_linear(conv1d(**f)),
}


def make(base="linear", device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    layer = LoRALinear(BASES[base](device=device, dtype=dtype), R, 8)
    nn.init.normal_(layer.lora_B, std=0.3)
    return layer


def truth(layer):
    """The merged weight [N, K] in float64."""
    base = layer.base_layer
    weight = base.dequantize(torch.float32) if isinstance(base, NF4Linear) else base.weight
    weight = weight.T if type(base).__name__ == "Conv1D" else weight
    return weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()


def bits(tensor):
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merged_weight_is_rounded_once(device, base, dtype):
    layer = make(base, device, dtype)
    merged, exact = layer.merged_weight(), truth(layer)
    assert merged.dtype == dtype
    assert torch.equal(merged, exact.to(dtype))
    half = torch.finfo(dtype).eps / 2
    assert ((merged.double() - exact).abs() <= 1.01 * half * exact.abs() + torch.finfo(dtype).tiny).all()
    assert layer.merged_weight(torch.float64).dtype == torch.float64


def test_merging_in_parts_is_the_same(monkeypatch):
    from peftkern.nn import lora

    layer = make()
    want = layer.merged_weight()
    monkeypatch.setattr(lora, "_MERGE_ELEMENTS", 5 * K)
    assert torch.equal(layer.merged_weight(), want)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unmerge(device, base, dtype):
    layer = make(base, device, dtype).eval()
    x = torch.randn(5, K, device=device, dtype=dtype)
    before = {k: bits(v) for k, v in layer.state_dict().items()}
    y = layer(x)
    exact = x.double() @ truth(layer).T + layer.bias.double()
    layer.merge()
    assert layer.merged
    bound = 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert (layer(x).double() - exact).abs().max() <= bound
    assert (layer(x).double() - y.double()).abs().max() <= 2 * bound
    layer.merge()  # twice is once
    assert (layer(x).double() - exact).abs().max() <= bound
    layer.unmerge()
    assert not layer.merged
    assert {k: bits(v) for k, v in layer.state_dict().items()} == before
    assert torch.equal(layer(x), y)
    layer.unmerge()


def test_many_merges_do_not_drift():
    """In bfloat16, subtracting the update again would lose bits every time."""
    layer = make(dtype=torch.bfloat16)
    before = bits(layer.base_layer.weight)
    for _ in range(20):
        layer.merge()
        layer.unmerge()
    assert bits(layer.base_layer.weight) == before


@pytest.mark.parametrize("base", BASES)
def test_the_state_of_a_merged_layer_is_the_unmerged_one(device, base):
    layer = make(base, device)
    want = layer.state_dict()
    layer.merge()
    got = layer.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], want[k]) and got[k].device == want[k].device for k in want)
    other = make(base, device)
    nn.init.zeros_(other.lora_B)
    other.merge()
    other.load_state_dict(got)  # loading unmerges first
    assert not other.merged
    x = torch.randn(2, K, device=device)
    assert torch.equal(other(x), make(base, device)(x))


@pytest.mark.parametrize("base", BASES)
def test_merged_layers_move_copy_and_pickle(device, base):
    layer = make(base).eval()
    want = {k: bits(v) for k, v in layer.state_dict().items()}
    layer.merge()
    layer.to(device)
    x = torch.randn(2, K, device=device)
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert same.merged
        assert torch.equal(same(x), layer(x))
        same.unmerge()
        assert {p.device.type for p in same.state_dict().values()} == {device.type}
        assert {k: bits(v) for k, v in same.state_dict().items()} == want
    assert layer.merged


def test_merge_spares_a_tied_weight():
    embedding = nn.Embedding(N, K)
    head = nn.Linear(K, N, bias=False)
    head.weight = embedding.weight
    layer = LoRALinear(head, R)
    nn.init.normal_(layer.lora_B)
    before = bits(embedding.weight)
    layer.merge()
    assert bits(embedding.weight) == before
    assert layer.base_layer.weight is not embedding.weight


# --- whole models ----------------------------------------------------------------------------------------------------


def llama(**overrides):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    options = {**sizes, "num_key_value_heads": 2, "vocab_size": 50, "initializer_range": 0.1, **overrides}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).eval()


def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=32)
    return transformers.GPT2LMHeadModel(config).eval()


def train(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@torch.no_grad()
def logits(model, device="cpu"):
    return model(IDS.to(device)).logits


def check_plain(model):
    assert not any(type(module).__module__.startswith("peftkern") for module in model.modules())
    assert not hasattr(model, "peftkern_config")
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("cls", [LoRAConfig, QLoRAConfig])
def test_merge_and_unload_then_save_pretrained(device, build, cls, tmp_path):
    names = list(build().state_dict())
    model = train(peftkern.apply(build(), cls(target_modules="minimal", r=4, bias="all")).to(device))
    want = logits(model, device)
    assert merge_and_unload(model) is model
    check_plain(model)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(logits(model, device), want, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).to(device).eval()
    assert torch.equal(logits(again, device), logits(model, device))
    peftkern.apply(model, LoRAConfig(target_modules="minimal"))  # and it can be adapted again


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float32])
def test_nf4_becomes_dense_in_the_stated_dtype(device, dtype):
    model = train(peftkern.apply(llama().bfloat16().to(device), QLoRAConfig(target_modules=["q_proj"], r=4)))
    layer = copy.deepcopy(model.model.layers[0].self_attn.q_proj)
    other = copy.deepcopy(model.model.layers[0].mlp.up_proj)
    merge_and_unload(model, dtype)
    merged, plain = model.model.layers[0].self_attn.q_proj, model.model.layers[0].mlp.up_proj
    assert merged.weight.dtype == plain.weight.dtype == (dtype or torch.bfloat16)
    assert torch.equal(merged.weight, truth(layer).to(merged.weight.dtype))
    assert torch.equal(plain.weight, other.dequantize(torch.float32).to(plain.weight.dtype))
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_dtype_is_not_for_dense_bases():
    model = peftkern.apply(llama().bfloat16(), LoRAConfig(r=4))
    with pytest.raises(ValueError, match=r"dense in torch.bfloat16; leave dtype out"):
        merge_and_unload(model, torch.float16)
    with pytest.raises(ValueError, match="must be a float dtype"):
        merge_and_unload(model, torch.int8)
    assert isinstance(model.model.layers[0].self_attn.q_proj, LoRALinear)
    merge_and_unload(model, torch.bfloat16)


def test_merged_layers_are_not_merged_twice():
    model = train(peftkern.apply(llama(), LoRAConfig(r=4)))
    want = logits(model)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.merge()
    merge_and_unload(model)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)


def test_a_tied_head_is_untied_for_good(tmp_path):
    """A merged head differs from the embedding: the saved model must keep both."""
    for options in (
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ):
        model = train(peftkern.apply(llama(tie_word_embeddings=True), LoRAConfig(r=4, **options)))
        embedding = bits(model.model.embed_tokens.weight)
        want = logits(model)
        merge_and_unload(model)
        assert bits(model.model.embed_tokens.weight) == embedding
        assert model.config.tie_word_embeddings is False
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval()
        torch.testing.assert_close(logits(again), want, rtol=1e-4, atol=1e-4)


def test_layers_placed_by_hand():
    model = nn.Sequential(make(), nn.ReLU(), nn.Linear(N, 4), NF4Linear(4, 4))
    x = torch.randn(3, K)
    want = model(x)
    merge_and_unload(model)
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.Linear]
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)


def test_nothing_to_merge():
    with pytest.raises(ValueError, match="holds no LoRALinear"):
        merge_and_unload(llama())
    model = llama()
    model.peftkern_config = PromptTuningConfig()
    with pytest.raises(ValueError, match="'prompt' changes activations"):
        merge_and_unload(model)


def test_peft_merges_to_the_same_weights(tmp_path):
    peft = pytest.importorskip("peft")
    model = train(peftkern.apply(llama(), LoRAConfig(r=4, target_modules="full")))
    peftkern.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).merge_and_unload()
    ours = merge_and_unload(model).state_dict()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_model_that_bitsandbytes_quantized(tmp_path):
    """from_pretrained in 4 bits, LoRA on some layers, merged: every layer is dense and the flags are gone."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization, device_map="cpu", dtype=torch.float32
    )
    base.train()  # bitsandbytes' CPU inference path rewrites the weights
    want = logits(base)
    model = peftkern.apply(base, LoRAConfig(target_modules="minimal", r=4))
    assert isinstance(model.model.layers[0].self_attn.q_proj.base_layer, NF4Linear)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
    train(model).train()
    want = logits(model)
    merge_and_unload(model)
    check_plain(model)
    assert not any("4bit" in type(module).__name__ for module in model.modules())
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), want, rtol=1e-4, atol=1e-4)
