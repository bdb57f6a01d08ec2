import copy
import pickle

import pytest
import torch
from tiny_models import batch, checkpointed, gradients, greedy, tiny
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    Trainer,
    TrainingArguments,
)

from peftkern.nn import PromptTuningConfig
from peftkern.nn.prompt import PromptTuning, apply_prompt_tuning

P = 5


def prompted(kind="llama", **kwargs):
    model = tiny(kind, **kwargs)
    return apply_prompt_tuning(model, PromptTuningConfig(num_tokens=P))


def stock_peft(model, kind="llama", **kwargs):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    stock = peft.get_peft_model(tiny(kind, **kwargs), config).eval()
    stock.prompt_encoder["default"].embedding.weight.data.copy_(model.prompt_tuning.prompt_embeddings)
    return stock


class TestModule:
    def test_vocab_start_is_rows_of_the_embedding(self):
        embedding = torch.nn.Embedding(50, 8)
        prompt = PromptTuning(20, 8, embedding=embedding)
        equal = (prompt.prompt_embeddings[:, None] == embedding.weight).all(dim=-1)
        assert equal.any(dim=1).all()
        assert equal.any(dim=0).sum() > 5

    def test_random_start(self):
        prompt = PromptTuning(200, 64, initialize_from_vocab=False, embedding=torch.nn.Embedding(50, 64))
        assert prompt.prompt_embeddings.std().item() == pytest.approx(0.02, rel=0.1)

    @pytest.mark.parametrize(("ids", "rows"), [([3, 1, 4], [3, 1, 4, 3, 1]), ([9, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5])])
    def test_given_ids_are_repeated_or_cut(self, ids, rows):
        weight = torch.randn(10, 8)
        prompt = PromptTuning(5, 8, embedding=weight, token_ids=ids)
        assert torch.equal(prompt.prompt_embeddings, weight[rows])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_forward(self, device, dtype):
        prompt = PromptTuning(3, 8, device=device)
        embeds = torch.randn(2, 4, 8, device=device, dtype=dtype)
        mask, labels = torch.zeros(2, 4, dtype=torch.long, device=device), torch.ones(2, 4, device=device).long()
        out, out_mask, out_labels = prompt(embeds, mask, labels)
        assert out.dtype == dtype
        assert torch.equal(out[:, :3], prompt.prompt_embeddings.to(dtype).expand(2, -1, -1))
        assert torch.equal(out[:, 3:], embeds)
        assert out_mask.tolist() == [[1, 1, 1, 0, 0, 0, 0]] * 2
        assert out_labels.tolist() == [[-100, -100, -100, 1, 1, 1, 1]] * 2
        prompt.enabled = False
        assert prompt(embeds, mask, labels)[0] is embeds

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_tokens": 0}, "num_tokens must be a positive integer, got 0"),
            ({"token_dim": -1}, "token_dim must be a positive integer, got -1"),
            ({"embedding": torch.zeros(4, 9)}, "token_dim must be the size of the model's embeddings, 9, got 8"),
            ({"token_ids": [1]}, "token_ids needs the embedding"),
            ({"embedding": torch.zeros(4, 8), "token_ids": [4]}, r"token_ids must be in \[0, 4\)"),
            ({"embedding": torch.zeros(4, 8), "token_ids": []}, "token_ids must name at least one"),
        ],
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message) as error:
            PromptTuning(**{"num_tokens": 5, "token_dim": 8, **arguments})
        assert "\n" not in str(error.value)

    def test_wrong_embeddings(self):
        with pytest.raises(ValueError, match=r"inputs_embeds must be \[batch, length, 8\], got \(2, 3, 9\)"):
            PromptTuning(5, 8)(torch.zeros(2, 3, 9))

    def test_state(self):
        prompt, other = PromptTuning(5, 8), PromptTuning(5, 8, dtype=torch.bfloat16)
        state = prompt.peftkern_state()
        assert {key: tuple(value.shape) for key, value in state.items()} == {"prompt_embeddings": (5, 8)}
        other.load_peftkern_state(state)
        assert torch.equal(other.prompt_embeddings, prompt.prompt_embeddings.bfloat16())
        with pytest.raises(ValueError, match=r"prompt_embeddings must be \(4, 8\), got \(5, 8\)"):
            PromptTuning(4, 8).load_peftkern_state(state)
        with pytest.raises(ValueError, match="must hold prompt_embeddings and nothing else, got \\['lora_A'\\]"):
            prompt.load_peftkern_state({"lora_A": torch.zeros(1)})


