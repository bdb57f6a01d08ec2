"""Prompts, prefixes and bottleneck adapters on disk: equal logits in stock PEFT, where it has the method, and here."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn as nn
from safetensors.torch import save_file

import peftkern
from peftkern import AdapterConfig, LoRAConfig, PromptTuningConfig, PTuningV2Config, load_adapter, save_adapter
from peftkern.formats.atomic import load_safetensors

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.arange(14).reshape(2, 7)
MASK = torch.ones_like(IDS)


def llama():
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def qwen3():
    """Heads whose size is not hidden_size / heads."""
    torch.manual_seed(1)
    config = transformers.Qwen3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        vocab_size=50,
        initializer_range=0.2,
    )
    return transformers.Qwen3ForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=32, initializer_range=0.2
    )
    return transformers.GPT2LMHeadModel(config).eval()


BASES = [llama, qwen3, gpt2]


def train(model):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@torch.no_grad()
def logits(model):
    """Of the text only: PEFT gives the virtual tokens' logits too where they are prepended."""
    return model(input_ids=IDS, attention_mask=MASK).logits[:, -IDS.shape[1] :]


def differs(a, b):
    return (a - b).abs().max() > 0.01


OURS = {
    "prompt": PromptTuningConfig(num_tokens=5, init="random"),
    "prefix": PTuningV2Config(num_tokens=5),
    "projected prefix": PTuningV2Config(num_tokens=5, projection=True, projection_dim=16),
}


@pytest.mark.parametrize("build", BASES)
@pytest.mark.parametrize("case", OURS)
def test_ours_loads_in_peft_and_in_ours(case, build, tmp_path):
    model = train(peftkern.apply(build(), OURS[case]))
    assert differs(logits(model), logits(build()))
    save_adapter(model, tmp_path, "some/base")
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["peft_type"] == ("PROMPT_TUNING" if case == "prompt" else "PREFIX_TUNING")
    assert values["task_type"] == "CAUSAL_LM"
    assert values["base_model_name_or_path"] == "some/base"
    other = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=5e-5)
    again = load_adapter(build(), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    assert again.peftkern_config.method == model.peftkern_config.method
    assert getattr(again.peftkern_config, "projection", False) == getattr(OURS[case], "projection", False)
    fresh = load_adapter(peftkern.apply(build(), OURS[case]), tmp_path).eval()
    assert torch.equal(logits(fresh), logits(model))


THEIRS = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "projected prefix": lambda: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16
    ),
}


@pytest.mark.parametrize("build", BASES)
@pytest.mark.parametrize("case", THEIRS)
def test_peft_loads_in_ours(case, build, tmp_path):
    theirs = train(peft.get_peft_model(build(), THEIRS[case]()))
    theirs.save_pretrained(tmp_path)
    model = load_adapter(build(), tmp_path).eval()
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=5e-5)
    assert differs(logits(model), logits(build()))


ADAPTERS = {
    "houlsby": AdapterConfig(adapter_dim=8),
    "pfeiffer": AdapterConfig(adapter_dim=8, placement="pfeiffer", hidden_act="relu"),
    "parallel": AdapterConfig(adapter_dim=8, placement="parallel", target_modules=["mlp"], scaling=2.0),
    "saved head": AdapterConfig(adapter_dim=8, modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters(case, build, tmp_path):
    model = train(peftkern.apply(build(), ADAPTERS[case]))
    assert differs(logits(model), logits(build()))
    save_adapter(model, tmp_path)
    again = load_adapter(build(), tmp_path).eval()
    assert again.peftkern_config == ADAPTERS[case]
    assert torch.equal(logits(again), logits(model))
    with pytest.raises((ValueError, KeyError)):  # PEFT has no such method and says so
        peft.PeftModel.from_pretrained(build(), tmp_path)


def edit(folder, tensors=None, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    if tensors is not None:
        save_file(
            tensors(dict(load_safetensors(folder / "adapter_model.safetensors"))), folder / "adapter_model.safetensors"
        )


BAD = {
    "another length": ("prompt", {}, lambda t: {"prompt_embeddings": torch.zeros(4, 32)}, r"must be \[5, width\]"),
    "another width": ("prompt", {}, lambda t: {"prompt_embeddings": torch.zeros(5, 33)}, "33 wide.*32"),
    "no prompt": ("prompt", {}, lambda t: {"other": torch.zeros(5, 32)}, "got none"),
    "extra tensor": ("prompt", {}, lambda t: {**t, "other": torch.zeros(1)}, "other"),
    "prefix width": ("prefix", {}, lambda t: {"prompt_embeddings": torch.zeros(5, 97)}, "97|prompt_embeddings"),
    "submodules": ("prompt", {"num_transformer_submodules": 2}, None, "several submodules"),
    "no length": ("prompt", {"num_virtual_tokens": None}, None, "num_tokens must be a positive integer"),
    "adapter act": ("houlsby", {"hidden_act": "tanh"}, None, "hidden_act must be one of"),
    "adapter missing": ("houlsby", {}, lambda t: dict(list(t.items())[1:]), "missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named(case, tmp_path):
    method, values, tensors, message = BAD[case]
    save_adapter(peftkern.apply(llama(), {**OURS, **ADAPTERS}[method]), tmp_path)
    edit(tmp_path, tensors, **values)
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(llama(), tmp_path)
    assert "\n" not in str(error.value)


def test_another_method_on_the_model(tmp_path):
    save_adapter(peftkern.apply(llama(), OURS["prompt"]), tmp_path)
    with pytest.raises(ValueError, match=r"adapted with 'lora', the file holds 'PROMPT_TUNING'"):
        load_adapter(peftkern.apply(llama(), LoRAConfig()), tmp_path)


def test_an_adapted_model_must_be_adapted_alike(tmp_path):
    save_adapter(peftkern.apply(llama(), ADAPTERS["houlsby"]), tmp_path)
    other = AdapterConfig(adapter_dim=8, hidden_act="relu")
    with pytest.raises(ValueError, match="hidden_act"):
        load_adapter(peftkern.apply(llama(), other), tmp_path)


def test_prompts_train_alone():
    for config in OURS.values():
        model = peftkern.apply(llama(), config)
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        assert names
        assert all(n.startswith(("prompt_tuning.", "ptuning_v2.")) for n in names)
        assert isinstance(model, nn.Module)
