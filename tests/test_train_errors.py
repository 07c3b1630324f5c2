"""Inputs that cannot be trained are refused before training, with the argument, the expectation and the value."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
import transformers

pytest.importorskip("accelerate", reason="training needs accelerate")

from transformers import TrainingArguments

from nlhf_kernels.preference import JudgeError
from nlhf_kernels.train import NashConfig, NashTrainer
from nlhf_kernels.train.config import FIXED, defaults, own_fields
from tests.support.tiny_models import ARCHITECTURES, random_model, tiny_model, tiny_tokenizer
from tests.support.training import PROMPTS, likes_e, lora, make_trainer, single_thread  # noqa: F401


def without(token: str):
    tokenizer = tiny_tokenizer()
    setattr(tokenizer, token, None)
    return tokenizer


def other_vocabulary():
    config = ARCHITECTURES["llama"](32)
    config.vocab_size = 101
    return random_model(config, 0)


def quantised():
    model = tiny_model("llama")
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.zeros_like(layer.weight, dtype=torch.int8), requires_grad=False)
    return model


def spread():
    model = tiny_model("llama")
    model.model.norm.to("meta")
    return model


def other_task(task: str):
    return getattr(transformers, f"AutoModelFor{task}").from_config(ARCHITECTURES["llama"](32))


def masked():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=97, **sizes))


def translator():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 1, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=97, **sizes))


def no_end():
    model = tiny_model("llama")
    model.generation_config.eos_token_id = None
    return {"model": model, "tokenizer": without("eos_token")}


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": PROMPTS}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_dataset": [{"question": "why"}]}, r"train_dataset: data: row 0: .*prompt is not among \['question'\]"),
        ({"train_dataset": [{"prompt": "why"}, {"prompt": "  "}]}, r"train_dataset: data: row 1: prompt: expected"),
        ({"train_dataset": []}, r"train_dataset: data: list: expected at least one row; got none"),
        ({"train_dataset": [{"prompt": 7}]}, r"train_dataset: data: row 0: prompt: expected a string or a list"),
        ({"train_dataset": (row for row in PROMPTS)}, r"train_dataset: expected rows with a length, .* got generator"),
        ({"eval_dataset": [{"text": "x"}]}, r"eval_dataset: data: row 0: expected columns prompt"),
        ({"eval_dataset": {"new": [{"text": "x"}]}}, r"eval_dataset\['new'\]: data: row 0: expected columns prompt"),
        ({"train_dataset": [{"prompt": [{"role": "user", "content": "hi"}]}]}, r"with a chat template to render mess"),
        ({"tokenizer": "gpt2"}, r"processing_class: expected a tokenizer; got str"),
        ({"tokenizer": without("pad_token")}, r"processing_class: expected a tokenizer with a padding token; got one"),
        (no_end(), r"processing_class: expected a tokenizer with an end token; got one without"),
        ({"reference_model": other_vocabulary()}, r"NashTrainer: .*reference.*97.*101|.*101.*97"),
        ({"model": "gpt2"}, r"model: expected a causal language model; got str"),
        ({"model": tiny_model("gpt2").transformer}, r"model: expected a causal language model, with an output layer "
         r"over the vocabulary; got a GPT2Model"),
        ({"model": torch.compile(tiny_model("llama"))}, r"model: expected one without torch.compile, as the"),
        ({"model": masked()}, r"NashTrainer: model: expected a model whose past lies in .* BertForMaskedLM"),
        ({"model": other_task("SequenceClassification")}, r"model: expected a causal .*got a LlamaForSequenceClassif"),
        ({"model": other_task("TokenClassification")}, r"model: expected a causal .*got a LlamaForTokenClassification"),
        ({"model": translator()}, r"model: expected a causal language model.*got a T5ForConditionalGeneration"),
        ({"judge": None}, r"judge: expected one, for nash-md; got None"),
        ({"judge": "gpt-4"}, r"judge: expected a callable; got str"),
        ({"algorithm": "rlhf"}, r"reward: expected one, for rlhf; got None"),
        ({"eval_strategy": "steps", "eval_steps": 1}, r"eval_dataset"),
        (EVALUATED | {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1},
         r"metric_for_best_model: expected one of eval_kl, .*eval_win_rate_reference; got 'loss'"),
        ({"metric_for_best_model": "reward", "eval_dataset": {"a": PROMPTS}}, r"metric_for_best_model: expected one of "
         r"eval_a_kl, .*eval_a_win_rate_reference; got 'reward'"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 64}, r"train_dataset: expected a whole "
         r"batch, 64 prompts, with dataloader_drop_last; got 16"),
        ({"max_new_tokens": 200}, r"max_new_tokens: expected prompt and response within the policy's 128 positions"),
        ({"peft_config": lora(bias="all", target_modules=["c_attn"]), "model": tiny_model("gpt2")}, r"reference_model: "
         r"expected one, as the model trains .*bias beside its adapters"),
        ({"peft_config": {"r": 4}}, r"peft_config: expected a peft.PeftConfig; got dict"),
        ({"model": quantised()}, r"model: expected weights that are not quantised; got torch.int8 in .*up_proj.weight"),
        ({"model": spread()}, r"model: expected the whole model on one device; got it on cpu, meta"),
        ({"model": tiny_model("llama").requires_grad_(False)}, r"model: expected parameters to train; got none"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(given, message, tmp_path) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make_trainer(tmp_path, **given)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_there_are_no_predictions(tmp_path) -> None:
    with pytest.raises(NotImplementedError, match=r"NashTrainer: predict: expected evaluate\(\)"):
        make_trainer(tmp_path).predict(PROMPTS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_weights_of_few_bits_is_warned_of(dtype, tmp_path) -> None:
    """Training weights in 16 bits is warned of: updates below their rounding are lost, which looks like convergence."""
    with pytest.warns(
        UserWarning, match=r"NashTrainer: model: expected float32 weights, since steps smaller than 1/\d+ "
    ):
        make_trainer(tmp_path, model=tiny_model("llama").to(dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_trainer(tmp_path, model=tiny_model("llama"), bf16=True)
        make_trainer(tmp_path, model=tiny_model("llama").to(dtype), peft_config=lora())


def test_the_reference_must_be_another_model(tmp_path) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="reference_model: expected another model than the trained one; got the same"):
        make_trainer(tmp_path, model=model, reference_model=model)
    with pytest.raises(TypeError, match="NashTrainer: args: expected a NashConfig; got TrainingArguments"):
        NashTrainer(model, judge=likes_e, args=TrainingArguments(str(tmp_path)), processing_class=tiny_tokenizer())


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (lambda x, a, b: [0.5], r"judge <lambda>: expected 4 probabilities, one for each pair; got shape \(1,\)"),
        (lambda x, a, b: [1.5] * len(x), r"expected probabilities in \[0, 1\]; got 1.5 for pair 0"),
        (lambda x, a, b: [float("nan")] * len(x), r"expected probabilities in \[0, 1\]; got nan for pair 0"),
        (lambda x, a, b: "better", r"expected 4 probabilities; got str 'better'"),
    ],
    ids=["length", "range", "nan", "type"],
)
def test_a_judge_that_returns_nonsense_moves_nothing(judge, message, tmp_path) -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(JudgeError, match=message):
        make_trainer(tmp_path, model=model, judge=judge).train()
    assert all(value.equal(before[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], r"reward: .*expected 4 numbers; got shape \(1,\)"),
        ([float("inf")] * 4, r"reward: .*expected finite numbers; got inf in rows \[0, 1, 2, 3\]"),
        (None, r"reward: .*expected 4 numbers; got NoneType"),
    ],
)
def test_a_reward_that_returns_nonsense(returned, message, tmp_path) -> None:
    trainer = make_trainer(tmp_path, judge=None, algorithm="rlhf", reward=lambda prompts, answers: returned)
    with pytest.raises((ValueError, TypeError), match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_reward_that_calls_exit_ends_nothing(tmp_path) -> None:
    def leaving(prompts, answers):
        raise SystemExit(0)

    trainer = make_trainer(tmp_path, judge=None, algorithm="rlhf", reward=leaving)
    with pytest.raises(RuntimeError, match=r"NashTrainer: reward: .*leaving: called sys.exit\(0\)"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "nash"}, "algorithm: expected one of nash-md, .*; got 'nash'"),
        ({"beta": 1.5}, r"beta: expected a finite number in \[0.0, 1.0\]; got 1.5"),
        ({"beta": []}, "beta: expected a number for every epoch; got an empty list"),
        ({"beta": {5: 0.1}}, r"beta: expected the value from step 0 on among them; got steps \[5\]"),
        ({"beta": {"x": 0.1, 0: 0.1}}, "beta: expected steps, 0 or more, as keys; got 'x'"),
        ({"beta": [0.1, "a"]}, r"beta\[1\]: expected a finite number in \[0.0, 1.0\]; got 'a'"),
        ({"beta": lambda step: 0.1}, "beta: expected a function that a checkpoint can hold"),
        ({"tau": -1}, "tau: expected a finite number in .*; got -1"),
        ({"tau": 0.0, "algorithm": "ipo-md"}, r"tau: expected a finite number in \(0.0, inf\); got 0.0"),
        ({"kl": "full"}, "kl: expected one of sequence, to_go, exact, token; got 'full'"),
        ({"kl": "exact", "algorithm": "nash-mp"}, "kl: nash-mp has two references and needs to_go or sequence"),
        ({"baseline": "mean"}, "baseline: expected one of batch; got 'mean'"),
        ({"min_new_tokens": 9, "max_new_tokens": 4}, "min_new_tokens: expected at most 4; got 9"),
        ({"temperature": 0.0}, r"temperature: expected a finite number in \(0.0, inf\)"),
        ({"nonfinite": "ignore"}, "nonfinite: expected one of skip, stop; got 'ignore'"),
        ({"backend": "fast"}, "backend: expected one of .*; got 'fast'"),
        ({"beta": 0.3, "algorithm": "self-play"}, "beta: self-play does not use it; got 0.3"),
        ({"kl": "exact", "algorithm": "online-ipo"}, "kl: online-ipo does not use it"),
        ({"ema_decay": 0.5}, "ema_decay: nash-md does not use it; got 0.5"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: expected None, as answers are scored"),
        ({"remove_unused_columns": True}, "remove_unused_columns: expected False, as prompts"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy: expected one of random, sequential"),
        ({"optim": "adalomo"}, "optim: expected an optimizer that steps after the backward pass"),
        ({"do_eval": True}, "do_eval: expected an eval_strategy beside it; got none"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config: split_batches: expected False"),
        ({"seed": -1}, "seed: expected .*; got -1"),
    ],
)  # fmt: skip
def test_bad_configurations_are_refused(options, message, tmp_path) -> None:
    with pytest.raises((ValueError, TypeError), match=f"NashConfig: {message}"):
        NashConfig(str(tmp_path), **options)
    assert NashConfig(str(tmp_path)).algorithm == "nash-md"


def test_schedules_that_leave_their_range_are_refused_when_they_do(tmp_path) -> None:
    trainer = make_trainer(tmp_path, beta=_grows, max_steps=3)
    with pytest.raises(ValueError, match=r"beta\(2\): expected a finite number in \[0.0, 1.0\]; got 2.0"):
        trainer.train()
    assert trainer.state.global_step == 2


def _grows(step: int) -> float:
    return 0.5 * step if step < 2 else 2.0


def test_every_option_is_looked_at() -> None:
    """Options of TrainingArguments keep their meaning or are refused; FIXED names only existing options."""
    values = {field.name for field in dataclasses.fields(TrainingArguments)}
    newest = {"use_cache", "parallelism_config", "average_tokens_across_devices"}  # not in every version
    assert set(FIXED) - values <= newest
    assert all(len(reason) > 5 for reason in FIXED.values())
    assert {"algorithm", "beta", "tau", "kl"} <= {field.name for field in own_fields()}
    assert all(field.metadata["help"] for field in own_fields())
    assert defaults()["remove_unused_columns"] is False


def test_prompts_that_may_have_been_cut_are_counted(tmp_path, caplog) -> None:
    make_trainer(tmp_path, max_prompt_length=5)
    assert "train_dataset: 16 of 16 prompts fill max_prompt_length" in caplog.text
    with torch.no_grad():
        caplog.clear()
        make_trainer(tmp_path / "2")
    assert "max_prompt_length" not in caplog.text