class TestAgainstPeft:
    @pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma2", "opt"])
    def test_same_logits_loss_and_gradient(self, kind):
        model = prompted(kind)
        stock, inputs = stock_peft(model, kind), batch()
        ours, theirs = model(**inputs), stock(**inputs)
        real = torch.cat((inputs["attention_mask"].new_ones(2, P), inputs["attention_mask"]), 1).bool()
        torch.testing.assert_close(ours.logits[real], theirs.logits[real])
        torch.testing.assert_close(ours.loss, theirs.loss)
        assert ours.logits.shape == theirs.logits.shape
        ours.loss.backward()
        theirs.loss.backward()
        theirs_grad = stock.prompt_encoder["default"].embedding.weight.grad
        assert theirs_grad.abs().max() > 1e-4
        torch.testing.assert_close(model.prompt_tuning.prompt_embeddings.grad, theirs_grad)

    def test_inputs_embeds(self):
        model, inputs = prompted(), batch()
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        by_embeds = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
        assert torch.equal(by_embeds.logits, model(inputs["input_ids"], inputs["attention_mask"]).logits)

    @pytest.mark.parametrize("beams", [1, 3])
    def test_same_generation(self, beams):
        model = prompted()
        arguments = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
        ids = batch()["input_ids"]
        stock = stock_peft(model)
        theirs = stock.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **arguments)
        assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **arguments), theirs)
        assert not torch.equal(tiny("llama").generate(ids, attention_mask=torch.ones_like(ids), **arguments), theirs)


class TestForward:
    def test_devices_and_dtypes(self, device):
        model = prompted().to(device)
        reference = model(**batch(device))
        half = copy.deepcopy(model).to(torch.bfloat16)(**batch(device))
        assert half.logits.dtype == torch.bfloat16
        torch.testing.assert_close(half.loss.float(), reference.loss, rtol=0.05, atol=0)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            mixed = model(**batch(device))
        torch.testing.assert_close(mixed.loss.float(), reference.loss, rtol=0.05, atol=0)
        mixed.loss.backward()
        assert model.prompt_tuning.prompt_embeddings.grad.dtype == torch.float32

    def test_disabled_is_the_base(self):
        model, inputs = prompted(), batch()
        model.prompt_tuning.enabled = False
        assert torch.equal(model(**inputs).logits, tiny("llama")(**inputs).logits)

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_left_padding_leaves_a_text_where_it_was(self, kind):
        model, ids = prompted(kind), batch()["input_ids"][:1]
        padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), ids), dim=1)
        mask = (padded != 0).long()
        torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, -10:], model(ids).logits[:, -10:])

    def test_position_ids_are_the_texts(self):
        model, ids = prompted("gpt2"), batch()["input_ids"]
        explicit = model(ids, position_ids=torch.arange(10).expand(2, -1))
        assert torch.equal(explicit.logits, model(ids).logits)

    def test_logits_to_keep_counts_the_text(self):
        model, ids = prompted(), batch()["input_ids"]
        kept = model(ids, logits_to_keep=torch.tensor([0, 9])).logits
        torch.testing.assert_close(kept, model(ids).logits[:, [P, P + 9]])

    def test_tuple_output(self):
        model, inputs = prompted(), batch()
        assert torch.equal(model(**inputs, return_dict=False)[1], model(**inputs).logits)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"attention_mask": torch.ones(2, 8)}, "must cover the text so far, 10 tokens, got 8"),
            (
                {"attention_mask": torch.ones(2, 1, 10, 10)},
                r"padding mask \[batch, length\], got shape \(2, 1, 10, 10\)",
            ),
            ({"cu_seq_lens_q": torch.zeros(2)}, "packed batches"),
            ({"past_key_values": ((1, 2),)}, "must be a transformers Cache such as DynamicCache"),
        ],
    )
    def test_bad_inputs(self, arguments, message):
        with pytest.raises(ValueError, match=message) as error:
            prompted()(batch()["input_ids"], **arguments)
        assert "\n" not in str(error.value)

    def test_learned_positions_run_out(self):
        model = prompted("gpt2")
        assert model(torch.full((1, 64 - P), 3)).logits.shape[1] == 64
        with pytest.raises(
            ValueError, match="64 positions, too few for 5 virtual and 60 text tokens; cut the text to 59"
        ):
            model(torch.full((1, 60), 3))


