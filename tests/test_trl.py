"""NashMDConfig and NashMDTrainer by TRL's names: meanings, refusals, and no ignored option."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="training needs accelerate")

import transformers

from nlhf_kernels.integrations.trl import NashMDConfig, NashMDTrainer
from nlhf_kernels.integrations.trl.config import REFUSED
from nlhf_kernels.train import NashTrainer
from tests.support.tiny_models import tiny_model, tiny_tokenizer
from tests.support.training import PROMPTS, checkpoints, gradients, history, likes_e, lora, single_thread  # noqa: F401
from tests.support.training import make_trainer as make_nash_trainer
from tests.support.trl import ARGUMENTS, OPTIONS, default, make_config, make_trainer, reward_model

PAGE = Path(__file__).resolve().parent.parent / "docs" / "migrating_from_trl.md"


def test_nothing_here_imports_trl() -> None:
    code = (
        "import sys, nlhf_kernels.integrations as one, nlhf_kernels.integrations.trl as two\n"
        "assert 'trl' not in sys.modules; print('none')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "none", result.stderr


def test_names_defaults_and_order_are_trls() -> None:
    ours = {entry.name: default(entry) for entry in dataclasses.fields(NashMDConfig)}
    assert {name: ours[name] for name in OPTIONS} == OPTIONS
    assert tuple(inspect.signature(NashMDTrainer.__init__).parameters)[1 : len(ARGUMENTS) + 1] == ARGUMENTS


def test_the_page_names_every_option_and_argument() -> None:
    tables = set(re.findall(r"^\| `(\w+)`", PAGE.read_text(), re.M))
    own = {entry.name for entry in dataclasses.fields(NashMDConfig)} - {
        entry.name for entry in dataclasses.fields(transformers.TrainingArguments)
    }
    missing = (own | set(OPTIONS) | set(inspect.signature(NashMDTrainer.__init__).parameters)) - {"self"} - tables
    assert not missing, f"docs/migrating_from_trl.md has no row for {sorted(missing)}"


def test_the_command_line_parser_of_transformers_reads_the_options() -> None:
    line = ["--output_dir", "x", "--mixture_coef", "0.5", "0.25", "--beta", "0.2", "--use_cpu", "--bf16", "false"]
    (args,) = transformers.HfArgumentParser(NashMDConfig).parse_args_into_dataclasses(line)
    assert (args.mixture_coef, args.beta, args.temperature) == ([0.5, 0.25], 0.2, 0.9)
    assert (args.nash_config(0.0).beta, args.nash_config(0.0).tau) == ([0.5, 0.25], 0.2)


def test_what_the_options_mean(tmp_path) -> None:
    given = make_config(
        tmp_path, mixture_coef=[0.5, 0.25], beta=0.2, max_length=100, max_new_tokens=10, temperature=0.7, top_k=5,
        top_p=0.9, generation_kwargs={"min_new_tokens": 3, "top_k": 7}, num_train_epochs=2, weight_decay=0.1,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    meant = given.nash_config(0.5)
    assert (meant.algorithm, meant.beta, meant.tau, meant.kl) == ("nash-md", [0.5, 0.25], 0.2, "to_go")
    assert (meant.max_new_tokens, meant.max_prompt_length, meant.min_new_tokens) == (10, 90, 3)
    assert (meant.temperature, meant.top_k, meant.top_p, meant.missing_eos_penalty) == (0.7, 7, 0.9, 0.5)
    assert (meant.num_train_epochs, meant.weight_decay, meant.gradient_accumulation_steps) == (2, 0.1, 2)
    assert meant.gradient_checkpointing, "TRL's default"
    assert not meant.bf16
    assert meant.learning_rate == 5e-7


def test_an_attribute_that_is_set_later_counts(tmp_path) -> None:
    given = make_config(tmp_path)
    given.learning_rate, given.beta, given.report_to = 1e-3, [0.3], ["tensorboard"]
    meant = given.nash_config(0.0)
    assert (meant.learning_rate, meant.tau, meant.report_to) == (1e-3, 0.3, ["tensorboard"])
    assert meant.activation_checkpointing if "activation_checkpointing" in vars(meant) else meant.gradient_checkpointing
    given.gradient_checkpointing, given.gradient_checkpointing_kwargs = False, {"use_reentrant": True}
    meant, name = given.nash_config(0.0), next(iter(checkpoints(True)))
    assert (getattr(meant, name), getattr(meant, f"{name}_kwargs")) == (False, {"use_reentrant": True})
    given.use_vllm = True
    with pytest.raises(ValueError, match=r"NashMDConfig: use_vllm: expected False, as .*; got True"):
        given.nash_config(0.0)


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_cannot_be_honoured_are_refused(name, tmp_path) -> None:
    other = {bool: not OPTIONS[name], str: "other", float: 0.25, int: 2, type(None): "other"}[type(OPTIONS[name])]
    with pytest.raises(ValueError, match=rf"NashMDConfig: {name}: expected .*, as .*; got {other!r}"):
        make_config(tmp_path, **{name: other})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mixture_coef": [0.5, 1.5]}, r"mixture_coef\[1\]: expected a finite number in \[0.0, 1.0\]; got 1.5"),
        ({"mixture_coef": []}, "mixture_coef: expected a number for every epoch; got an empty list"),
        ({"beta": -0.1}, r"beta: expected a finite number in \[0.0, inf\); got -0.1"),
        ({"missing_eos_penalty": -1.0}, r"missing_eos_penalty: expected .*; got -1.0"),
        ({"max_length": 7}, "max_length: expected room for a prompt, 8 or more with max_new_tokens=6; got 7"),
        ({"max_length": None}, "max_length: expected an integer; got NoneType"),
        ({"min_p": 2.0}, r"min_p: expected a finite number in \[0.0, 1.0\]; got 2.0"),
        ({"generation_kwargs": '{"top_k": 3}'}, "generation_kwargs: expected a dict; got str"),
        ({"generation_kwargs": {"num_beams": 4}}, "generation_kwargs: expected keys of .*; got 'num_beams'"),
    ],
)
def test_values_out_of_range_are_refused(wrong, message, tmp_path) -> None:
    with pytest.raises((TypeError, ValueError), match=f"NashMDConfig: {message}"):
        make_config(tmp_path, **wrong)


def test_options_of_transformers_are_checked_as_everywhere(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"NashConfig: neftune_noise_alpha: expected None, as .*; got 0.5"):
        make_trainer(tmp_path, judge=likes_e, neftune_noise_alpha=0.5)


def test_training_is_that_of_nash_trainer(tmp_path) -> None:
    """The same seed gives the same gradients under TRL's names as under NashTrainer's."""
    common = {"temperature": 0.9, "max_steps": 1, "max_grad_norm": 0.0, "per_device_train_batch_size": 16}
    reference = {"reference_model": tiny_model("llama", seed=4)}
    ours = make_nash_trainer(tmp_path / "ours", beta=0.5, tau=0.3, max_prompt_length=58, **reference, **common)
    theirs = make_trainer(
        tmp_path / "theirs", ref_model=tiny_model("llama", seed=4), judge=likes_e, mixture_coef=0.5, beta=0.3, **common
    )
    assert isinstance(theirs, NashTrainer)
    one, other = gradients(ours), gradients(theirs)
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)
    assert any(bool(gradient.abs().max() > 1e-2) for gradient in one.values())


def test_lists_go_by_epoch(tmp_path) -> None:
    """With 16 prompts and 4 per update, a list's epoch changes every 4 updates, and epochs are fractional between."""
    trainer = make_trainer(tmp_path, judge=likes_e, mixture_coef=[0.5, 0.25], beta=[0.1, 0.2], max_steps=6)
    trainer.train()
    assert history(trainer, "mixture_coef", "beta") == [(0.5, 0.1)] * 4 + [(0.25, 0.2)] * 2
    assert (trainer.mixture_coef, trainer.beta) == (0.25, 0.2)
    assert "tau" not in trainer.state.log_history[0]


