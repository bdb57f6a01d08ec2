import copy
import pickle

import pytest
import torch
from tiny_models import COMMON, batch, checkpointed, gradients, greedy, tiny
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrappers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    StaticCache,
    Trainer,
    TrainingArguments,
    modeling_layers,
)

from peftkern.nn import PTuningV2Config
from peftkern.nn.ptuning import apply_ptuning_v2

P = 5


def prefixed(kind="llama", projection=False, dropout=0.0, **kwargs):
    """A model with a prefix large enough to matter, as a trained one is."""
    model = tiny(kind, **kwargs)
    config = PTuningV2Config(num_tokens=P, projection=projection, projection_dim=12, dropout=dropout)
    apply_ptuning_v2(model, config)
    with torch.no_grad():
        for name, parameter in model.ptuning_v2.named_parameters():
            parameter.normal_(std=0.5 if "output" in name or "prefix" in name else 1.0)
    return model


def stock_peft(model, kind="llama", **kwargs):
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    stock = peft.get_peft_model(tiny(kind, **kwargs), config).eval()
    prefix = model.ptuning_v2.peftkern_state()["prompt_embeddings"]
    stock.prompt_encoder["default"].embedding.weight.data.copy_(prefix)
    return stock


class TestAgainstPeft:
    # Gemma 2's window of 8 is shorter than prefix and text: the prefix falls out of it, as in PEFT.
    @pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma2", "gpt_neox", "opt", "bloom"])
    def test_same_logits_loss_and_gradient(self, kind):
        model = prefixed(kind)
        stock, inputs = stock_peft(model, kind), batch()
        ours, theirs = model(**inputs), stock(**inputs)
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(ours.logits[real], theirs.logits[real])
        torch.testing.assert_close(ours.loss, theirs.loss)
        assert (ours.logits - tiny(kind)(**inputs).logits).abs().max() > 0.01
        ours.loss.backward()
        theirs.loss.backward()
        grad = torch.cat([prefix.grad for prefix in model.ptuning_v2.prefix], dim=1)
        theirs_grad = stock.prompt_encoder["default"].embedding.weight.grad
        assert theirs_grad.abs().max() > 1e-5
        torch.testing.assert_close(grad, theirs_grad)

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_attention_implementations(self, attention):
        model = prefixed(attn_implementation=attention)
        assert model.config._attn_implementation == attention
        stock, inputs = stock_peft(model), batch()
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(model(**inputs).logits[real], stock(**inputs).logits[real])
        unmasked = model(inputs["input_ids"]).logits
        torch.testing.assert_close(unmasked, stock(input_ids=inputs["input_ids"]).logits)

    @pytest.mark.parametrize("beams", [1, 3])
    def test_same_generation(self, beams):
        model, ids = prefixed(), batch()["input_ids"]
        arguments = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
        theirs = stock_peft(model).generate(input_ids=ids, attention_mask=torch.ones_like(ids), **arguments)
        ours = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
        assert torch.equal(ours, theirs)
        assert not torch.equal(tiny("llama").generate(ids, **arguments), theirs)


