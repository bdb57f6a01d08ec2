"""Every method trains the same under torch.compile as in eager: one graph, the same loss and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import peftkern

pytest.importorskip("transformers")
from tiny_models import batch, tiny

CONFIGS = {
    "lora": peftkern.LoRAConfig(r=4),
    "qlora": peftkern.QLoRAConfig(r=4),
    "adapter": peftkern.AdapterConfig(adapter_dim=4, adapter_dropout=0.0),
    "prompt": peftkern.PromptTuningConfig(num_tokens=4),
    "ptuning_v2": peftkern.PTuningV2Config(num_tokens=4),
    "ptuning_v2 projected": peftkern.PTuningV2Config(num_tokens=4, projection=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_eagers(name: str, device: torch.device) -> None:
    torch._dynamo.reset()
    model: Any = peftkern.apply(tiny("llama"), CONFIGS[name]).to(device).train()
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.02)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inputs = batch(device)

    def step(forward: Any) -> list[torch.Tensor]:
        model.zero_grad()
        loss = forward(**inputs, use_cache=False).loss
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in trained)]

    eager = step(model)
    compiled = step(torch.compile(model, backend="aot_eager", fullgraph=True))
    for one, other in zip(eager, compiled, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4 * float(one.abs().max()))