def test_min_p_reaches_the_sampler(tmp_path) -> None:
    """min_p = 1 leaves only the likeliest token: two runs of different seeds answer alike."""
    answers = []
    for seed in (1, 2):
        trainer = make_trainer(
            tmp_path / str(seed), judge=likes_e, min_p=1.0, seed=seed, train_dataset=PROMPTS[:4], mixture_coef=0.0
        )
        trainer.train()
        experience = trainer.experiences[0]
        answers.append(dict(zip(experience.prompts, experience.answers[0], strict=True)))
    assert answers[0] == answers[1] and len(answers[0]) == 4


def test_models_given_by_name(tmp_path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    trainer = make_trainer(
        tmp_path / "run", model=str(tmp_path / "model"), judge=likes_e, model_init_kwargs='{"dtype": "bfloat16"}'
    )
    assert trainer.model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="model_init_kwargs: expected with a model given by name; got Llama"):
        make_trainer(tmp_path / "other", judge=likes_e, model_init_kwargs={"dtype": "float32"})


def test_the_reference_of_an_adapted_model_is_a_copy_of_it(tmp_path) -> None:
    """As in TRL, the reference of a model that comes with adapters is its copy; with `peft_config` it is the base."""
    from peft import get_peft_model

    def last_kl(trainer) -> float:
        trainer.train()
        return history(trainer, "kl")[0][0]

    adapted = get_peft_model(tiny_model("llama"), lora())
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.5, generator=torch.Generator().manual_seed(0))
    base = copy.deepcopy(adapted).unload()
    assert last_kl(make_trainer(tmp_path / "copy", model=copy.deepcopy(adapted), judge=likes_e)) == pytest.approx(0)
    far = last_kl(make_trainer(tmp_path / "base", model=adapted, ref_model=base, judge=likes_e))
    assert abs(far) > 0.1, "this adapter is far from its base"
    fresh = make_trainer(tmp_path / "fresh", judge=likes_e, peft_config=lora())
    assert fresh.policy_loss.reference is None and last_kl(fresh) == pytest.approx(0, abs=1e-5)


