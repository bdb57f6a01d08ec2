"""apply: what is replaced, what trains, what is refused; Transformers models and plain modules."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn as nn

import peftkern
from peftkern import LoRAConfig, LoRALinear, NF4Linear, QLoRAConfig, QLoRALinear
from peftkern.nn.inject import trainable_parameters

IDS = torch.arange(12).reshape(2, 6)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.v_proj, self.o_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.o_proj(self.q_proj(x) * self.k_proj(x) + self.v_proj(x))


class Plain(nn.Module):
    """A small model without Transformers, tied head included."""

    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 20, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def get_input_embeddings(self):
        return self.embed

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.lm_head(self.norm(x))


def llama(**overrides):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**sizes, "num_key_value_heads": 2, "vocab_size": 50, **overrides})
    return transformers.LlamaForCausalLM(config)


def trained(model):
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_B, std=0.1)
    return model


def adapted(model):
    return [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]


def trains(model):
    return sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)


@pytest.mark.parametrize("cls", [LoRAConfig, QLoRAConfig])
def test_apply_in_place(device, cls):
    model = Plain().to(device).eval()
    before = model(IDS.to(device))
    config = cls(r=4, target_modules="recommended")
    assert peftkern.apply(model, config) is model
    assert model.peftkern_config is config
    assert adapted(model) == [f"layers.{i}.{p}_proj" for i in (0, 1) for p in "qkvo"]
    assert trains(model) == sorted(f"{name}.{p}" for name in adapted(model) for p in ("lora_A", "lora_B"))
    assert not any(module.training for module in model.modules())
    after = model(IDS.to(device))
    if cls is LoRAConfig:
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    else:
        assert all(isinstance(model.get_submodule(name), QLoRALinear) for name in adapted(model))
        assert 0 < (after - before).abs().max() < 0.5 * before.abs().max()


def test_ranks_alphas_and_scaling():
    model = Plain()
    config = LoRAConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.25,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"layers.1.q_proj": 2, r".*0\.v_proj": 8},
        alpha_pattern={"v_proj": 3},
        use_rslora=True,
    )
    peftkern.apply(model, config)
    got = {
        n: (m.rank, m.lora_alpha, m.scaling, m.dropout) for n, m in model.named_modules() if isinstance(m, LoRALinear)
    }
    assert got == {
        "layers.0.q_proj": (4, 8, 8 / 4**0.5, 0.25),
        "layers.0.v_proj": (8, 3, 3 / 8**0.5, 0.25),
        "layers.1.q_proj": (2, 8, 8 / 2**0.5, 0.25),
        "layers.1.v_proj": (4, 3, 3 / 4**0.5, 0.25),
    }


def test_biases():
    lora = [f"layers.{i}.q_proj.lora_{p}" for i in (0, 1) for p in "AB"]
    for bias, extra in (
        ("none", []),
        ("lora_only", [f"layers.{i}.q_proj.base_layer.bias" for i in (0, 1)]),
        (
            "all",
            [f"layers.{i}.{n}.bias" for i in (0, 1) for n in ("q_proj.base_layer", "v_proj", "o_proj")] + ["norm.bias"],
        ),
    ):
        model = peftkern.apply(Plain(), LoRAConfig(target_modules=["q_proj"], bias=bias))
        assert trains(model) == sorted(lora + extra)
        model(IDS).sum().backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if n in extra)


def test_qlora_quantizes_everything_but_the_head():
    model = peftkern.apply(Plain().bfloat16(), QLoRAConfig(target_modules="minimal", blocksize=32))
    kinds = {n: type(m) for n, m in model.named_modules() if n.endswith(("_proj", "lm_head"))}
    assert kinds == {
        "lm_head": nn.Linear,
        **{f"layers.{i}.{p}_proj": QLoRALinear for i in (0, 1) for p in "qv"},
        **{f"layers.{i}.{p}_proj": NF4Linear for i in (0, 1) for p in "ko"},
    }
    layer = model.layers[0].k_proj
    assert (layer.blocksize, layer.double_quant, layer.weight_dtype) == (32, True, torch.bfloat16)
    model(IDS).sum().backward()
    assert model.layers[0].q_proj.lora_A.grad is not None


def test_qlora_head_adapter_stays_dense():
    model = peftkern.apply(Plain(), QLoRAConfig(target_modules=["lm_head"]))
    assert type(model.lm_head) is LoRALinear
    assert type(model.layers[0].q_proj) is NF4Linear


def test_qlora_holds_one_dense_weight_at_a_time(monkeypatch):
    """Module by module: when a layer is quantized, the dense weights of those before it are gone."""
    import weakref

    from peftkern.nn import inject

    model = Plain()
    weights = [weakref.ref(m.weight) for m in model.layers.modules() if isinstance(m, nn.Linear)]
    alive = []
    quantized = inject.quantized
    monkeypatch.setattr(
        inject, "quantized", lambda *a: (alive.append(sum(w() is not None for w in weights)), quantized(*a))[1]
    )
    peftkern.apply(model, QLoRAConfig(target_modules=["q_proj"]))
    assert alive == [6, 5, 4, 3, 2, 1]  # the two targets went first
    assert not any(w() is not None for w in weights)


def test_modules_to_save_train_in_full_and_alone():
    model = Plain(tied=True)
    embedding = model.embed.weight
    peftkern.apply(model, LoRAConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "layers.1.o_proj"]))
    assert model.embed.weight is embedding
    assert model.lm_head.weight is not embedding
    extra = {"lm_head.weight", "layers.1.o_proj.weight", "layers.1.o_proj.bias"}
    assert {n for n in trains(model) if "lora" not in n} == extra


def test_saved_modules_are_neither_adapted_nor_quantized():
    model = peftkern.apply(Plain(), QLoRAConfig(target_modules="all-linear", modules_to_save=["layers.0"]))
    assert {type(m) for m in model.layers[0].children()} == {nn.Linear}
    assert adapted(model) == [f"layers.1.{p}_proj" for p in "qkvo"]


def test_a_module_used_twice_is_replaced_everywhere():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared), "c": nn.Linear(4, 4)})
    peftkern.apply(model, LoRAConfig(target_modules=["a.0"]))
    assert isinstance(model["a"][0], LoRALinear)
    assert model["b"][0] is model["a"][0]


def test_parameter_counts_and_pefts_line(capsys):
    model = Plain()
    total = sum(p.numel() for p in model.parameters())
    assert trainable_parameters(model) == (total, total)
    peftkern.apply(model, LoRAConfig(r=2, target_modules=["q_proj"]))
    lora = 2 * 2 * (8 + 8)
    assert trainable_parameters(model) == (lora, total + lora)
    capsys.readouterr()
    peftkern.print_trainable_parameters(model)
    assert capsys.readouterr().out == (
        f"trainable params: {lora} || all params: {total + lora} || trainable%: {100 * lora / (total + lora):.4f}\n"
    )
    quantized = peftkern.apply(Plain(), QLoRAConfig(r=2, target_modules=["q_proj"]))
    assert trainable_parameters(quantized) == (lora, total + lora)
    peftkern.print_trainable_parameters(
        nn.Sequential(nn.Linear(1500, 1, bias=False), nn.Linear(1, 1).requires_grad_(False))
    )
    assert capsys.readouterr().out == "trainable params: 1,500 || all params: 1,502 || trainable%: 99.8668\n"


def test_pefts_own_count_agrees():
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    ours = peftkern.apply(llama(), LoRAConfig(r=4, target_modules="all-linear"))
    assert trainable_parameters(ours) == theirs.get_nb_trainable_parameters()


ERRORS = [
    (lambda: (Plain(), LoRAConfig(target_modules=["q_prj"])), "did you mean"),
    (lambda: (Plain(), LoRAConfig(rank_pattern={"qq_proj": 3})), "rank_pattern: 'qq_proj' fits none"),
    (lambda: (Plain(), LoRAConfig(alpha_pattern={"zzz": 3})), "alpha_pattern: 'zzz' fits none"),
    (
        lambda: (Plain(), LoRAConfig(modules_to_save=["lm_haed"])),
        "modules_to_save: 'lm_haed' matches no module; did you",
    ),
    (lambda: (Plain(), LoRAConfig(modules_to_save=["layers"])), "contains every target"),
    (lambda: (Plain(), QLoRAConfig(target_modules=["nope"])), "'nope' matches no"),
    (lambda: (nn.Sequential(nn.Linear(4, 4, device="meta")), QLoRAConfig(target_modules=["0"])), "meta device"),
    (lambda: (nn.Linear(4, 4), LoRAConfig(target_modules="all-linear")), "holds no"),
    (lambda: (torch.compile(Plain()), LoRAConfig()), "apply first, then compile"),
    (lambda: (nn.DataParallel(Plain()), LoRAConfig()), "apply first, then compile or wrap"),
    (lambda: ("model", LoRAConfig()), "must be a torch.nn.Module"),
    (lambda: (Plain(), {"r": 4}), "config must be a LoRAConfig"),
    (lambda: (nn.Sequential(Plain(), LoRALinear(nn.Linear(4, 4))), LoRAConfig()), "1 is already adapted"),
]


@pytest.mark.parametrize("case", range(len(ERRORS)))
def test_errors_leave_the_model_as_it_was(case):
    build, message = ERRORS[case]
    model, config = build()
    names = trains(model) if isinstance(model, nn.Module) else None
    with pytest.raises((ValueError, TypeError), match=message) as error:
        peftkern.apply(model, config)
    assert "\n" not in str(error.value)
    if names is not None:
        assert trains(model) == names
        assert not hasattr(model, "peftkern_config")


def test_twice_is_an_error():
    model = peftkern.apply(Plain(), LoRAConfig())
    with pytest.raises(ValueError, match="has 'lora' already"):
        peftkern.apply(model, LoRAConfig())
    assert len(adapted(model)) == 8
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="already adapted"):
        peftkern.apply(peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM")), LoRAConfig())


def test_foreign_packed_weights_are_named():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.ModuleDict({"ok": nn.Linear(16, 16), "q_proj": bnb.nn.Linear8bitLt(16, 16, has_fp16_weights=False)})
    model["q_proj"].weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"target q_proj: .*Linear8bitLt.*int8"):
        peftkern.apply(model, LoRAConfig(target_modules="all-linear"))
    assert type(model["ok"]) is nn.Linear


# --- Transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [LoRAConfig, QLoRAConfig])
def test_training_lowers_the_loss_and_generate_works(device, cls):
    model = peftkern.apply(llama(initializer_range=0.1), cls(r=8, target_modules="all-linear")).to(device).train()
    ids = IDS.to(device)
    # A rate at which training is smooth: at 3e-2 it is chaotic, and where 30 steps lead depends on the CPU's rounding.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]
    out = model.eval().generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 10)
    again = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(out, again)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("cls", [LoRAConfig, QLoRAConfig])
def test_gradient_checkpointing_gives_the_same_gradients(device, cls, use_reentrant):
    model = peftkern.apply(llama(), cls(r=4, lora_dropout=0.3)).to(device).train()
    trained(model)
    ids = IDS.to(device)

    def gradients():
        torch.manual_seed(3)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    again = gradients()
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert gradient.any(), name
        assert torch.equal(gradient, again[name]), name


@pytest.mark.parametrize("cls", [LoRAConfig, QLoRAConfig])
def test_adapted_models_copy_and_pickle(cls):
    model = trained(peftkern.apply(llama(), cls(r=4))).eval()
    want = model(IDS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS).logits, want)
        assert other.peftkern_config == model.peftkern_config


@pytest.mark.parametrize("cls", [LoRAConfig, QLoRAConfig])
def test_state_dict_round_trip(cls):
    model = trained(peftkern.apply(llama(), cls(r=4))).eval()
    other = peftkern.apply(llama(initializer_range=0.1), cls(r=4)).eval()
    assert not torch.allclose(other(IDS).logits, model(IDS).logits)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_compile_fullgraph_of_a_whole_model(device):
    model = trained(peftkern.apply(llama(), QLoRAConfig(r=4))).to(device).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(input_ids=IDS.to(device), labels=IDS.to(device), use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss, model(input_ids=IDS.to(device), labels=IDS.to(device)).loss, rtol=1e-5, atol=1e-5)
    assert model.model.layers[0].self_attn.q_proj.lora_A.grad.any()


def test_ddp_skips_the_frozen_bytes():
    model = peftkern.apply(llama(), QLoRAConfig(r=4))
    buffers = {n for n, b in model.named_buffers() if "packed" in n or "absmax" in n}
    assert buffers
    assert buffers <= set(model._ddp_params_and_buffers_to_ignore)
    assert not any("lora" in name for name in model._ddp_params_and_buffers_to_ignore)


def test_gpt2_conv1d_under_both_methods(device):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=16)
    ids = IDS.to(device)
    base = transformers.GPT2LMHeadModel(config).to(device).eval()
    want = base(ids).logits
    lora = peftkern.apply(copy.deepcopy(base), LoRAConfig(target_modules="full"))
    torch.testing.assert_close(lora(ids).logits, want, rtol=1e-4, atol=1e-4)
    qlora = peftkern.apply(copy.deepcopy(base), QLoRAConfig(target_modules="minimal"))
    assert {type(m).__name__ for n, m in qlora.named_modules() if n.endswith(("c_attn", "c_proj", "c_fc"))} == {
        "QLoRALinear",
        "NF4Linear",
    }
    assert 0 < (qlora(ids).logits - want).abs().max() < 0.3 * want.abs().max()


def test_without_transformers():
    """Plain modules work where Transformers, PEFT and bitsandbytes are not installed."""
    code = (
        "import sys\n"
        "for name in ('transformers', 'peft', 'bitsandbytes', 'yaml'): sys.modules[name] = None\n"
        "import tempfile, torch, torch.nn as nn, peftkern\n"
        "build = lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))\n"
        "for config in (peftkern.LoRAConfig, peftkern.QLoRAConfig):\n"
        "    torch.manual_seed(0)\n"
        "    model = peftkern.apply(build(), config(target_modules='all-linear', r=2))\n"
        "    model(torch.randn(3, 8)).sum().backward()\n"
        "    folder = tempfile.mkdtemp()\n"
        "    peftkern.save_adapter(model, folder)\n"
        "    torch.manual_seed(0)\n"
        "    again = peftkern.load_adapter(build(), folder)\n"
        "    x = torch.randn(3, 8)\n"
        "    assert torch.equal(again(x), model(x))\n"
        "    merged = peftkern.merge_and_unload(model)\n"
        "    assert type(merged[0]) is nn.Linear\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