class TestGeneration:
    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_steps_equal_one_forward(self, kind):
        model, ids = prompted(kind), batch()["input_ids"]
        out = greedy(model, ids)
        steps = torch.stack(out.logits, dim=1)
        torch.testing.assert_close(steps, model(out.sequences[:, :-1]).logits[:, -6:])
        uncached = greedy(model, ids, use_cache=False)
        assert torch.equal(uncached.sequences, out.sequences)

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_left_padding(self, kind):
        model, ids = prompted(kind), batch()["input_ids"]
        padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), dim=1)
        padded[1, :5] = 0
        out = greedy(model, padded, (padded != 0).long())
        alone = greedy(model, padded[1:, 5:])
        assert torch.equal(out.sequences[1:, 5:], alone.sequences)
        torch.testing.assert_close(torch.stack(out.logits)[:, 1:], torch.stack(alone.logits))

    def test_from_inputs_embeds(self):
        model, ids = prompted(), batch()["input_ids"]
        embeds = model.get_input_embeddings()(ids)
        out = model.generate(
            inputs_embeds=embeds, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False
        )
        assert torch.equal(out, greedy(model, ids).sequences[:, 10:14])

    def test_second_turn_on_a_cache(self):
        model, ids = prompted(), batch()["input_ids"]
        first = greedy(model, ids[:, :4])
        history = torch.cat((first.sequences, ids[:, 4:]), dim=1)
        fresh = greedy(model, history)
        new = history[:, 9:]  # the last generated token is not in the cache yet
        cache = first.past_key_values
        out = greedy(model, new, torch.ones_like(history), past_key_values=copy.deepcopy(cache))
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(fresh.logits))
        with pytest.raises(ValueError, match="with a filled cache pass only the new tokens' ids"):
            greedy(model, history, past_key_values=copy.deepcopy(cache))
        history[1, 0] = 0
        with pytest.raises(ValueError, match="with a filled cache pass only the new tokens' ids"):
            greedy(model, history, (history != 0).long(), past_key_values=cache)

    def test_a_loop_of_ones_own(self):
        model, ids = prompted(), batch()["input_ids"]
        expected = model(ids, attention_mask=torch.ones_like(ids)).logits[:, -4:]
        for with_mask in (True, False):
            mask = torch.ones_like(ids) if with_mask else None
            out = model(ids[:, :6], attention_mask=mask[:, :6] if with_mask else None, use_cache=True)
            steps = []
            for i in range(6, 10):
                cache = out.past_key_values
                out = model(
                    ids[:, i : i + 1], attention_mask=mask[:, : i + 1] if with_mask else None, past_key_values=cache
                )
                steps.append(out.logits)
            torch.testing.assert_close(torch.cat(steps, dim=1), expected)

    def test_a_cache_of_another_prompt(self):
        model, ids = prompted(), batch()["input_ids"]
        model.prompt_tuning.enabled = False
        bare = model(ids, use_cache=True).past_key_values
        model.prompt_tuning.enabled = True
        with pytest.raises(ValueError, match="filled with 0 prompt tokens but the model has 5 now"):
            model(ids[:, :1], past_key_values=bare)
        held = model(ids, past_key_values=DynamicCache()).past_key_values
        model.prompt_tuning.enabled = False
        with pytest.raises(ValueError, match="filled with 5 prompt tokens but the model has 0 now"):
            model(ids[:, :1], past_key_values=held)

    def test_a_cache_is_reused_after_reset(self):
        cache, ids = DynamicCache(), batch()["input_ids"]
        prompted()(ids, past_key_values=cache)
        cache.layers.clear()
        model = apply_prompt_tuning(tiny("llama"), PromptTuningConfig(num_tokens=3))
        model(ids, past_key_values=cache)
        assert model(ids[:, :1], past_key_values=cache).logits.shape[1] == 1

    def test_static_cache_is_refused(self):
        with pytest.raises(ValueError, match="static cache has no room for the prompt"):
            greedy(prompted(), batch()["input_ids"], cache_implementation="static")


