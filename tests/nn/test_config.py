"""Configs: loading, and errors that name the field and what comes close; target matching."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from peftkern import (
    AdapterConfig,
    LoRAConfig,
    MethodConfig,
    PromptTuningConfig,
    PTuningV2Config,
    QLoRAConfig,
)
from peftkern.nn.targets import check_patterns, linear_kinds, match_modules, match_pattern, output_head_names

ALL = (LoRAConfig, QLoRAConfig, AdapterConfig, PromptTuningConfig, PTuningV2Config)


@pytest.mark.parametrize("cls", ALL)
def test_defaults_and_round_trip(cls):
    config = cls()
    assert MethodConfig.from_dict(config.to_dict()) == config
    assert cls.from_dict(config.to_dict()) == config
    assert cls.from_dict({}) == config
    assert config.to_dict()["method"] == cls.method
    assert cls() is not cls()
    assert cls().to_dict() is not config.to_dict()


def test_the_defaults_are_the_fields():
    lora = LoRAConfig()
    assert (lora.r, lora.lora_alpha, lora.bias, lora.target_modules) == (16, 32, "none", "recommended")
    assert (QLoRAConfig().blocksize, QLoRAConfig().double_quant) == (64, True)
    assert (AdapterConfig().adapter_dim, AdapterConfig().target_modules) == (64, ["attention", "mlp"])
    assert PromptTuningConfig().num_tokens == 20


def test_yaml(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "c.yaml"
    path.write_text(
        "method: qlora\nr: 8\ntarget_modules: [q_proj, v_proj]\nrank_pattern: {layers.0.q_proj: 4}\n"
        "compute_dtype: bfloat16\n"
    )
    config = QLoRAConfig.from_yaml(path)
    assert config == MethodConfig.from_yaml(path)
    assert config.rank_pattern == {"layers.0.q_proj": 4}
    assert config.compute_dtype == torch.bfloat16
    assert config.to_dict()["compute_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("r: [\n", "is not YAML"),
        ("!!python/object/apply:os.system ['true']\n", "is not YAML"),
        ("rr: 3\n", "unknown field 'rr'"),
        ("method: adapter\n", "method must be 'lora'"),
        ("r: 0\n", "r must be a positive integer, got 0"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    pytest.importorskip("yaml")
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        LoRAConfig.from_yaml(path)
    assert "\n" not in str(error.value)


def test_unreadable_yaml(tmp_path):
    pytest.importorskip("yaml")
    with pytest.raises(ValueError, match=r"cannot read .*No such file"):
        LoRAConfig.from_yaml(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        LoRAConfig.from_yaml(tmp_path / "b.yaml")


@pytest.mark.parametrize(
    ("cls", "name", "hint"),
    [
        (LoRAConfig, "rank", "'r'"),
        (LoRAConfig, "alpha", "'lora_alpha'"),
        (LoRAConfig, "target_module", "'target_modules'"),
        (LoRAConfig, "lora_dropot", "'lora_dropout'"),
        (QLoRAConfig, "block_size", "'blocksize'"),
        (PromptTuningConfig, "num_virtual_tokens", "'num_tokens'"),
        (PTuningV2Config, "prefix_projection", "'projection'"),
        (AdapterConfig, "zzz", "the fields are adapter_dim"),
    ],
)
def test_unknown_fields_name_near_misses(cls, name, hint):
    with pytest.raises(ValueError, match=hint):
        cls.from_dict({name: 1})


def test_unknown_methods():
    with pytest.raises(ValueError, match="method must be one of"):
        MethodConfig.from_dict({"method": "dora"})
    with pytest.raises(ValueError, match="method must be one of"):
        MethodConfig.from_dict({})
    with pytest.raises(TypeError, match="expected a mapping"):
        LoRAConfig.from_dict([("r", 4)])


@pytest.mark.parametrize(
    ("cls", "values", "field"),
    [
        (LoRAConfig, {"r": -1}, "r"),
        (LoRAConfig, {"r": True}, "r"),
        (LoRAConfig, {"r": 8.0}, "r"),
        (LoRAConfig, {"lora_alpha": "32"}, "lora_alpha"),
        (LoRAConfig, {"lora_alpha": float("inf")}, "lora_alpha"),
        (LoRAConfig, {"lora_dropout": 1}, "lora_dropout"),
        (LoRAConfig, {"target_modules": []}, "target_modules"),
        (LoRAConfig, {"target_modules": ""}, "target_modules"),
        (LoRAConfig, {"target_modules": None}, "target_modules"),
        (LoRAConfig, {"target_modules": ["q", 3]}, "target_modules"),
        (LoRAConfig, {"exclude_modules": 3}, "exclude_modules"),
        (LoRAConfig, {"bias": True}, "bias"),
        (LoRAConfig, {"modules_to_save": "lm_head"}, "modules_to_save"),
        (LoRAConfig, {"use_rslora": "yes"}, "use_rslora"),
        (LoRAConfig, {"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        (LoRAConfig, {"rank_pattern": ["q_proj"]}, "rank_pattern"),
        (LoRAConfig, {"rank_pattern": {"q_proj": 2.5}}, "rank_pattern"),
        (LoRAConfig, {"alpha_pattern": {1: 2}}, "alpha_pattern"),
        (QLoRAConfig, {"blocksize": 100}, "blocksize"),
        (QLoRAConfig, {"double_quant": 1}, "double_quant"),
        (QLoRAConfig, {"compute_dtype": "int8"}, "compute_dtype"),
        (QLoRAConfig, {"compute_dtype": torch.int8}, "compute_dtype"),
        (QLoRAConfig, {"r": 0}, "r"),
        (AdapterConfig, {"adapter_dim": 0}, "adapter_dim"),
        (AdapterConfig, {"hidden_act": "tanh"}, "hidden_act"),
        (AdapterConfig, {"adapter_dropout": -1}, "adapter_dropout"),
        (AdapterConfig, {"placement": "above"}, "placement"),
        (AdapterConfig, {"scaling": None}, "scaling"),
        (PromptTuningConfig, {"num_tokens": 0}, "num_tokens"),
        (PromptTuningConfig, {"init": "zeros"}, "init"),
        (PromptTuningConfig, {"init": "text"}, "init_text"),
        (PromptTuningConfig, {"init_text": "hello"}, "init_text"),
        (PromptTuningConfig, {"init": "text", "init_text": "  "}, "init_text"),
        (PTuningV2Config, {"num_tokens": "5"}, "num_tokens"),
        (PTuningV2Config, {"projection": 1}, "projection"),
        (PTuningV2Config, {"projection_dim": 0}, "projection_dim"),
        (PTuningV2Config, {"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_values_name_class_field_and_value(cls, values, field):
    with pytest.raises(ValueError, match=rf"^{cls.__name__}: {field} must be .*, got .*; .+"):
        cls(**values)


def test_tuples_and_sets_become_lists():
    assert LoRAConfig(target_modules=("b", "a")).target_modules == ["b", "a"]
    assert LoRAConfig(target_modules={"b", "a"}).target_modules == ["a", "b"]


# --- target matching -------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(4, 4))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp, self.norm = Attention(), nn.Module(), nn.LayerNorm(4)
        self.mlp.up_proj, self.mlp.down_proj = nn.Linear(4, 8), nn.Linear(8, 4)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(3, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.lm_head = nn.Linear(4, 3)


def names(*suffixes, layers=(0, 1)):
    order = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    return [f"layers.{i}.{name}" for i in layers for name in order if name.rsplit(".", 1)[1] in suffixes]


EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (["q_proj"], names("q_proj")),
        (["v_proj", "self_attn.q_proj"], names("q_proj", "v_proj")),
        (["layers.1.self_attn.q_proj"], names("q_proj", layers=[1])),
        (["lm_head", "o_proj"], [*names("o_proj"), "lm_head"]),
        (r".*\.0\..*(q|k)_proj", names("q_proj", "k_proj", layers=[0])),
        (r"layers\.1\.mlp\..*", names("up_proj", "down_proj", layers=[1])),
        ("all-linear", names(*EVERY)),
        ("ALL-LINEAR", names(*EVERY)),
        ("minimal", names("q_proj", "v_proj")),
        ("recommended", names("q_proj", "k_proj", "v_proj", "o_proj")),
        ("full", names(*EVERY)),
    ],
)
def test_targets(target, expected):
    assert match_modules(Model(), target) == expected


def test_excludes():
    assert match_modules(Model(), "minimal", ["layers.0.self_attn.q_proj"]) == [
        *names("v_proj", layers=[0]),
        *names("q_proj", "v_proj", layers=[1]),
    ]
    assert match_modules(Model(), ["q_proj"], r"layers\.0\..*") == names("q_proj", layers=[1])


@pytest.mark.parametrize(
    ("target", "exclude", "message"),
    [
        (["q_prj"], None, r"'q_prj' matches no .*did you mean .*'q_proj'"),
        (["q_proj", "gate_proj"], None, r"'gate_proj' matches no Linear module; did you mean"),
        (["proj"], None, "'proj' matches no"),
        (["q_pro"], None, "did you mean"),
        (["zzzzzz"], None, "there are q_proj, k_proj"),
        (["embed"], None, "'embed' selects embed, a Embedding"),
        (["norm"], None, "selects layers.0.norm, a LayerNorm"),
        ("q_proj", None, "regular expression 'q_proj' matches no whole module name"),
        ("minimall", None, "did you mean 'minimal'"),
        ("all_linear", None, "did you mean 'all-linear'"),
        ("(", None, "is not a regular expression"),
        (["q_proj"], ["q_proj"], "leaves nothing"),
        (["q_proj"], ["k_prj"], "exclude_modules: 'k_prj' matches no module; did you mean 'k_proj'"),
        (["q_proj"], "nothing.*", "exclude_modules"),
        (["q_proj"], "[", "exclude_modules: .*not a regular expression"),
    ],
)
def test_what_matches_nothing_is_named(target, exclude, message):
    with pytest.raises(ValueError, match=message) as error:
        match_modules(Model(), target, exclude)
    assert "\n" not in str(error.value)


def test_presets_need_known_names():
    with pytest.raises(ValueError, match=r"preset 'recommended' does not know .* list those you want of 0, 1"):
        match_modules(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "recommended")
    attention_only = nn.ModuleDict({"self_attn": Attention()})
    assert len(match_modules(attention_only, "recommended")) == 4
    with pytest.raises(ValueError, match="finds no linear MLP layer"):
        match_modules(attention_only, "full")


def test_models_without_linear_layers():
    with pytest.raises(ValueError, match="holds no Linear module"):
        match_modules(nn.Conv2d(1, 1, 1), "all-linear")
    with pytest.raises(ValueError, match="finds only the output head"):
        match_modules(nn.ModuleDict({"lm_head": nn.Linear(2, 2)}), "all-linear")


def test_multihead_attention_is_left_alone():
    """nn.MultiheadAttention reads its out_proj's weight and never calls it: an update there would do nothing."""
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "fc": nn.Linear(4, 4)})
    assert match_modules(model, "all-linear") == ["fc"]
    with pytest.raises(ValueError, match="NonDynamicallyQuantizableLinear"):
        match_modules(model, ["out_proj"])


