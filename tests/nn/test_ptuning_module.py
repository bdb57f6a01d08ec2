import pytest
import torch
from test_ptuning import prefixed
from tiny_models import batch

from peftkern.nn.ptuning import PTuningV2


class TestModule:
    @pytest.mark.parametrize("projection", [False, True])
    def test_shapes_and_layout(self, device, projection):
        module = PTuningV2(3, 5, 2, 4, projection, 16, device=device)
        flat = module.peftkern_state()["prompt_embeddings"]
        assert flat.shape == (5, 3 * 2 * 2 * 4)
        pieces = flat.view(5, 3, 2, 2, 4).permute(1, 2, 3, 0, 4)  # layer, [K, V], head, token, element
        for layer, (keys, values) in enumerate(module(batch_size=6)):
            assert keys.shape == values.shape == (6, 2, 5, 4)
            assert torch.equal(keys[3], pieces[layer, 0])
            assert torch.equal(values[3], pieces[layer, 1])

    def test_starts_small(self):
        prefix = PTuningV2(2, 50, 4, 32).peftkern_state()["prompt_embeddings"]
        assert prefix.std().item() == pytest.approx(0.02, rel=0.05)
        projected = PTuningV2(2, 50, 4, 32, projection=True).peftkern_state()["prompt_embeddings"]
        assert 0.01 < projected.std().item() < 0.5

    def test_dropout_only_while_training(self):
        module = PTuningV2(1, 200, 2, 8, dropout=0.25)
        dropped = (module.layer_prefix(0, 2)[0] == 0).float().mean().item()
        assert dropped == pytest.approx(0.25, abs=0.04)
        first, second = module.layer_prefix(0, 2)[1]
        assert not torch.equal(first, second)  # each text has a mask of its own
        assert not (module.eval().layer_prefix(0)[0] == 0).any()
        assert torch.count_nonzero(module.train().peftkern_state()["prompt_embeddings"]) == 200 * 32

    @pytest.mark.parametrize(
        ("argument", "value"),
        [("num_layers", 0), ("num_tokens", -1), ("num_kv_heads", 0), ("head_dim", 2.0), ("projection_hidden_size", 0)],
    )
    def test_bad_sizes(self, argument, value):
        sizes = {"num_layers": 1, "num_tokens": 1, "num_kv_heads": 1, "head_dim": 1, argument: value}
        with pytest.raises(ValueError, match=f"PTuningV2: {argument} must be a positive integer, got {value}"):
            PTuningV2(**sizes)

    def test_bad_dropout(self):
        with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
            PTuningV2(1, 1, 1, 1, dropout=1)


class TestState:
    @pytest.mark.parametrize("projection", [False, True])
    def test_round_trip(self, projection):
        module, other = PTuningV2(3, 5, 2, 4, projection, 16), PTuningV2(3, 5, 2, 4, projection, 16)
        other.load_peftkern_state(module.peftkern_state())
        for key, value in module.state_dict().items():
            assert torch.equal(other.state_dict()[key], value), key
        for ours, theirs in zip(module(), other()):
            assert torch.equal(ours[0], theirs[0])

    def test_encoder_has_pefts_names_and_values(self):
        peft = pytest.importorskip("peft")
        config = peft.PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=5, token_dim=8, num_layers=3, num_attention_heads=2,
            prefix_projection=True, encoder_hidden_size=16,
        )  # fmt: skip
        encoder = peft.PrefixEncoder(config)
        module = PTuningV2(3, 5, 2, 4, True, 16)
        state = module.peftkern_state()
        encoder.load_state_dict({k.removeprefix("prefix_encoder."): v for k, v in state.items() if "encoder" in k})
        torch.testing.assert_close(encoder(torch.arange(5)), state["prompt_embeddings"])

    def test_prefix_without_encoder_drops_the_projection(self):
        source, module = PTuningV2(3, 5, 2, 4), PTuningV2(3, 5, 2, 4, True, 16)
        with pytest.warns(UserWarning, match="going on with its prefix alone"):
            module.load_peftkern_state(source.peftkern_state())
        assert torch.equal(module(2)[2][1], source(2)[2][1])
        assert all(parameter.requires_grad for parameter in module.parameters())
        assert set(module.state_dict()) == set(source.state_dict())

    def test_flatten_keeps_the_prefix(self):
        model, inputs = prefixed(projection=True), batch()
        expected = model(**inputs).logits
        model.ptuning_v2.flatten_()
        torch.testing.assert_close(model(**inputs).logits, expected)

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ({}, "prompt_embeddings is missing"),
            ({"prompt_embeddings": torch.zeros(5, 47)}, r"prompt_embeddings must be \(5, 48\), got \(5, 47\)"),
            ({"prompt_embeddings": torch.zeros(5, 48), "x": torch.zeros(1)}, "x has no place here"),
        ],
    )
    def test_bad_state(self, state, message):
        module = PTuningV2(3, 5, 2, 4)
        before = module.peftkern_state()["prompt_embeddings"].clone()
        with pytest.raises(ValueError, match=message):
            module.load_peftkern_state(state)
        assert torch.equal(module.peftkern_state()["prompt_embeddings"], before)