class TestTraining:
    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpointing_changes_no_gradient(self, kind, use_reentrant):
        model, inputs = prompted(kind), batch()
        plain = gradients(model, model.prompt_tuning, inputs)
        checkpointed(model, use_reentrant)
        torch.testing.assert_close(gradients(model, model.prompt_tuning, inputs), plain)

    def test_trainer(self, tmp_path):
        model, base = prompted(), tiny("llama")
        rows = [{key: value[i] for key, value in batch().items()} for i in (0, 1)] * 4
        arguments = TrainingArguments(
            tmp_path, per_device_train_batch_size=2, max_steps=8, learning_rate=0.1, report_to=[], disable_tqdm=True,
            gradient_checkpointing=True, save_strategy="no", use_cpu=True, logging_strategy="no",
        )  # fmt: skip
        before = model(**batch()).loss.item()
        Trainer(model, arguments, train_dataset=rows).train()
        assert model.eval()(**batch()).loss.item() < before - 0.1
        for name, parameter in base.named_parameters():
            assert torch.equal(parameter, model.get_parameter(name)), name


class TestModel:
    def test_what_trains_and_what_stays(self, tmp_path):
        base, model = tiny("llama"), prompted()
        assert [n for n, p in model.named_parameters() if p.requires_grad] == ["prompt_tuning.prompt_embeddings"]
        assert type(model) is type(base)
        assert model.config.to_dict() == base.config.to_dict()
        assert set(model.state_dict()) - set(base.state_dict()) == {"prompt_tuning.prompt_embeddings"}
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(**batch()).logits, base(**batch()).logits)

    @pytest.mark.parametrize("copies", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies_are_independent(self, copies):
        model, inputs = prompted(), batch()
        expected = model(**inputs).logits
        other = copies(model)
        model.prompt_tuning.prompt_embeddings.data.zero_()
        assert torch.equal(other(**inputs).logits, expected)
        assert not torch.equal(model(**inputs).logits, expected)
        assert torch.equal(
            greedy(other, inputs["input_ids"]).sequences, greedy(copies(other), inputs["input_ids"]).sequences
        )

    def test_state_dict(self):
        model, other = prompted(), prompted()
        model.prompt_tuning.prompt_embeddings.data.normal_()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(**batch()).logits, model(**batch()).logits)

    def test_compile(self):
        model, inputs = prompted(), batch()
        del inputs["attention_mask"]
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)

    def test_text_start(self):
        model = tiny("llama")
        config = PromptTuningConfig(num_tokens=4, init="text", init_text="any text")
        with pytest.raises(TypeError, match="init 'text' needs the model's tokenizer"):
            apply_prompt_tuning(model, config)
        apply_prompt_tuning(model, config, tokenizer=lambda text: {"input_ids": [len(text), 7]})
        rows = model.get_input_embeddings().weight[[8, 7, 8, 7]]
        assert torch.equal(model.prompt_tuning.prompt_embeddings, rows)

    def test_unsupported_models(self):
        config = PromptTuningConfig(num_tokens=P)
        t5 = AutoConfig.for_model("t5", vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        with pytest.raises(
            TypeError, match="T5ForConditionalGeneration is an encoder-decoder model; it takes decoder-only"
        ):
            apply_prompt_tuning(AutoModelForSeq2SeqLM.from_config(t5), config)
        with pytest.raises(TypeError, match="Linear is no Transformers model"):
            apply_prompt_tuning(torch.nn.Linear(2, 2), config)
        classifier = AutoModelForSequenceClassification.from_config(tiny("llama").config)
        with pytest.raises(TypeError, match="LlamaForSequenceClassification picks positions"):
            apply_prompt_tuning(classifier, config)
        mamba = AutoConfig.for_model("mamba", vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=4)
        with pytest.raises(TypeError, match=r"MambaForCausalLM.forward takes no past_key_values"):
            apply_prompt_tuning(AutoModelForCausalLM.from_config(mamba), config)
        with pytest.raises(ValueError, match="has a prompt already"):
            apply_prompt_tuning(prompted(), config)