def test_what_was_given_is_found_under_trls_names(tmp_path) -> None:
    reference, function = tiny_model("llama", seed=4), lambda prompts, completions: [0.0] * len(prompts)
    trainer = make_trainer(tmp_path / "one", ref_model=reference, reward_funcs=[function])
    assert trainer.ref_model is reference and trainer.reward_funcs is function
    trainer = make_trainer(tmp_path / "two", reward_funcs=[function, function], peft_config=lora())
    assert trainer.ref_model is None and trainer.reward_funcs == [function, function]
    reward_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    by_name = make_trainer(tmp_path / "three", reward_funcs=str(tmp_path / "model"))
    assert isinstance(by_name.reward_funcs, transformers.LlamaForSequenceClassification)
    assert make_trainer(tmp_path / "four", judge=likes_e).reward_funcs is None
    weights = dict(by_name.ref_model.named_parameters())
    for name, value in by_name.model.named_parameters():
        assert value is not weights[name] and not weights[name].requires_grad
        torch.testing.assert_close(value, weights[name])


@pytest.mark.parametrize("kind", ["none", "dataset", "dataset_dict", "dict", "list"])
def test_evaluation_data_of_every_kind(kind, tmp_path) -> None:
    """`eval_dataset` keeps the given object, as callbacks expect; setting it reads the new one."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(PROMPTS[:3])
    given = {
        "none": None, "dataset": rows, "dataset_dict": datasets.DatasetDict({"a": rows, "b": rows}),
        "dict": {"a": rows, "b": rows}, "list": PROMPTS[:3],
    }[kind]  # fmt: skip
    trainer = make_trainer(tmp_path, judge=likes_e, eval_dataset=given)
    assert trainer.eval_dataset is given
    if kind == "none":
        with pytest.raises(ValueError, match="evaluate: expected an eval_dataset; got none"):
            trainer.evaluate()
        trainer.eval_dataset = rows
    names = ["a_", "b_"] if "dict" in kind else [""]
    metrics = trainer.evaluate()
    assert all(0 <= metrics[f"eval_{name}win_rate_reference"] <= 1 for name in names)


@pytest.mark.parametrize("chat", [False, True], ids=["texts", "messages"])
def test_rows_of_datasets_train(chat, tmp_path) -> None:
    """As in TRL's own tests: a reward model, a reference in another dtype, an extreme learning rate."""
    datasets = pytest.importorskip("datasets")
    prompts = [row["prompt"] for row in PROMPTS]
    rows = [{"prompt": [{"role": "user", "content": text}] if chat else text} for text in prompts]
    trainer = make_trainer(
        tmp_path, ref_model=tiny_model("llama", seed=4).to(torch.bfloat16), reward_funcs=reward_model(), max_steps=3,
        learning_rate=0.9, train_dataset=datasets.Dataset.from_list(rows), processing_class=tiny_tokenizer(chat=True),
    )  # fmt: skip
    trainer.train()
    assert "train_loss" in trainer.state.log_history[-1]
    assert len(history(trainer, "loss")) == 3
    assert all(value.isfinite().all() for value in trainer.model.parameters())


@pytest.mark.parametrize("reference", [None, "other"])
def test_adapters_with_dropout_train(reference, tmp_path, caplog) -> None:
    """Adapters' dropout is removed with a warning; TRL removes it silently (`disable_dropout`)."""
    other = None if reference is None else tiny_model("llama", seed=4)
    trainer = make_trainer(
        tmp_path, ref_model=other, reward_funcs=reward_model(), peft_config=lora(lora_dropout=0.05, bias="none")
    )
    trainer.train()
    assert trainer.ref_model is other and "lora_dropout=0.05 is trained as 0" in caplog.text
    assert "train_loss" in trainer.state.log_history[-1]