def test_patterns_are_pefts():
    assert match_pattern({"q_proj": 1, ".*": 2}, "layers.0.q_proj") == "q_proj"
    assert match_pattern({"proj": 1}, "layers.0.q_proj") is None
    assert match_pattern({r"layers\.\d\.q_proj": 1}, "model.layers.0.q_proj") is not None
    check_patterns("rank_pattern", {"q_proj": 3}, ["a.q_proj"])
    with pytest.raises(ValueError, match=r"rank_pattern: 'qproj' fits none .*'q_proj'"):
        check_patterns("rank_pattern", {"qproj": 3}, ["a.q_proj"])
    with pytest.raises(ValueError, match=r"alpha_pattern: .*not a regular expression"):
        check_patterns("alpha_pattern", {"(": 3}, ["a.q_proj"])


def _tiny(kind):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    wide = {**small, "intermediate_size": 16}
    configs = {
        "llama": lambda: transformers.LlamaConfig(**wide),
        "qwen3": lambda: transformers.Qwen3Config(**wide, num_key_value_heads=1, head_dim=8),
        "mistral": lambda: transformers.MistralConfig(**wide, num_key_value_heads=1),
        "mixtral": lambda: transformers.MixtralConfig(**wide, num_key_value_heads=1, num_local_experts=2),
        "phi3": lambda: transformers.Phi3Config(**wide, pad_token_id=0),
        "gpt2": lambda: transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**wide),
        "opt": lambda: transformers.OPTConfig(**small, ffn_dim=16, word_embed_proj_dim=16, pad_token_id=0),
        "gptj": lambda: transformers.GPTJConfig(n_embd=16, n_layer=1, n_head=2, vocab_size=20, rotary_dim=4),
        "falcon": lambda: transformers.FalconConfig(**small),
        "bloom": lambda: transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=20),
    }
    return transformers.AutoModelForCausalLM.from_config(configs[kind]())


