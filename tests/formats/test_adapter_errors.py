"""Adapter files that cannot be loaded, or saved, say why in one line and change nothing."""

from __future__ import annotations

import copy
import errno
import json
import os

import pytest
import torch
import torch.nn as nn
from safetensors.torch import save_file

import peftkern
from peftkern import LoRAConfig, QLoRAConfig, load_adapter, save_adapter
from peftkern.formats.adapter import adapter_state_dict, set_adapter_state_dict
from peftkern.formats.atomic import load_safetensors


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 6)
        self.embed = nn.Embedding(5, 8)

    def forward(self, x):
        return self.v_proj(self.q_proj(x))


def build():
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.Linear(6, 6), nn.Linear(6, 4))


OPTIONS = {"target_modules": ["q_proj", "v_proj"], "r": 2}


@pytest.fixture
def saved(tmp_path):
    model = peftkern.apply(build(), LoRAConfig(**OPTIONS))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    save_adapter(model, tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v != "<drop>"}))


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = dict(load_safetensors(path))
    save_file(change({k: v.clone() for k, v in tensors.items()}), path)


def refuses(folder, message, model=None):
    model = build() if model is None else model
    before, names = copy.deepcopy(model.state_dict()), [n for n, _ in model.named_modules()]
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(model, folder)
    assert "\n" not in str(error.value)
    assert [n for n, _ in model.named_modules()] == names
    assert [p.requires_grad for p in model.parameters()] == flags
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])


FEATURES = {
    "use_dora": True,
    "use_qalora": True,
    "lora_bias": True,
    "trainable_token_indices": [1, 2],
    "target_parameters": ["q_proj.weight"],
    "layer_replication": [[0, 2]],
    "alora_invocation_tokens": [3],
    "megatron_config": {"a": 1},
    "use_bdlora": {"x": 1},
    "arrow_config": {"top_k": 2},
    "ensure_weight_tying": True,
    "a_future_feature": "yes",
    "init_lora_weights": "pissa_niter_4",
}


@pytest.mark.parametrize("feature", FEATURES)
def test_unsupported_features_are_refused_by_name(saved, feature):
    edit_config(saved, **{feature: FEATURES[feature]})
    refuses(saved, feature)
    refuses(saved, feature, peftkern.apply(build(), LoRAConfig(**OPTIONS)))


@pytest.mark.parametrize("kind", ["P_TUNING", "IA3", "XLORA", None, 7, ["LORA"]])
def test_other_methods_are_refused_by_name(saved, kind):
    edit_config(saved, peft_type=kind)
    refuses(saved, r"peft_type is .*supported are LORA")


@pytest.mark.parametrize("name", ["r", "lora_alpha"])
def test_what_peft_would_guess_must_be_there(saved, name):
    edit_config(saved, **{name: "<drop>"})
    refuses(saved, f"lacks '{name}'")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("r", 0, "r must be a positive integer"),
        ("r", "2", "r must be a positive integer"),
        ("lora_alpha", "big", "lora_alpha must be a finite number"),
        ("bias", "some", "bias must be one of"),
        ("lora_dropout", 1.5, "lora_dropout must be a number"),
        ("rank_pattern", {"q_proj": -1}, "rank_pattern must be a mapping"),
        ("target_modules", "(", "target_modules"),
        ("target_modules", 5, "target_modules"),
        ("target_modules", ["q_proj"], "not targeted, or not in this model: 0.v_proj"),
        ("target_modules", ["q_proj", "v_proj", "1"], "without tensors: 1"),
    ],
)
def test_bad_values(saved, name, value, message):
    edit_config(saved, **{name: value})
    refuses(saved, message)


def test_code_in_a_config_is_never_looked_at(saved):
    edit_config(saved, auto_mapping={"base_model_class": "system", "parent_library": "os"})
    load_adapter(build(), saved)
    edit_config(saved, auto_map={"AutoConfig": "evil.Config"})
    refuses(saved, "auto_map")


