"""Learning rates by method and size, methods' configs, and the warnings for classic mistakes."""

from __future__ import annotations

import pytest

from peftkern.nn.config import LoRAConfig, QLoRAConfig
from peftkern.training.defaults import default_learning_rate, method_config, warnings_for
from peftkern.training.settings import METHODS, FinetuneSettings

SIZES = (5e6, 5e8, 3e9, 7e9, 13e9, 70e9)


def test_lora_follows_the_guides() -> None:
    rates = {size: default_learning_rate("lora", int(size)) for size in SIZES}
    assert rates[5e8] == 1e-3
    assert rates[7e9] == rates[13e9] == 1e-4
    assert rates[70e9] == 5e-5
    assert all(default_learning_rate("qlora", int(size)) == rate for size, rate in rates.items())


@pytest.mark.parametrize("method", METHODS)
def test_rates_fall_with_size(method: str) -> None:
    rates = [default_learning_rate(method, int(size)) for size in SIZES]
    assert rates == sorted(rates, reverse=True)


def test_configs() -> None:
    settings = FinetuneSettings(rank=8, num_tokens=5, adapter_dim=32, target_modules=["q_proj", "v_proj"])
    lora = method_config("lora", settings, {"use_rslora": True})
    assert isinstance(lora, LoRAConfig)
    assert (lora.r, lora.lora_alpha, lora.use_rslora, lora.target_modules) == (8, 16, True, ["q_proj", "v_proj"])
    qlora = method_config("qlora", FinetuneSettings(lora_alpha=4.0, target_modules=["minimal"]))
    assert isinstance(qlora, QLoRAConfig)
    assert (qlora.lora_alpha, qlora.target_modules) == (4.0, "minimal")
    for targets, expected in (
        (None, "all-linear"),
        (["recommended"], "recommended"),
        (["up_proj"], ["up_proj"]),
        ([r".*\.q_proj"], r".*\.q_proj"),
    ):
        assert method_config("lora", FinetuneSettings(target_modules=targets)).target_modules == expected
    assert method_config("adapter", settings).adapter_dim == 32
    assert method_config("adapter", FinetuneSettings()).target_modules == ["attention", "mlp"]
    assert method_config("prompt", settings).num_tokens == method_config("ptuning_v2", settings).num_tokens == 5
    assert method_config("full", settings) is None
    with pytest.raises(ValueError, match="--method-options a: full fine-tuning has none"):
        method_config("full", settings, {"a": 1})


def warn(method: str = "lora", rank: int = 16, rate: float = 1e-4, warmup: float = 0.03, **names: list[str]) -> str:
    config = LoRAConfig(r=rank) if method == "lora" else None
    attention = names.get("attention", ["q_proj"])
    return "\n".join(warnings_for(method, config, rate, 7 * 10**9, warmup, names.get("targets", ["q_proj"]), attention))


def test_no_warning_for_the_usual() -> None:
    assert warn() == ""
    assert warn("full", rate=2e-5) == ""
    assert warn("prompt", rate=3e-2) == ""
    assert warn(rank=8) == ""
    assert warn(attention=[]) == ""


def test_each_classic_mistake() -> None:
    assert "rank 4 is low" in warn(rank=4)
    assert "no attention projection" in warn(targets=["up_proj"])
    assert "one for full fine-tuning" in warn(rate=2e-5)
    assert "high for full fine-tuning" in warn("full", rate=1e-3)
    assert "no warm-up" in warn(warmup=0.0)
