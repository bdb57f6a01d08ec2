"""Settings: YAML under flags, unknown keys with near misses, types, and values that cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftkern.training.errors import UserError
from peftkern.training.settings import CompareSettings, FinetuneSettings, build, gather, parse_mapping


def yaml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    config = yaml(
        tmp_path,
        "model: base\ndata: d.jsonl\nmethod: qlora\nlearning-rate: 1e-3\nrank: 8\nepochs: 2\n"
        "target_modules: all-linear\n"
        "method_options: {use_rslora: true, blocksize: 128}\nprompt: null\n",
    )
    given = {"rank": 32, "method": None, "target_modules": [], "method_options": {"blocksize": 64}}
    settings = build(FinetuneSettings, gather(FinetuneSettings, config, given))
    assert settings.rank == 32
    assert settings.method == "qlora"
    assert settings.learning_rate == 1e-3  # YAML 1.1 calls 1e-3 a string
    assert settings.epochs == 2.0
    assert settings.target_modules == ["all-linear"]
    assert settings.method_options == {"use_rslora": True, "blocksize": 64}
    assert settings.batch_size == FinetuneSettings().batch_size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1\n", r"unknown key 'learning_rat'; did you mean learning_rate"),
        ("zzz: 1\n", r"unknown key 'zzz'; the keys are adapter_dim, "),
        ("rank: many\n", "rank must be a whole number, got 'many'"),
        ("rank: 1.5\n", "rank must be a whole number, got 1.5"),
        ("rank: true\n", "rank must be a whole number, got True"),
        ("overwrite: 1\n", "overwrite must be true or false, got 1"),
        ("model: [a]\n", "model must be a text"),
        ("target_modules: {a: 1}\n", "target_modules must be a list of names"),
        ("method_options: 3\n", "method_options must be a mapping"),
        ("method: dora\n", r"--method must be one of full, lora, .* got 'dora'"),
        ("- a\n", "must hold a mapping"),
        ("a: [\n", "is not YAML"),
    ],
)
def test_bad_yaml(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        gather(FinetuneSettings, yaml(tmp_path, text), {})
    assert "\n" not in str(caught.value)


def test_missing_yaml(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read --config .*: No such file"):
        gather(FinetuneSettings, str(tmp_path / "none.yaml"), {})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model", None, "--model is missing"),
        ("data", "", "--data is missing"),
        ("rank", 0, "--rank must be at least 1, got 0"),
        ("max_length", 1, "--max-length must be at least 2"),
        ("batch_size", -1, "--batch-size must be at least 1"),
        ("epochs", 0.0, "--epochs must be positive"),
        ("max_steps", 0, "--max-steps must be at least 1"),
        ("warmup_ratio", 1.0, r"--warmup-ratio must be in \[0, 1\)"),
        ("eval_fraction", 1.0, "--eval-fraction must be between 0 and 1"),
        ("learning_rate", 0.0, "--learning-rate must be positive"),
        ("learning_rate", float("nan"), "--learning-rate must be positive"),
        ("weight_decay", -0.1, "--weight-decay must be 0 or more"),
        ("lora_dropout", 1.0, r"--lora-dropout must be in \[0, 1\)"),
    ],
)
def test_impossible_values(name: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(FinetuneSettings, {"model": "m", "data": "d", name: value})


def test_resume_and_overwrite_exclude_each_other() -> None:
    with pytest.raises(UserError, match="exclude each other"):
        build(FinetuneSettings, {"model": "m", "data": "d", "resume": True, "overwrite": True})


def test_mappings_on_the_command_line() -> None:
    assert parse_mapping(["use-rslora=true", "init_text=a b", "x=1e-3"], "method_options") == {
        "use_rslora": True,
        "init_text": "a b",
        "x": 1e-3,
    }
    with pytest.raises(UserError, match="--method-options takes NAME=VALUE, got 'x'"):
        parse_mapping(["x"], "method_options")


@pytest.mark.parametrize("rates", [{"dora": 1e-3}, {"lora": 0.0}, {"lora": "fast"}])
def test_compare_refuses_bad_learning_rates(rates: dict) -> None:
    with pytest.raises(UserError, match="--learning-rates"):
        build(CompareSettings, {"model": "m", "data": "d", "learning_rates": rates})
