"""State files: whatever a checkpoint holds comes back with equal types and bits, and nothing else is accepted."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from peftkern.training.errors import UserError
from peftkern.training.state_file import load_state, save_state


def test_nested_state_round_trip(tmp_path: Path) -> None:
    state = {
        0: {"step": torch.tensor(3.0), "codes": torch.arange(5, dtype=torch.uint8), "half": torch.ones(2).bfloat16()},
        "groups": [{"lr": 1e-3 / 3, "betas": (0.9, 0.999), "params": [0, 1], "none": None, "flag": True}],
        "empty": [{}, (), torch.empty(0)],
        "inf": float("inf"),
        "numpy": np.float32(0.5),
    }
    save_state(state, tmp_path / "s.safetensors")
    back = load_state(tmp_path / "s.safetensors")
    assert list(back) == list(state)
    assert back["groups"] == state["groups"]
    assert isinstance(back["groups"][0]["betas"], tuple)
    assert back["inf"] == float("inf")
    assert back["numpy"] == 0.5
    assert back["empty"][:2] == [{}, ()]
    for name, tensor in state[0].items():
        assert back[0][name].dtype == tensor.dtype
        assert torch.equal(back[0][name], tensor)


def test_views_of_one_storage(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    save_state([whole[:3], whole[3:], whole], tmp_path / "s.safetensors")
    assert [t.tolist() for t in load_state(tmp_path / "s.safetensors")] == [[0, 1, 2], [3, 4, 5], [0, 1, 2, 3, 4, 5]]


def test_random_generators_go_on_where_they_were(tmp_path: Path) -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    random.gauss(0, 1)  # leaves a spare value in the state
    np.random.randn()
    save_state((random.getstate(), np.random.get_state(), torch.get_rng_state()), tmp_path / "s.safetensors")
    expected = random.gauss(0, 1), np.random.randn(), torch.randn(1).item()
    a, b, c = load_state(tmp_path / "s.safetensors")
    random.setstate(a)
    np.random.set_state(b)
    torch.set_rng_state(c)
    assert (random.gauss(0, 1), np.random.randn(), torch.randn(1).item()) == expected


def test_what_needs_pickle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"cannot store a .*Path"):
        save_state({"a": Path()}, tmp_path / "s.safetensors")
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(UserError, match="no state file of peftkern"):
        load_state(tmp_path / "plain.safetensors")
    torch.save({"a": 1}, tmp_path / "pickle.safetensors")
    with pytest.raises(ValueError, match="is a pickle"):
        load_state(tmp_path / "pickle.safetensors")
    save_file({"0": torch.ones(1)}, tmp_path / "bad.safetensors", metadata={"peftkern_state": '{"tensor": "7"}'})
    with pytest.raises(UserError, match="is damaged"):
        load_state(tmp_path / "bad.safetensors")
