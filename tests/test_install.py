"""Installing where there is no compiler: the package comes without kernels, works, and says so."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NEEDS = ("pip", "setuptools", "wheel", "typer", "rich")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what the build reads, without what an earlier build left."""
    copy = tmp_path / "source"
    for name in ("peftkern", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def run(arguments: list[str], directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("CXX", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=directory, env={**kept, **environment}, capture_output=True, text=True
    )


def test_without_a_compiler(source: Path, tmp_path: Path) -> None:
    # Not imported here: setuptools replaces distutils when it is.
    if missing := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    target, nothing = tmp_path / "target", tmp_path / "nothing"
    nothing.mkdir()
    pip = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
    done = run([*pip, "-v", "--target", str(target), str(source)], tmp_path, PATH=str(nothing))
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler: installing without compiled kernels" in done.stdout + done.stderr
    assert not list(target.rglob("*.so"))

    done = run(["-m", "peftkern", "doctor", "--json", "--no-self-test"], tmp_path, PYTHONPATH=str(target))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert "was not built" in report["kernels_error"]
    owners = {owner for op in report["backends"].values() for owner in op.values()}
    assert owners <= {"composed", "reference", "triton"}
    compiled_alone = {"adamw8bit_code_tables", "adamw8bit_step_table_", "adamw8bit_found_inf_table_"}
    compiled_alone |= {"lora_group_fwd", "lora_group_bwd"}
    assert {name for name, op in report["backends"].items() if set(op) != {"CPU", "CUDA"}} == compiled_alone

    code = (
        "import peftkern, torch; layer = peftkern.QLoRALinear(torch.nn.Linear(64, 32), rank=4); "
        "layer(torch.randn(3, 64)).sum().backward(); print(peftkern.__file__, layer.lora_B.grad.abs().sum().item() > 0)"
    )
    done = run(["-c", code], tmp_path, PYTHONPATH=str(target))
    assert done.stdout.split() == [str(target / "peftkern" / "__init__.py"), "True"], done.stderr


def test_missing_build_tools_are_one_line(source: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("setuptools") is None or not (shutil.which("g++") or shutil.which("c++")):
        pytest.skip("needs setuptools and a compiler")
    hide = (
        "import importlib.util as u, runpy, sys; find = u.find_spec; "
        "u.find_spec = lambda name, *rest: None if name in ('ninja', 'pybind11') else find(name, *rest); "
        "sys.argv = ['setup.py', '--quiet', 'build_ext', '--inplace']; runpy.run_path('setup.py', run_name='__main__')"
    )
    done = run(["-c", hide], source)
    assert done.returncode != 0
    assert done.stderr.strip() == "peftkern: the build needs ninja and pybind11; pip install ninja pybind11"
