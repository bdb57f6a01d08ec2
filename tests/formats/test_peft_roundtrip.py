"""Adapters against stock PEFT, both directions, on tiny random models: the logits must be equal."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn as nn

import peftkern
from peftkern import LoRAConfig, LoRALinear, QLoRAConfig, load_adapter, save_adapter
from peftkern.formats.adapter import adapter_state_dict
from peftkern.formats.atomic import load_safetensors

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.arange(14).reshape(2, 7)


def llama(**overrides):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    options = {
        **sizes,
        "num_key_value_heads": 2,
        "vocab_size": 50,
        "attention_bias": True,
        "initializer_range": 0.2,
        **overrides,
    }
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def gpt2():
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=32, initializer_range=0.2
    )
    return transformers.GPT2LMHeadModel(config).eval()


def train(model):
    """Moves every trainable parameter somewhere else, as training would."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


CASES = {
    "preset": (llama, {"target_modules": "full", "r": 4}),
    "suffixes": (llama, {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 8}),
    "regex": (llama, {"target_modules": r".*\.1\..*(q|v)_proj", "r": 2}),
    "all-linear": (llama, {"target_modules": "all-linear", "r": 3}),
    "excluded": (llama, {"target_modules": "full", "exclude_modules": ["layers.0.mlp.up_proj", "k_proj"], "r": 2}),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 6, r".*\.2\..*v_proj": 2},
            "alpha_pattern": {"v_proj": 5},
        },
    ),
    "rslora": (llama, {"target_modules": "minimal", "use_rslora": True, "r": 4}),
    "bias all": (llama, {"target_modules": ["q_proj"], "bias": "all", "r": 4}),
    "bias lora_only": (llama, {"target_modules": ["q_proj"], "bias": "lora_only", "r": 4}),
    "saved head": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "r": 4}),
    "saved and bias": (
        llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["layers.2.self_attn.o_proj"], "bias": "all", "r": 4},
    ),
    "conv1d": (gpt2, {"target_modules": "full", "r": 4}),
    "conv1d and saved norm": (gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"], "r": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_ours_loads_in_peft(case, tmp_path):
    build, options = CASES[case]
    model = train(peftkern.apply(build(), LoRAConfig(**options)))
    save_adapter(model, tmp_path)
    other = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=2e-5)
    assert (logits(model) - logits(build())).abs().max() > 0.05
    assert other.peft_config["default"].peft_type == "LORA"


@pytest.mark.parametrize("case", CASES)
def test_ours_loads_in_ours(case, tmp_path):
    build, options = CASES[case]
    model = train(peftkern.apply(build(), LoRAConfig(**options)))
    save_adapter(model, tmp_path)
    again = load_adapter(build(), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    fresh = load_adapter(peftkern.apply(build(), LoRAConfig(**options)), tmp_path).eval()
    assert torch.equal(logits(fresh), logits(model))


PEFT_CASES = {
    "default": (llama, {"r": 4}),
    "regex": (llama, {"target_modules": r".*\.1\..*(q|v)_proj", "r": 2}),
    "all-linear": (llama, {"target_modules": "all-linear", "r": 3}),
    "layers_to_transform": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "r": 4}),
    "layers_pattern": (
        llama,
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers", "r": 4},
    ),
    "half-matched targets": (llama, {"target_modules": ["q_proj", "nowhere"], "r": 4}),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 6, "nothing": 3},
            "alpha_pattern": {"v_proj": 5},
        },
    ),
    "rslora": (llama, {"use_rslora": True, "r": 4, "lora_alpha": 9}),
    "bias all": (llama, {"target_modules": ["q_proj"], "bias": "all", "r": 4}),
    "bias lora_only": (llama, {"target_modules": ["q_proj"], "bias": "lora_only", "r": 4}),
    "saved head": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "r": 4}),
    "saved and bias": (
        llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["layers.2.self_attn.o_proj"], "bias": "all", "r": 4},
    ),
    "gaussian": (llama, {"init_lora_weights": "gaussian", "r": 4}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "r": 4}),
}