class TestForward:
    def test_devices_and_dtypes(self, device):
        model = prefixed(projection=True).to(device)
        reference = model(**batch(device))
        half = copy.deepcopy(model).to(torch.bfloat16)(**batch(device))
        assert half.logits.dtype == torch.bfloat16
        torch.testing.assert_close(half.loss.float(), reference.loss, rtol=0.05, atol=0)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            mixed = model(**batch(device))
        torch.testing.assert_close(mixed.loss.float(), reference.loss, rtol=0.05, atol=0)
        mixed.loss.backward()
        assert all(parameter.grad.dtype == torch.float32 for parameter in model.ptuning_v2.parameters())

    def test_disabled_is_the_base(self):
        model, inputs = prefixed(), batch()
        model.ptuning_v2.enabled = False
        assert torch.equal(model(**inputs).logits, tiny("llama")(**inputs).logits)
        assert torch.equal(
            greedy(model, inputs["input_ids"]).sequences, greedy(tiny("llama"), inputs["input_ids"]).sequences
        )

    def test_zeros_are_no_no_op(self):
        model, inputs = prefixed(), batch()
        for parameter in model.ptuning_v2.parameters():
            parameter.data.zero_()
        assert (model(**inputs).logits - tiny("llama")(**inputs).logits).abs().max() > 0.01

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_left_padding_leaves_a_text_where_it_was(self, kind):
        model, ids = prefixed(kind), batch()["input_ids"][:1]
        padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), ids), dim=1)
        mask = (padded != 0).long()
        torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 4:], model(ids).logits)

    def test_position_ids_are_the_texts(self):
        model, ids = prefixed("gpt2"), batch()["input_ids"]
        explicit = model(ids, position_ids=torch.arange(10).expand(2, -1))
        assert torch.equal(explicit.logits, model(ids).logits)

    def test_prepared_mask(self):
        model, ids = prefixed(), batch()["input_ids"]
        causal = torch.ones(10, 10, dtype=torch.bool).tril().expand(2, 1, -1, -1)
        additive = torch.zeros(2, 1, 10, 10).masked_fill(~causal, torch.finfo(torch.float32).min)
        for mask in (causal, additive):
            torch.testing.assert_close(model(ids, attention_mask=mask).logits, model(ids).logits)

    def test_inner_model_and_tuples(self):
        model, inputs = prefixed(), batch()
        logits = model(**inputs).logits
        hidden = model.model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        assert torch.equal(model.lm_head(hidden), logits)
        output = model(**inputs, return_dict=False)
        assert torch.equal(output[1], logits)
        assert type(output[2]) is DynamicCache
        assert len(model(**inputs, return_dict=False, use_cache=False)) == 2

    def test_classifier(self):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(tiny("llama").config).eval()
        base = copy.deepcopy(model)
        apply_ptuning_v2(model, PTuningV2Config(num_tokens=P))
        mask = batch()["attention_mask"]
        inputs = {"input_ids": batch()["input_ids"] * mask, "attention_mask": mask}
        assert not torch.allclose(model(**inputs).logits, base(**inputs).logits, atol=1e-6)
        unpadded = model(inputs["input_ids"][1:, :7]).logits
        torch.testing.assert_close(model(**inputs).logits[1:], unpadded)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"attention_mask": torch.ones(2, 8)}, "must cover the text so far, 10 tokens, got 8"),
            ({"attention_mask": torch.ones(2, 10, 10)}, r"padding mask \[batch, length\], got shape \(2, 10, 10\)"),
            ({"cu_seq_lens_q": torch.zeros(2)}, "packed batches"),
            ({"past_key_values": ((1, 2),)}, "must be a transformers Cache such as DynamicCache"),
        ],
    )
    def test_bad_inputs(self, arguments, message):
        with pytest.raises(ValueError, match=message) as error:
            prefixed()(batch()["input_ids"], **arguments)
        assert "\n" not in str(error.value)

    def test_learned_positions_run_out(self):
        model = prefixed("gpt2")
        assert model(torch.full((1, 64 - P), 3)).logits.shape[1] == 64 - P
        with pytest.raises(
            ValueError, match="64 positions, too few for 5 virtual and 60 text tokens; cut the text to 59"
        ):
            model(torch.full((1, 60), 3))

    def test_heads_of_another_shape(self):
        model = prefixed()
        model.ptuning_v2.head_dim, model.ptuning_v2.num_kv_heads = 4, 4
        with pytest.raises(ValueError, match="layer 0 has 2 key-value heads of size 8, the prefix 4 of size 4"):
            model(batch()["input_ids"])


