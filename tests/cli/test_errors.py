"""Bad input at the terminal: one line that names the cure, exit code 2, nothing half-written and nothing lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peftkern.cli import main


@pytest.fixture
def fails(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Runs the command line, expects a user error, and returns its one line."""

    def run(*arguments: str, code: int = 2) -> str:
        assert main([str(a) for a in arguments]) == code
        error = capsys.readouterr().err.strip()
        assert "\n" not in error, error
        assert error.startswith("peftkern: error: ")
        return error

    return run


@pytest.fixture
def finetune(base: Path, texts: tuple[Path, Path], tmp_path: Path) -> Callable[..., list]:
    """Arguments of a run that would work, with some replaced."""

    def arguments(**flags: object) -> list:
        values = {
            "model": base,
            "data": texts[0],
            "eval_data": texts[1],
            "output": tmp_path / "out",
            "max_length": 32,
            "max_steps": 2,
            "sample_tokens": 0,
            **flags,
        }
        return ["finetune", *(f"--{key.replace('_', '-')}={value}" for key, value in values.items() if value)]

    return arguments


def test_unknown_flags_verbs_and_values(fails: Callable[..., str]) -> None:
    assert "--method" in fails("finetune", "--methd", "lora")
    assert "finetune" in fails("finetun")
    assert "--rank" in fails("finetune", "--rank", "many")
    assert "one of full, lora" in fails("finetune", "--method", "dora")
    assert "--model is missing" in fails("finetune", "--data", "x.jsonl")
    assert "takes NAME=VALUE" in fails("finetune", "--method-options", "x")
    assert "--adapter" in fails("merge")


def test_models_that_cannot_be_loaded(
    fails: Callable[..., str], finetune: Callable, base: Path, tmp_path: Path
) -> None:
    missing = tmp_path / "none"
    assert f"{missing} does not exist" in fails(*finetune(model=missing))

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no config.json; give the directory" in fails(*finetune(model=empty))
    (empty / "adapter_config.json").write_text("{}")
    assert "it is an adapter: give its base model" in fails(*finetune(model=empty))

    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors is corrupt or cut short" in fails(*finetune(model=broken))

    weights.unlink()
    assert "has no .safetensors weights" in fails(*finetune(model=broken))
    torch.save({}, broken / "pytorch_model.bin")
    line = fails(*finetune(model=broken))
    assert "only pickled weights (pytorch_model.bin)" in line
    assert "convert" in line

    (base / "config.json").read_text()
    strange = tmp_path / "strange"
    shutil.copytree(base, strange)
    (strange / "config.json").write_text('{"model_type": "no-such-architecture"}')
    assert "cannot load" in fails(*finetune(model=strange))
    assert not (tmp_path / "out" / "settings.json").exists()


def test_hub_name_without_network(
    fails: Callable[..., str], finetune: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants
    import transformers.utils.hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(transformers.utils.hub, "is_offline_mode", lambda: True)
    assert "cannot load a tokenizer from nobody/nothing" in fails(*finetune(model="nobody/nothing"))


def test_tokenizer_of_another_model(fails: Callable[..., str], finetune: Callable, base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    for index in range(100):
        tokenizer["model"]["vocab"][f"word{index}"] = len(tokenizer["model"]["vocab"])
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "has 118 tokens but the model embeds only 32" in fails(*finetune(model=other))


def test_data_that_cannot_be_used(fails: Callable[..., str], finetune: Callable, tmp_path: Path) -> None:
    assert "does not exist" in fails(*finetune(data=tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    assert "is empty" in fails(*finetune(data=tmp_path / "empty.jsonl"))
    assert "['topic', 'text']" in fails(*finetune(text_field="txt"))


def test_targets_that_match_nothing(fails: Callable[..., str], finetune: Callable) -> None:
    line = fails(*finetune(target_modules="q_prj"))
    assert "q_prj" in line
    assert "q_proj" in line


def test_output_directories(
    fails: Callable[..., str], finetune: Callable, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious.txt").write_text("keep me")
    assert "is not empty; add --resume or --overwrite" in fails(*finetune(output=full))
    assert [p.name for p in full.iterdir()] == ["precious.txt"]
    assert "is a file" in fails(*finetune(output=full / "precious.txt"))
    assert "cannot be written: Not a directory" in fails(*finetune(output=full / "precious.txt" / "out"))

    assert "is the base model itself" in fails(*finetune(output=base), "--overwrite")
    (full / "config.json").write_text("{}")
    assert "holds config.json of other results" in fails(*finetune(output=full), "--overwrite")
    (full / "config.json").rename(full / "adapter_config.json")
    assert "holds adapter_config.json of other" in fails(*finetune(output=full, method="full"), "--overwrite")

    def read_only(*args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", read_only)
    assert "cannot be written: Read-only file system" in fails(*finetune(output=tmp_path / "out"))


def test_disk_full_while_saving_keeps_the_earlier_adapter(
    fails: Callable[..., str], finetune: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert main([str(a) for a in finetune(save_steps=0)]) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.name.startswith("adapter")}
    assert len(before) == 2

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peftkern.formats.atomic.save_file", full)
    line = fails(*finetune(), "--overwrite", "--learning-rate=1e-2", "--no-gradient-checkpointing")
    assert "No space left on device" in line
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.name.startswith("adapter")} == before
    assert not [p for p in out.rglob("*") if p.name.endswith(".tmp")]


def test_debug_shows_the_traceback(finetune: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([*map(str, finetune(model=tmp_path / "none")), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_shows_its_traceback_and_exits_1(
    finetune: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def bug(*args: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr("peftkern.training.run._corpus", bug)
    assert main([*map(str, finetune())]) == 1
    assert "Traceback" in capsys.readouterr().err