@pytest.mark.parametrize("case", PEFT_CASES)
def test_peft_loads_in_ours(case, tmp_path):
    build, options = PEFT_CASES[case]
    theirs = train(peft.get_peft_model(build(), peft.LoraConfig(task_type="CAUSAL_LM", **options)))
    theirs.save_pretrained(tmp_path)
    model = load_adapter(build(), tmp_path).eval()
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=2e-5)
    assert (logits(model) - logits(build())).abs().max() > 0.05
    # and back again: what we then save, PEFT loads
    save_adapter(model, tmp_path / "again")
    back = peft.PeftModel.from_pretrained(build(), tmp_path / "again").eval()
    torch.testing.assert_close(logits(back), logits(theirs), rtol=0, atol=2e-5)


def test_resized_embeddings_come_along(tmp_path):
    """PEFT adds the embeddings to the file of a model whose vocabulary was resized."""
    theirs = train(peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", r=4)))
    with torch.no_grad():
        theirs.get_input_embeddings().weight.mul_(1.5)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    model = load_adapter(llama(), tmp_path).eval()
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=2e-5)


def test_tied_head_trains_alone(tmp_path):
    """A saved copy of a tied head leaves the embedding frozen, and PEFT agrees on the result."""
    build = lambda: llama(tie_word_embeddings=True)  # noqa: E731
    model = peftkern.apply(build(), LoRAConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], r=4))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not model.model.embed_tokens.weight.requires_grad
    assert model.lm_head.weight.requires_grad
    save_adapter(train(model), tmp_path)
    other = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=2e-5)


def test_qlora_is_plain_lora_for_peft(tmp_path):
    options = {"target_modules": "recommended", "r": 4}
    model = train(peftkern.apply(llama(), QLoRAConfig(blocksize=32, **options)))
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert not {"blocksize", "double_quant", "method"} & set(config)
    other = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    ours = load_adapter(llama(), tmp_path, quantize=False).eval()
    torch.testing.assert_close(logits(other), logits(ours), rtol=0, atol=2e-5)
    again = load_adapter(llama(), tmp_path).eval()  # quantizes as it was trained
    assert again.peftkern_config.blocksize == 32
    assert torch.equal(logits(again), logits(model))


def test_sequence_classification_head(tmp_path):
    def build():
        torch.manual_seed(1)
        config = llama().config
        config.num_labels, config.pad_token_id = 3, 0
        return transformers.LlamaForSequenceClassification(config).eval()

    options = {"target_modules": ["q_proj"], "r": 4}
    model = train(peftkern.apply(build(), LoRAConfig(modules_to_save=["score"], **options)))
    save_adapter(model, tmp_path / "ours")
    other = peft.PeftModel.from_pretrained(build(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=2e-5)
    theirs = train(peft.get_peft_model(build(), peft.LoraConfig(task_type="SEQ_CLS", **options)))
    theirs.save_pretrained(tmp_path / "theirs")  # lists "classifier" too, which this model does not have
    ours = load_adapter(build(), tmp_path / "theirs").eval()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=2e-5)


def test_bfloat16_adapters_stay_bfloat16(tmp_path):
    model = train(peftkern.apply(llama().bfloat16(), LoRAConfig(r=4)).bfloat16())
    save_adapter(model, tmp_path)
    stored = load_safetensors(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    again = load_adapter(llama().bfloat16(), tmp_path).eval()
    assert {m.lora_A.dtype for m in again.modules() if isinstance(m, LoRALinear)} == {torch.bfloat16}
    assert torch.equal(logits(again), logits(model))


def test_compiled_and_checkpointed_names_are_clean():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = peftkern.apply(llama(), LoRAConfig(r=4))
    names = list(adapter_state_dict(model))
    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])
    model.model.layers[0] = torch.compile(model.model.layers[0])
    assert list(adapter_state_dict(model)) == names
    assert list(adapter_state_dict(torch.compile(model))) == names
