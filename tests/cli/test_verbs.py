"""The verbs from the terminal's side: help, config files, exit codes, files left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peftkern.cli import doctor, main


def test_help_lists_verbs_and_flags_without_heavy_imports() -> None:
    code = (
        "import sys; from peftkern.cli import main; main(['finetune', '--help'])\n"
        "heavy = {'transformers', 'datasets', 'matplotlib', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for flag in ("--config", "--model", "--gradient-checkpointing", "--resume"):
        assert flag in done.stdout


def test_finetune_from_a_config_file(
    base: Path, texts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = tmp_path / "config.yaml"
    out = tmp_path / "out"
    config.write_text(
        f"model: {base}\ndata: {texts[0]}\noutput: {out}\nmax-length: 32\nmax_steps: 50\nmethod: full\n"
        "sample_tokens: 0\nlearning_rate: 1e-3\n"
    )
    assert main(["finetune", "--config", str(config), "--method", "lora", "--max-steps", "3", "--rank", "8"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert (report["method"], report["steps"], report["learning_rate"]) == ("lora", 3, 1e-3)
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 8
    assert "trainable params: " in capsys.readouterr().out

    assert main(["finetune", "--resume", "--output", str(out), "--rank", "4"]) == 2
    assert "had --rank 8, not 4" in capsys.readouterr().err
    assert main(["finetune", "--resume", "--output", str(out)]) == 0


def test_example_configs_are_valid() -> None:
    from peftkern.training.settings import CompareSettings, FinetuneSettings, build, gather

    examples = Path(__file__).parents[2] / "examples"
    assert build(FinetuneSettings, gather(FinetuneSettings, str(examples / "finetune.yaml"), {})).method == "qlora"
    assert build(CompareSettings, gather(CompareSettings, str(examples / "compare.yaml"), {})).learning_rates == {}


def test_ctrl_c_exits_130_with_a_usable_checkpoint(base: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "peftkern", "finetune", f"--model={base}", f"--data={texts[0]}"]
    command += [f"--output={out}", "--max-length=32", "--max-steps=100000", "--sample-tokens=0", "--logging-steps=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip().startswith("step"):
            process.send_signal(signal.SIGINT)
            break
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "go on with: peftkern finetune --resume --output" in error
    (checkpoint,) = out.glob("checkpoint-*")
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert not (out / "report.json").exists()


def test_merge(base: Path, texts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from transformers import AutoModelForCausalLM

    from peftkern.formats.adapter import load_adapter

    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    common = [f"--data={texts[0]}", "--max-length=32", "--max-steps=8", "--sample-tokens=0", "--learning-rate=1e-2"]
    assert main(["finetune", f"--model={base}", f"--output={adapter}", "--method=qlora", *common]) == 0
    assert main(["merge", f"--adapter={adapter}", f"--output={merged}"]) == 0
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter).eval()(ids).logits
        got = AutoModelForCausalLM.from_pretrained(merged).eval()(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base).eval()(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (got - plain).abs().max() > 0.1
    assert (merged / "tokenizer.json").is_file()

    half = tmp_path / "half"
    assert main(["merge", f"--adapter={adapter}", f"--model={base}", f"--output={half}", "--dtype=bfloat16"]) == 0
    assert AutoModelForCausalLM.from_pretrained(half).dtype == torch.bfloat16

    capsys.readouterr()
    assert main(["merge", f"--adapter={adapter}", f"--output={merged}"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["merge", f"--adapter={base}", f"--output={tmp_path / 'x'}"]) == 2
    assert "no readable adapter_config.json" in capsys.readouterr().err
    assert main(["merge", f"--adapter={adapter}", f"--output={tmp_path / 'x'}", "--dtype=int8"]) == 2
    assert "--dtype must be one of" in capsys.readouterr().err


def test_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from peftkern.ops import backends
    from peftkern.testing import checks

    real = {"fine": lambda spec, device: [], "broken": lambda spec, device: ["adamw8bit_step [x]: off by 1"]}
    monkeypatch.setattr(checks, "failures", real["fine"])
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["backends"] == backends()
    assert report["versions"]["torch"] == torch.__version__
    assert {test["op"] for test in report["self_test"]} >= {"nf4_dequantize", "lora_matmul"}
    assert report["devices"][0]["type"] == "cpu"

    monkeypatch.setattr(checks, "failures", real["broken"])
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "FAILED (1)" in text
    assert "off by 1" in text


def test_doctor_runs_the_real_self_test() -> None:
    report = doctor.diagnose()
    assert [line for test in report["self_test"] for line in test["failures"]] == []


def test_doctor_says_why_kernels_are_absent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("peftkern.ops._library.kernels_error", "_kernels.abi3.so was not built")
    assert main(["doctor", "--no-self-test"]) == 0
    assert "none compiled: _kernels.abi3.so was not built" in capsys.readouterr().out