A = "base_model.model.0.q_proj.lora_A.weight"
B = "base_model.model.0.q_proj.lora_B.weight"
TENSORS = {
    "missing B": (lambda t: {k: v for k, v in t.items() if k != B}, f"missing {B}"),
    "missing layer": (
        lambda t: {k: v for k, v in t.items() if "q_proj" not in k},
        "without tensors: 0.q_proj",
    ),
    "extra tensor": (
        lambda t: {**t, "base_model.model.0.extra": torch.zeros(1)},
        "unexpected base_model.model.0.extra",
    ),
    "extra layer": (
        lambda t: {**t, A.replace("q_proj", "nope"): t[A].clone(), B.replace("q_proj", "nope"): t[B].clone()},
        "not in this model: 0.nope",
    ),
    "magnitude": (
        lambda t: {**t, "base_model.model.0.q_proj.lora_magnitude_vector": torch.zeros(8)},
        "lora_magnitude_vector",
    ),
    "rank": (lambda t: {**t, A: torch.zeros(3, 8), B: torch.zeros(8, 3)}, f"{A} has rank 3 instead of 2"),
    "shape": (lambda t: {**t, A: torch.zeros(2, 9)}, r"has shape \[2, 9\], not \[2, 8\]"),
    "transposed": (lambda t: {**t, A: t[A].T.contiguous()}, r"has shape \[8, 2\]"),
    "no prefix": (lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()}, "0.q_proj"),
    "adapter name in keys": (lambda t: {k.replace(".weight", ".default.weight"): v for k, v in t.items()}, "without"),
    "nothing": (lambda t: {}, "without tensors"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_are_listed(saved, case):
    change, message = TENSORS[case]
    edit_tensors(saved, change)
    refuses(saved, message)
    refuses(saved, ".", peftkern.apply(build(), LoRAConfig(**OPTIONS)))


def test_many_problems_are_counted(saved):
    edit_tensors(saved, lambda t: {**t, **{f"more.{i}": torch.zeros(1) for i in range(20)}})
    refuses(saved, "and 14 more")


def test_an_adapted_model_must_scale_alike(saved):
    edit_config(saved, lora_alpha=8)
    refuses(saved, "lora_alpha 32 .*, the file 8", peftkern.apply(build(), LoRAConfig(**OPTIONS)))
    edit_config(saved, lora_alpha=32, use_rslora=True)
    refuses(saved, "use_rslora", peftkern.apply(build(), LoRAConfig(**OPTIONS)))
    refuses(saved, "rank 2 instead of 4|lora_alpha", peftkern.apply(build(), LoRAConfig(**{**OPTIONS, "r": 4})))


def test_files_that_are_not_there(tmp_path, saved):
    refuses(tmp_path / "none", "is not a directory")
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", "holds no adapter_config.json")
    (saved / "adapter_model.safetensors").unlink()
    refuses(saved, "No such file")
    torch.save({}, saved / "adapter_model.bin")
    refuses(saved, r"adapter_model.bin is a pickle.*convert it")


def test_several_adapters_in_one_directory(tmp_path):
    model = peftkern.apply(build(), LoRAConfig(**OPTIONS))
    for name in ("first", "second"):
        save_adapter(model, tmp_path / "both" / name)
    refuses(tmp_path / "both", r"several adapters \(first, second\)")
    load_adapter(build(), tmp_path / "both" / "first")


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\x00", "[" * 100000])
def test_a_damaged_config(saved, text):
    (saved / "adapter_config.json").write_text(text)
    refuses(saved, "is not JSON|must hold a JSON object")


def test_damaged_tensors(saved):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    refuses(saved, "not a whole safetensors file")


def test_damaged_metadata(saved):
    path = saved / "adapter_model.safetensors"
    save_file(load_safetensors(path), path, {"peftkern": "{"})
    refuses(saved, "damaged metadata")
    save_file(load_safetensors(path), path, {"peftkern": json.dumps({"method": "qlora", "blocksize": 63})})
    refuses(saved, "blocksize must be one of")


def test_models_without_an_adapter(tmp_path):
    for act in (lambda m: save_adapter(m, tmp_path), adapter_state_dict, lambda m: set_adapter_state_dict(m, {})):
        with pytest.raises(ValueError, match=r"has no adapter; call peftkern.apply"):
            act(build())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace"])
def test_a_full_disk_keeps_the_old_adapter(saved, monkeypatch, failing):
    before = {f.name: f.read_bytes() for f in saved.iterdir()}
    model = peftkern.apply(build(), LoRAConfig(**OPTIONS))

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(failing, full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(model, saved)
    monkeypatch.undo()
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == before


def test_a_file_where_the_directory_should_be(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(OSError, match="cannot save to"):
        save_adapter(peftkern.apply(build(), LoRAConfig(**OPTIONS)), tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_another_method_in_the_file(saved):
    model = peftkern.apply(build(), QLoRAConfig(**OPTIONS))
    load_adapter(model, saved)  # QLoRA and LoRA share the file format
    edit_config(saved, peft_type="PROMPT_TUNING")
    with pytest.raises(ValueError, match="adapted with 'qlora'"):
        load_adapter(model, saved)