@pytest.mark.parametrize("name", ["data_collator", "compute_metrics", "preprocess_logits_for_metrics"])
def test_arguments_that_cannot_be_honoured_are_refused(name, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"NashMDTrainer: {name}: expected None, as .*; got function"):
        make_trainer(tmp_path, judge=likes_e, **{name: lambda *given: given})


def test_wrong_arguments_are_named(tmp_path) -> None:
    with pytest.raises(TypeError, match=r"NashMDTrainer: args: expected the NashMDConfig of .*; got \S*NoneType"):
        NashMDTrainer(tiny_model("llama"), judge=likes_e, train_dataset=PROMPTS, processing_class=tiny_tokenizer())
    other = transformers.TrainingArguments(str(tmp_path), use_cpu=True)
    expected = (
        r"args: expected the NashMDConfig of nlhf_kernels.integrations.trl; got transformers\.\S*TrainingArguments"
    )
    with pytest.raises(TypeError, match=expected):
        NashMDTrainer(tiny_model("llama"), judge=likes_e, args=other, processing_class=tiny_tokenizer())
    with pytest.raises(TypeError, match="reference_model: expected a causal language model; got str"):
        make_trainer(tmp_path, judge=likes_e, ref_model="gpt2")
    with pytest.raises(TypeError, match="NashMDTrainer: train_dataset: expected rows with a length; got generator"):
        make_trainer(tmp_path, judge=likes_e, train_dataset=(row for row in PROMPTS))
    with pytest.raises(TypeError, match="NashMDTrainer: processing_class: expected a tokenizer; got NoneType"):
        make_trainer(tmp_path, judge=likes_e, processing_class=None)


def test_model_cards_take_trls_names(tmp_path) -> None:
    trainer = make_trainer(tmp_path, judge=likes_e)
    trainer.train()
    trainer.create_model_card("mine", "my/prompts", tags=["nash"], license="mit")
    card = (tmp_path / "README.md").read_text()
    assert "# mine" in card and "my/prompts" in card and "- nash" in card and "license: mit" in card


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_what_trls_script_does_with_its_trainer(tmp_path) -> None:
    """TRL's script works: its parser, options set afterwards, its callback that shows answers to evaluation prompts."""
    from datasets import Dataset
    from trl import LogCompletionsCallback, ModelConfig, ScriptArguments, TrlParser

    line = f"--output_dir {tmp_path} --use_cpu --bf16 false --mixture_coef 0.3 --max_steps 2 --max_new_tokens 6"
    parser = TrlParser((ScriptArguments, NashMDConfig, ModelConfig))
    _, args, _ = parser.parse_args_and_config([*line.split(), "--report_to", "none", "--dataset_name", "x"])
    args.gradient_checkpointing_kwargs = {"use_reentrant": True}
    rows = Dataset.from_list(PROMPTS)
    trainer = NashMDTrainer(
        model=tiny_model("llama"), ref_model=tiny_model("llama", seed=4), reward_funcs=reward_model(), args=args,
        train_dataset=rows, eval_dataset=rows, processing_class=tiny_tokenizer(),
    )  # fmt: skip
    callback = LogCompletionsCallback(trainer, transformers.GenerationConfig(max_new_tokens=3), num_prompts=2, freq=1)
    trainer.add_callback(callback)
    trainer.train()
    assert (
        trainer.mixture_coef == 0.3 and [row[1] for row in callback.table] == [row["prompt"] for row in PROMPTS[:2]] * 2
    )
    trainer.save_model(args.output_dir)
    assert (tmp_path / "model.safetensors").exists()


def test_a_run_goes_on_where_it_was(tmp_path) -> None:
    """A run resumes and evaluates under TRL's names as with NashTrainer."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "eval_steps": 2}
    options |= {"eval_strategy": "steps", "eval_dataset": PROMPTS[:4], "missing_eos_penalty": 1.0}
    options |= {"reward_funcs": lambda prompts, completions: [float(len(text)) for text in completions]}
    whole = make_trainer(tmp_path, **options)
    whole.train()
    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [entry["step"] for entry in resumed.state.log_history if "eval_win_rate_reference" in entry] == [2, 4]
    names = ("loss", "kl", "preference", "learning_rate")
    assert len(history(resumed, *names)) == 4
    torch.testing.assert_close(torch.tensor(history(resumed, *names)), torch.tensor(history(whole, *names)))


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    trainer = make_trainer(tmp_path, judge=likes_e, processing_class=tokenizer, eval_dataset={"some": PROMPTS[:4]})
    trainer.train()
    assert tokenizer.pad_token == tokenizer.eos_token
    assert 0 <= trainer.evaluate()["eval_some_win_rate_reference"] <= 1
