"""What the pages tell a reader to run does run, verbatim; what they point to is there."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn

import peftkern
from peftkern.cli import main
from peftkern.testing.tiny_model import make_base, make_texts

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    page
    for folder in (".", "benchmarks", "examples/*", "peftkern/ops/*", "peftkern/optim")
    for page in ROOT.glob(f"{folder}/*.md" if folder != "." else "*.md")
)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


SNIPPETS = [(page, number) for page in PAGES for number in range(len(blocks(page, "python")))]


def surroundings() -> dict[str, Any]:
    """The names that the README's lists of modules and ops take from their reader."""
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    return {
        "nn": nn,
        "weight": weight,
        "weight_or_q": weight,
        "x": torch.randn(3, 128),
        "bias": torch.randn(64),
        "lora_A": torch.randn(8, 128, requires_grad=True),
        "lora_B": torch.randn(64, 8, requires_grad=True),
        "scaling": 2.0,
        **dict.fromkeys(("key", "value", "gate", "up"), peftkern.LoRAProjection(weight)),
        "down": peftkern.LoRAProjection(weight.T),
    }


@pytest.mark.parametrize(("page", "number"), SNIPPETS, ids=[f"{p.relative_to(ROOT)}-{n}" for p, n in SNIPPETS])
def test_python_snippets_run(page: Path, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    code = blocks(page, "python")[number]
    names = surroundings()
    exec(compile(f"import peftkern\n{code}", f"{page.name}:{number}", "exec"), names)
    if "save_adapter" in code:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained("examples/tiny-python-llama", dtype="float32")
        assert PeftModel.from_pretrained(base, "adapter").peft_config["default"].r == 16


def test_the_readmes_verbs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("typer", "transformers", "peft", "datasets", "matplotlib"):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    make_base(Path("base"))
    make_texts(Path("train.jsonl"), 12)
    small = {
        "finetune": ["--max-steps=2", "--max-length=32", "--sample-tokens=2"],
        "compare": ["--max-steps=2", "--max-length=32", "--methods=lora"],
        "merge": [],
        "doctor": ["--no-self-test"],
    }
    text = "\n".join(blocks(ROOT / "README.md", "bash"))
    commands = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("peftkern ")]
    assert {verb for _, verb, *_ in commands} == set(small)
    for _, verb, *arguments in commands:
        arguments = ["base" if argument == "DIR_OR_HUB_ID" else argument for argument in arguments]
        extra = [] if "--resume" in arguments else small[verb]
        assert main([verb, *arguments, *extra]) == 0, (verb, arguments)
    assert Path("merged/model.safetensors").is_file()


def test_the_readmes_make_targets_exist() -> None:
    text = "\n".join(
        block for page in PAGES for block in (*blocks(page, "bash"), *re.findall("`(make .*?)`", page.read_text()))
    )
    targets = set(re.findall(r"^make (\w+)", text, re.MULTILINE))
    assert targets >= {"finetune", "test"}
    phony = re.search(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert targets <= set(phony[1].split())


def test_ci_calls_the_same_targets() -> None:
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert set(re.findall(r"run: (.*)", workflow)) == {"make test", "make test-oldest", "make finetune"}
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("make test")


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def test_the_configs_on_show_name_what_is_there() -> None:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("no git")
    listed = subprocess.run([git, "ls-files", "examples"], cwd=ROOT, capture_output=True, text=True, check=True)
    for config in ("finetune", "compare"):
        values = (ROOT / f"examples/{config}.yaml").read_text()
        for path in re.findall(r"^(?:model|data|eval_data): (\S+)", values, re.MULTILINE):
            assert any(name == path or name.startswith(f"{path}/") for name in listed.stdout.splitlines()), path