class TestGeneration:
    @pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
    def test_steps_equal_one_forward(self, kind):
        model, ids = prefixed(kind), batch()["input_ids"]
        out = greedy(model, ids)
        steps = torch.stack(out.logits, dim=1)
        torch.testing.assert_close(steps, model(out.sequences[:, :-1]).logits[:, -6:])
        uncached = greedy(model, ids, use_cache=False)
        assert torch.equal(uncached.sequences, out.sequences)

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_left_padding(self, kind):
        model, ids = prefixed(kind), batch()["input_ids"]
        padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), dim=1)
        padded[1, :5] = 0
        out = greedy(model, padded, (padded != 0).long())
        alone = greedy(model, padded[1:, 5:])
        assert torch.equal(out.sequences[1:, 5:], alone.sequences)
        torch.testing.assert_close(torch.stack(out.logits)[:, 1:], torch.stack(alone.logits))

    def test_cache_holds_the_text_alone(self):
        model, ids = prefixed(), batch()["input_ids"]
        cache = DynamicCache()
        output = model(ids, past_key_values=cache)
        assert output.past_key_values is cache
        assert cache.get_seq_length() == 10
        assert model(ids).past_key_values.get_seq_length() == 10
        assert model(ids, use_cache=False).past_key_values is None
        assert model.train()(ids).past_key_values is None
        assert model(ids, use_cache=True).past_key_values.get_seq_length() == 10

    def test_second_turn_on_ones_own_cache(self):
        model, ids = prefixed(), batch()["input_ids"]
        cache = DynamicCache()
        first = greedy(model, ids[:, :4], past_key_values=cache)
        history = torch.cat((first.sequences, ids[:, 4:]), dim=1)
        out = greedy(model, history, past_key_values=cache)
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(greedy(model, history).logits))

    @pytest.mark.parametrize("kind", ["llama", "qwen2"])
    def test_static_cache(self, device, kind):
        model, ids = prefixed(kind).to(device), batch(device)["input_ids"]
        padded = torch.cat((ids.new_zeros(2, 3), ids), dim=1)
        for tokens in (ids, padded):
            mask = (tokens != 0).long()
            expected = greedy(model, tokens, mask)
            static = StaticCache(config=model.config, max_cache_len=24)
            out = greedy(model, tokens, mask, past_key_values=static, disable_compile=True)
            torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits))

    def test_static_cache_with_a_window_is_refused(self):
        model = prefixed("gemma2")
        cache = StaticCache(config=model.config, max_cache_len=24)
        with pytest.raises(ValueError, match="static cache with sliding-window layers cannot be used"):
            model(batch()["input_ids"], past_key_values=cache)


class TestTraining:
    @pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "gpt_neox"])
    @pytest.mark.parametrize("use_reentrant", [True, False])
    @pytest.mark.parametrize(("projection", "dropout"), [(False, 0.0), (True, 0.3)])
    def test_checkpointing_changes_no_gradient(self, kind, use_reentrant, projection, dropout):
        model, inputs = prefixed(kind, projection, dropout), batch()
        plain = gradients(model, model.ptuning_v2, inputs)
        assert plain.abs().max() > 1e-4
        checkpointed(model, use_reentrant)
        torch.testing.assert_close(gradients(model, model.ptuning_v2, inputs), plain)
        embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
        by_embeds = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], "labels": inputs["labels"]}
        torch.testing.assert_close(gradients(model, model.ptuning_v2, by_embeds), plain)

    @pytest.mark.parametrize("implementation", list(wrappers.CheckpointImpl))
    def test_layers_wrapped_by_torch(self, implementation):
        model, inputs = prefixed(), batch()
        plain = gradients(model, model.ptuning_v2, inputs)
        model.enable_input_require_grads()  # what reentrant checkpointing of a frozen model takes
        wrappers.apply_activation_checkpointing(
            model,
            checkpoint_wrapper_fn=lambda layer: wrappers.checkpoint_wrapper(layer, checkpoint_impl=implementation),
            check_fn=lambda module: type(module).__name__ == "LlamaDecoderLayer",
        )
        torch.testing.assert_close(gradients(model, model.ptuning_v2, inputs), plain)

    def test_checkpointing_warns_of_no_cache(self, monkeypatch):
        """Transformers' warning, that it drops the cache, would be read as saying that it drops the prefix."""
        said: list[str] = []
        monkeypatch.setattr(modeling_layers.logger, "warning_once", said.append)
        model = prefixed()
        checkpointed(model, False)
        gradients(model, model.ptuning_v2, batch())
        # Before Transformers 5.18 or so the check comes before the hooks that run in time for later ones.
        checks_first = "__call__" in vars(modeling_layers.GradientCheckpointingLayer)
        assert bool(said) == checks_first

    def test_checkpointing_with_a_cache_is_refused(self):
        model, ids = prefixed().train(), batch()["input_ids"]
        checkpointed(model, False)
        with pytest.raises(ValueError, match=r"gradient checkpointing does not go with a cache .* call model.eval\(\)"):
            greedy(model, ids)
        model.eval()
        assert torch.equal(greedy(model, ids).sequences, greedy(prefixed(), ids).sequences)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_trainer(self, tmp_path, checkpointing):
        model, base = prefixed(), tiny("llama")
        rows = [{key: value[i] for key, value in batch().items()} for i in (0, 1)] * 4
        arguments = TrainingArguments(
            tmp_path, per_device_train_batch_size=2, max_steps=8, learning_rate=0.2, report_to=[], disable_tqdm=True,
            gradient_checkpointing=checkpointing, save_strategy="no", use_cpu=True, logging_strategy="no",
        )  # fmt: skip
        before = model(**batch()).loss.item()
        Trainer(model, arguments, train_dataset=rows).train()
        assert model.eval()(**batch()).loss.item() < before - 0.1
        for name, parameter in base.named_parameters():
            assert torch.equal(parameter, model.get_parameter(name)), name


