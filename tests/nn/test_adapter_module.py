import copy
import pickle

import pytest
import torch
from test_adapter import enlarge
from torch import nn

from peftkern.nn.adapter import Adapter

ACTIVATIONS = {
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "silu": nn.functional.silu,
}


class TestModule:
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("other_residual", [False, True])
    def test_formula(self, device, activation, other_residual):
        adapter = Adapter(12, 5, 0.5, activation, scaling=3.0, device=device).eval()
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.3)
        x, residual = torch.randn(2, 4, 12, device=device), torch.randn(2, 4, 12, device=device)
        wide = copy.deepcopy(adapter).double()
        h = ACTIVATIONS[activation](wide.down(x.double()))
        truth = (residual if other_residual else x).double() + 3 * wide.up(h)
        y = adapter(x, residual) if other_residual else adapter(x)
        torch.testing.assert_close(y, truth.float(), rtol=1e-5, atol=1e-5)

    def test_starts(self):
        x = torch.randn(16, 256)
        shift = {
            init: (Adapter(256, 32, 0, init_weights=init)(x) - x).std().item() for init in ("bert", "houlsby", "mam")
        }
        assert 0.01 < shift["bert"] < 0.1
        assert 0 < shift["houlsby"] < shift["bert"] / 2
        assert shift["mam"] == 0
        assert Adapter(256, 32, init_weights="mam").down.weight.abs().max() > 0.03
        houlsby = Adapter(256, 32, init_weights="houlsby")
        assert 0.019 < max(w.abs().max().item() for w in (houlsby.down.weight, houlsby.up.weight)) <= 0.02
        assert Adapter(256, 32).down.weight.std().item() == pytest.approx(0.02, rel=0.1)

    def test_dropout_only_while_training(self):
        adapter = enlarge(Adapter(32, 8, 0.5))
        x = torch.randn(4, 32)
        assert not torch.equal(adapter(x), adapter(x))
        adapter.eval()
        assert torch.equal(adapter(x), adapter(x))

    def test_disabled(self):
        adapter, x, residual = enlarge(Adapter(12, 5)), torch.randn(3, 12), torch.randn(3, 12)
        adapter.enabled = False
        assert adapter(x) is x
        assert adapter(x, residual) is residual

    @pytest.mark.parametrize("copies", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
    def test_copies_and_state_dict(self, copies):
        adapter = enlarge(Adapter(12, 5)).eval()
        other, x = copies(adapter), torch.randn(3, 12)
        assert torch.equal(other(x), adapter(x))
        third = Adapter(12, 5).eval()
        third.load_state_dict(adapter.state_dict())
        assert torch.equal(third(x), adapter(x))
        assert set(adapter.state_dict()) == {"down.weight", "down.bias", "up.weight", "up.bias"}

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"adapter_size": 0}, "adapter_size must be a positive integer, got 0"),
            ({"hidden_size": 1.5}, "hidden_size must be a positive integer, got 1.5"),
            ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
            ({"hidden_act": "tanh"}, "hidden_act must be one of gelu, .*, got 'tanh'"),
            ({"init_weights": "zero"}, "init_weights must be one of bert, mam, houlsby, got 'zero'"),
            ({"scaling": float("nan")}, "scaling must be finite, got nan"),
        ],
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=f"Adapter: {message}"):
            Adapter(**{"hidden_size": 8, **arguments})
