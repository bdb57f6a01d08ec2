import copy
import pickle

import pytest
import torch
from tiny_models import COMMON, batch, checkpointed, gradients, greedy, tiny
from torch import nn
from transformers import AutoConfig, AutoModel, Trainer, TrainingArguments

from peftkern.nn import AdapterConfig
from peftkern.nn.adapter import (
    Adapter,
    adapter_sites,
    adapter_tensors,
    apply_adapter,
    load_adapter_tensors,
)
from peftkern.nn.inject import apply


class Plain(nn.Module):
    """An adapter in plain PyTorch behind a linear layer, over the parameters of an Adapter."""

    def __init__(self, linear, adapter):
        super().__init__()
        self.linear, self.a = linear, adapter

    def forward(self, x):
        y = self.linear(x)
        return y + self.a.scaling * self.a.up(nn.functional.gelu(self.a.down(y)))


class PlainParallel(Plain):
    def forward(self, x):
        return self.linear(x) + self.a.scaling * self.a.up(nn.functional.gelu(self.a.down(x)))


def enlarge(model):
    """Adapters large enough to matter, as trained ones are."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Adapter):
                for parameter in module.parameters():
                    parameter.normal_(std=0.2)
    return model


def adapted(kind="llama", dropout=0.0, placement="houlsby", **kwargs):
    config = AdapterConfig(adapter_dim=8, adapter_dropout=dropout, placement=placement, **kwargs)
    return enlarge(apply(tiny(kind), config))


# Where a plain-PyTorch adapter behind a linear layer computes the same: the last linear layers of the sublayers.
LAST_LINEAR = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "qwen2": ("self_attn.o_proj", "mlp.down_proj"),
    "gemma2": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("self_attn.out_proj", "fc2"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
}


def layers_of(model):
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


class TestPlacement:
    @pytest.mark.parametrize("kind", LAST_LINEAR)
    @pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
    def test_after_the_sublayers(self, kind, placement):
        model, inputs = adapted(kind, placement=placement), batch()
        reference = tiny(kind)
        for layer, mine in zip(layers_of(reference), layers_of(model)):
            adapters = [module for module in mine.modules() if isinstance(module, Adapter)]
            # In the order of the layer's children, which in OPT and GPT-NeoX is not the order of the calls.
            paths = LAST_LINEAR[kind][1:] if placement == "pfeiffer" else LAST_LINEAR[kind]
            assert len(adapters) == len(paths)
            for path in paths:
                place = mine.get_submodule(path)
                own = getattr(place, "adapter", None) or mine.get_submodule(path.rpartition(".")[0]).adapter
                parent = layer.get_submodule(path.rpartition(".")[0])
                setattr(parent, path.rpartition(".")[2], Plain(layer.get_submodule(path), own))
        expected = reference(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
        assert (expected - tiny(kind)(**inputs).logits).abs().max() > 0.1

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_parallel(self, kind):
        model, inputs, reference = adapted(kind, placement="parallel", scaling=4.0), batch(), tiny(kind)
        attention, mlp = (path.split(".")[0] for path in LAST_LINEAR[kind])
        for layer, mine in zip(layers_of(reference), layers_of(model)):
            setattr(layer, mlp, PlainParallel(getattr(layer, mlp), getattr(mine, mlp).adapter))
            sublayer, adapter = getattr(layer, attention), getattr(mine, attention).adapter
            assert adapter.scaling == 4

            def with_adapter(*args, forward=sublayer.forward, adapter=adapter, **kwargs):
                x = args[0] if args else kwargs["hidden_states"]
                output, *others = forward(*args, **kwargs)
                return output + 4 * adapter.up(nn.functional.gelu(adapter.down(x))), *others

            sublayer.forward = with_adapter
        torch.testing.assert_close(model(**inputs).logits, reference(**inputs).logits, rtol=1e-4, atol=1e-5)

    def test_parallel_starts_as_the_base(self):
        model = apply(tiny("llama"), AdapterConfig(placement="parallel"))
        assert torch.equal(model(**batch()).logits, tiny("llama")(**batch()).logits)

    def test_disabled_is_the_base(self):
        model = adapted()
        for module in model.modules():
            if isinstance(module, Adapter):
                module.enabled = False
        assert torch.equal(model(**batch()).logits, tiny("llama")(**batch()).logits)

    def test_bert(self):
        config = AutoConfig.for_model("bert", **COMMON)
        model = AutoModel.from_config(config).eval()
        names = [site.name for site in adapter_sites(model, AdapterConfig())]
        assert names == [f"encoder.layer.{i}.{part}output.dense" for i in (0, 1) for part in ("attention.", "")]
        before = model(batch()["input_ids"]).last_hidden_state
        enlarge(apply(model, AdapterConfig(adapter_dim=8)))
        assert not torch.allclose(model.eval()(batch()["input_ids"]).last_hidden_state, before, atol=1e-2)

    @pytest.mark.parametrize(
        ("kind", "arguments", "sites"),
        [
            ("mistral", {}, ["self_attn", "mlp"]),
            ("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}, ["attn", "mlp"]),
            ("gptj", {"rotary_dim": 8}, ["attn", "mlp"]),
            ("falcon", {}, ["self_attention", "mlp"]),
            ("phi3", {"num_key_value_heads": 2}, ["self_attn", "mlp"]),
            ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 2}, ["self_attn", "mlp"]),
            ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}, ["attn", "ffn.down_proj"]),
            (
                "t5",
                {"d_kv": 8, "num_layers": 2, "num_heads": 4},
                ["SelfAttention", "EncDecAttention", "DenseReluDense"],
            ),
            ("bart", {"encoder_layers": 1, "decoder_layers": 1}, ["self_attn", "encoder_attn", "fc2"]),
        ],
    )
    def test_names_of_other_models(self, kind, arguments, sites):
        config = AutoConfig.for_model(kind, **{**COMMON, "hidden_size": 32, **arguments})
        with torch.device("meta"):
            model = AutoModel.from_config(config)
        found = {
            site.name.split(".", 3 if "layers" in site.name else 2)[-1]
            for site in adapter_sites(model, AdapterConfig())
        }
        assert {next(s for s in sites if name.endswith(s)) for name in found} == set(sites)

    def test_vision_towers_are_left_alone(self):
        model = nn.ModuleDict({"vision_tower": layered(), "language_model": layered()})
        names = [site.name for site in adapter_sites(model, AdapterConfig(target_modules=["mlp"]))]
        assert names == ["language_model.layers.0.mlp", "language_model.layers.1.mlp"]


def layered(width=6):
    """A plain module with layers."""
    layers = nn.ModuleList(
        nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(width, 9), nn.Linear(9, width))}) for _ in "ab"
    )
    return nn.ModuleDict({"layers": layers})


class TestTargets:
    def test_kinds_names_and_exclusions(self):
        def names(**kwargs):
            return [
                site.name.removeprefix("model.layers.")
                for site in adapter_sites(tiny("llama"), AdapterConfig(**kwargs))
            ]

        assert names() == ["0.self_attn", "0.mlp", "1.self_attn", "1.mlp"]
        assert names(target_modules="attention") == ["0.self_attn", "1.self_attn"]
        assert names(target_modules=["mlp"]) == ["0.mlp", "1.mlp"]
        assert names(placement="pfeiffer") == ["0.mlp", "1.mlp"]
        assert names(target_modules=["attention", "up_proj"]) == [
            "0.self_attn",
            "0.mlp.up_proj",
            "1.self_attn",
            "1.mlp.up_proj",
        ]
        assert names(target_modules=r".*1\.mlp\.down_proj") == ["1.mlp.down_proj"]
        assert names(exclude_modules=["layers.0"]) == ["1.self_attn", "1.mlp"]

    def test_width_of_a_named_layer(self):
        model = apply(tiny("llama"), AdapterConfig(target_modules=["up_proj"]))
        assert model.model.layers[0].mlp.up_proj.adapter.hidden_size == 64
        assert model(**batch()).logits.shape == (2, 10, 64)

    def test_plain_module(self):
        model = apply(layered(), AdapterConfig(target_modules=["mlp"], adapter_dim=3))
        assert model["layers"][1]["mlp"].adapter.hidden_size == 6
        assert model["layers"][1]["mlp"](torch.randn(2, 6)).shape == (2, 6)

    @pytest.mark.parametrize(
        ("kind", "arguments", "message"),
        [
            ("llama", {"target_modules": ["q_porj"]}, "'q_porj' matches no .*did you mean 'q_proj'"),
            ("llama", {"target_modules": ["attention"], "placement": "pfeiffer"}, "must contain 'mlp' for placement"),
            ("llama", {"exclude_modules": ["layers.0", "layers.1"]}, "leaves nothing of target_modules"),
            ("opt", {"placement": "parallel"}, r"'parallel' needs the sublayer around .*layers.0.fc2 as a module"),
            ("bloom", {"placement": "parallel"}, r"'parallel' needs the sublayer around .*self_attention.dense"),
        ],
    )
    def test_errors(self, kind, arguments, message):
        model = tiny(kind)
        keys = list(model.state_dict())
        with pytest.raises(ValueError, match=message) as error:
            apply_adapter(model, AdapterConfig(**arguments))
        assert "\n" not in str(error.value)
        assert list(model.state_dict()) == keys

    def test_no_sublayers(self):
        with pytest.raises(ValueError, match="Sequential has no attention sublayer of a known name"):
            apply_adapter(nn.Sequential(nn.Linear(2, 2)), AdapterConfig())

    def test_apply_adapter_freezes_the_base(self):
        model = apply_adapter(tiny("llama"), AdapterConfig())
        assert all(("adapter" in name) == parameter.requires_grad for name, parameter in model.named_parameters())

    def test_twice(self):
        with pytest.raises(ValueError, match="has an adapter already"):
            apply_adapter(adapted(), AdapterConfig())


class TestModel:
    def test_what_trains_and_what_stays(self):
        base, model = tiny("llama"), adapted()
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == set(model.state_dict()) - set(base.state_dict())
        assert len(trained) == 16
        for key, value in base.state_dict().items():
            assert torch.equal(model.state_dict()[key], value), key

    def test_devices_and_dtypes(self, device):
        model = adapted().to(device)
        reference = model(**batch(device)).loss
        half = copy.deepcopy(model).to(torch.bfloat16)(**batch(device))
        assert half.logits.dtype == torch.bfloat16
        torch.testing.assert_close(half.loss.float(), reference, rtol=0.05, atol=0)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            mixed = model(**batch(device)).loss
        torch.testing.assert_close(mixed.float(), reference, rtol=0.05, atol=0)
        mixed.backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)

    def test_half_precision_base_keeps_float32_adapters(self):
        model = apply(tiny("llama").to(torch.bfloat16), AdapterConfig())
        assert {tensor.dtype for tensor in adapter_tensors(model).values()} == {torch.float32}
        assert model(**batch()).logits.dtype == torch.bfloat16

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    @pytest.mark.parametrize("use_reentrant", [True, False])
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_checkpointing_changes_no_gradient(self, kind, use_reentrant, dropout):
        model, inputs = adapted(kind, dropout), batch()
        plain = gradients(model, model, inputs)
        assert plain.abs().max() > 1e-3
        checkpointed(model, use_reentrant)
        torch.testing.assert_close(gradients(model, model, inputs), plain)

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_generation(self, kind):
        model, ids = adapted(kind), batch()["input_ids"]
        out = greedy(model, ids)
        steps = torch.stack(out.logits, dim=1)
        torch.testing.assert_close(steps, model(out.sequences[:, :-1]).logits[:, -6:], rtol=1e-4, atol=1e-5)
        assert not torch.equal(out.sequences, greedy(tiny(kind), ids).sequences)

    def test_compile(self):
        model, inputs = adapted(), batch()
        del inputs["attention_mask"]
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, model(**inputs).logits)

    @pytest.mark.parametrize("copies", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    @pytest.mark.parametrize("placement", ["houlsby", "parallel"])
    def test_copies_are_independent(self, copies, placement):
        model, inputs = adapted(placement=placement), batch()
        expected = model(**inputs).logits
        other = copies(model)
        for tensor in adapter_tensors(model).values():
            tensor.zero_()
        assert torch.equal(other(**inputs).logits, expected)
        assert not torch.equal(model(**inputs).logits, expected)

    def test_trainer(self, tmp_path):
        model, base = adapted(dropout=0.1), tiny("llama")
        rows = [{key: value[i] for key, value in batch().items()} for i in (0, 1)] * 4
        arguments = TrainingArguments(
            tmp_path, per_device_train_batch_size=2, max_steps=8, learning_rate=0.02, report_to=[], disable_tqdm=True,
            gradient_checkpointing=True, save_strategy="no", use_cpu=True, logging_strategy="no",
        )  # fmt: skip
        before = model(**batch()).loss.item()
        Trainer(model, arguments, train_dataset=rows).train()
        assert model.eval()(**batch()).loss.item() < before - 0.1
        for name, parameter in base.named_parameters():
            assert torch.equal(parameter, model.get_parameter(name)), name


class TestTensors:
    def test_round_trip(self):
        model, other, inputs = adapted(), adapted(), batch()
        enlarge(model)
        tensors = {key: value.to(torch.float64) for key, value in adapter_tensors(model).items()}
        assert "model.layers.1.mlp.adapter.up.bias" in tensors
        load_adapter_tensors(other, tensors)
        assert torch.equal(other(**inputs).logits, model(**inputs).logits)

    def test_names_are_the_unwrapped_models(self):
        model = adapted()
        compiled = torch.compile(model, backend="eager")
        assert list(adapter_tensors(compiled)) == list(adapter_tensors(model))
        assert list(adapter_tensors(nn.DataParallel(model))) == list(adapter_tensors(model))

    def test_errors_change_nothing(self):
        model = adapted()
        key = "model.layers.0.mlp.adapter.down.weight"
        good = {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}
        zeros = {name: torch.zeros_like(tensor) for name, tensor in good.items()}
        with pytest.raises(ValueError, match=f"1 of 16 tensors are missing, the first is {key}"):
            load_adapter_tensors(model, {name: zeros[name] for name in zeros if name != key})
        with pytest.raises(ValueError, match="1 tensors belong to no adapter of this model, the first is x"):
            load_adapter_tensors(model, {**zeros, "x": torch.zeros(1)})
        with pytest.raises(ValueError, match=rf"{key} must be \(8, 32\), got \(4, 32\)"):
            load_adapter_tensors(model, {**zeros, key: torch.zeros(4, 32)})
        with pytest.raises(ValueError, match="LlamaForCausalLM has no adapters"):
            adapter_tensors(tiny("llama"))
        assert all(torch.equal(tensor, good[name]) for name, tensor in adapter_tensors(model).items())