class TestModel:
    def test_what_trains_and_what_stays(self, tmp_path):
        base, model = tiny("llama"), prefixed()
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert trained == ["ptuning_v2.prefix.0", "ptuning_v2.prefix.1"]
        assert type(model) is type(base)
        assert model.config.to_dict() == base.config.to_dict()
        assert set(model.state_dict()) - set(base.state_dict()) == set(trained)
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(**batch()).logits, base(**batch()).logits)

    @pytest.mark.parametrize("copies", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies_are_independent(self, copies):
        model, inputs = prefixed(), batch()
        expected = model(**inputs).logits
        other = copies(model)
        for parameter in model.ptuning_v2.parameters():
            parameter.data.zero_()
        model.ptuning_v2.enabled = False
        assert torch.equal(other(**inputs).logits, expected)
        checkpointed(other, True)
        assert gradients(other, other.ptuning_v2, inputs).abs().max() > 1e-4

    def test_state_dict(self):
        model, other = prefixed(projection=True), prefixed(projection=True)
        model.ptuning_v2.reset_parameters()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(**batch()).logits, model(**batch()).logits)

    def test_compile(self):
        model, inputs = prefixed(), batch()
        del inputs["attention_mask"]
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, model(**inputs).logits)

    @pytest.mark.parametrize(
        ("kind", "auto", "arguments", "reason"),
        [
            ("t5", AutoModelForSeq2SeqLM, {"num_layers": 1, "num_heads": 2}, "is an encoder-decoder model"),
            ("bert", AutoModel, {}, "is an encoder"),
            ("mamba", AutoModelForCausalLM, {}, "takes no past_key_values"),
            ("qwen3_next", AutoModelForCausalLM, {"num_key_value_heads": 2}, "has layers of type linear_attention"),
            ("deepseek_v3", AutoModelForCausalLM, {}, "compresses or shares its keys and values"),
        ],
    )
    def test_unsupported_models(self, kind, auto, arguments, reason):
        config = AutoConfig.for_model(kind, **{**COMMON, **arguments, "vocab_size": 16})
        with torch.device("meta"):
            model = auto.from_config(config)
        with pytest.raises(
            (TypeError, ValueError), match=f"apply_ptuning_v2: {type(model).__name__}.* {reason}.*; it takes"
        ):
            apply_ptuning_v2(model, PTuningV2Config(num_tokens=P))
        assert not hasattr(model, "ptuning_v2")

    def test_twice(self):
        with pytest.raises(ValueError, match="has a prefix already"):
            apply_ptuning_v2(prefixed(), PTuningV2Config())