# per kind: minimal, recommended, full: the last parts of the names
KNOWN = {
    "llama": (["q", "v"], ["q", "k", "v", "o"], ["q", "k", "v", "o", "gate", "up", "down"]),
    "qwen3": (["q", "v"], ["q", "k", "v", "o"], ["q", "k", "v", "o", "gate", "up", "down"]),
    "mistral": (["q", "v"], ["q", "k", "v", "o"], ["q", "k", "v", "o", "gate", "up", "down"]),
    "mixtral": (["q", "v"], ["q", "k", "v", "o"], None),
    "phi3": (["qkv"], ["qkv", "o"], ["qkv", "o", "gate_up", "down"]),
    "gpt2": (["c_attn"], ["c_attn", "attn.c"], ["c_attn", "attn.c", "c_fc", "mlp.c"]),
    "gpt_neox": (
        ["query_key_value"],
        ["query_key_value", "dense"],
        ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    ),
    "opt": (["q", "v"], ["q", "k", "v", "out"], ["q", "k", "v", "out", "fc1", "fc2"]),
    "gptj": (["q", "v"], ["q", "k", "v", "out"], ["q", "k", "v", "out", "fc_in", "fc_out"]),
    "falcon": (
        ["query_key_value"],
        ["query_key_value", "dense"],
        ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    ),
    "bloom": (
        ["query_key_value"],
        ["query_key_value", "dense"],
        ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    ),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_presets_know_the_architectures(kind):
    model = _tiny(kind)
    for preset, expected in zip(("minimal", "recommended", "full"), KNOWN[kind], strict=True):
        if expected is None:  # experts in one fused tensor
            with pytest.raises(ValueError, match="fused into one tensor"):
                match_modules(model, preset, kinds=linear_kinds())
            continue
        found = match_modules(model, preset, kinds=linear_kinds())
        short = [name.removesuffix("_proj") for name in found]
        assert len(found) == len(expected), found
        assert all(any(name.endswith(f".{end}") for name in short) for end in expected), found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "opt"])
def test_all_linear_leaves_the_head(kind):
    model = _tiny(kind)
    found = match_modules(model, "all-linear", kinds=linear_kinds())
    heads = output_head_names(model)
    assert heads in ({"lm_head"}, {"embed_out"})
    every = [name for name, module in model.named_modules() if isinstance(module, linear_kinds())]
    assert set(every) - set(found) == heads
