"""NashTrainer: every algorithm trains only the policy, and an update equals its mathematical definition."""

from __future__ import annotations

import copy
import math

import pytest
import torch

pytest.importorskip("accelerate", reason="training needs accelerate")

import nlhf_kernels
from nlhf_kernels.core import settings
from nlhf_kernels.train import ALGORITHMS
from nlhf_kernels.train import trainer as trainer_module
from tests.support.attention import cudnn_while_learning
from tests.support.tiny_models import tiny_model, tiny_tokenizer
from tests.support.training import checkpoints, counted, gradients, history, likes_e, lora, make_trainer, single_thread  # noqa: F401

EXTRA = {
    "nash-ema": {"ema_decay": 0.5},
    "nash-mp": {"refresh_steps": 1, "anchor_weight": 0.1},
    "rlhf": {"judge": None, "reward": lambda prompts, answers: [float(len(answer)) for answer in answers]},
}


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_trains(algorithm, adapters, tmp_path) -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.named_parameters()}
    options = {"learning_rate": 1e-2, "tau": 0.1, "peft_config": lora() if adapters else None}
    trainer = make_trainer(tmp_path, model=model, algorithm=algorithm, **options, **EXTRA.get(algorithm, {}))
    trainer.train()
    changes = {name for name, value in model.named_parameters() if name in before and not value.equal(before[name])}
    if adapters:
        assert not changes, "the base is the reference"
        assert any(bool(value.abs().sum() > 0) for name, value in trainer.model.named_parameters() if "lora_B" in name)
    else:
        assert len(changes) == len(before)
    assert len(history(trainer, "loss")) == 3
    for entry in history(trainer, "loss", "grad_norm", "length", "end_rate", "tokens_per_second"):
        assert all(math.isfinite(value) for value in entry) and entry[1] > 0


def test_the_trainer_and_its_configuration_are_public_names() -> None:
    from nlhf_kernels.train import NashConfig, NashTrainer

    assert nlhf_kernels.NashTrainer is NashTrainer
    assert nlhf_kernels.NashConfig is NashConfig
    assert {"NashTrainer", "NashConfig"} <= set(nlhf_kernels.__all__)


@pytest.mark.parametrize("given", [False, True], ids=["its-own", "given"])
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_the_reference_stays_what_it_was(adapters, given, tmp_path) -> None:
    """After training, the reference's log-probabilities are those of the initial policy or of the given model."""
    model = tiny_model("llama")
    original = tiny_model("llama", seed=4) if given else copy.deepcopy(model)
    options = {"learning_rate": 5e-2, "peft_config": lora() if adapters else None}
    reference = copy.deepcopy(original) if given else None
    trainer = make_trainer(tmp_path, model=model, reference_model=reference, **options)
    trainer.train()
    experience = trainer.experiences[0]
    width = experience.targets.shape[1]
    positions = (experience.attention_mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = original(experience.input_ids, attention_mask=experience.attention_mask, position_ids=positions).logits
    logprobs = logits[:, -width - 1 : -1].log_softmax(-1).gather(-1, experience.targets.clamp(min=0)[..., None])[..., 0]
    counts = experience.targets >= 0
    torch.testing.assert_close(experience.reference_logprobs[counts], logprobs[counts], rtol=1e-4, atol=1e-4)
    assert history(trainer, "kl")[-1][0] != 0, "the policy has left it"


@pytest.mark.parametrize("algorithm", ["nash-md", "ipo-md", "rlhf"])
def test_gradient_accumulation_averages(algorithm, tmp_path) -> None:
    """k micro-batches give the gradient of one batch of k times the prompts."""
    options = {"algorithm": algorithm, "max_steps": 1, "samples_per_prompt": 2, "tau": 0.1, **EXTRA.get(algorithm, {})}
    whole = gradients(make_trainer(tmp_path / "1", per_device_train_batch_size=8, **options))
    parts = gradients(
        make_trainer(tmp_path / "2", per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    )
    assert whole.keys() == parts.keys() and whole
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    assert any(bool(gradient.abs().max() > 1e-4) for gradient in whole.values())


def test_the_gradient_is_the_policy_gradient(tmp_path) -> None:
    """The gradient equals autograd's through log-softmax: -log pi(y) (P - 1/2 - tau log(pi / mu)), mean over pairs."""
    tau = 0.2
    options = {"max_steps": 1, "tau": tau, "kl": "sequence", "samples_per_prompt": 2, "max_grad_norm": 0.0}
    trainer = make_trainer(tmp_path, reference_model=tiny_model("llama", seed=4), **options)
    result = gradients(trainer)
    (experience,) = trainer.experiences
    model = tiny_model("llama").train(False)  # the trainer's, before the update
    positions = (experience.attention_mask.cumsum(1) - 1).clamp(min=0)
    logits = model(experience.input_ids, attention_mask=experience.attention_mask, position_ids=positions).logits
    width, counts = experience.targets.shape[1], experience.targets >= 0
    target_logprobs = (
        logits[:, -width - 1 : -1].log_softmax(-1).gather(-1, experience.targets.clamp(min=0)[..., None])[..., 0]
    )
    policy = (target_logprobs * counts).sum(1)
    preference = torch.tensor(likes_e(experience.prompts, *experience.answers))
    price = policy.detach() - (experience.reference_logprobs * counts).sum(1)
    (-(policy * (preference - 0.5 - tau * price)).mean()).backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(
            result[name], value.grad, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "bloom", "gemma2", "gpt_neox"])
def test_architectures_are_scored_as_they_were_sampled(architecture, tmp_path) -> None:
    """With a copy of the policy as reference the first log-ratios are 0, with model dropout too, and a preference
    of 1/2 gives no gradient; positions, soft caps and padding are covered."""
    model = tiny_model(architecture)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
        for name in ("dropout", "attention_dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.3)
    for checkpointing in (False, True):
        trainer = make_trainer(
            tmp_path / str(checkpointing), model=copy.deepcopy(model), judge=lambda x, a, b: [0.5] * len(x), tau=10.0,
            kl="sequence", max_steps=1, **checkpoints(checkpointing),
        )  # fmt: skip
        result = gradients(trainer)
        assert max(float(gradient.abs().max()) for gradient in result.values()) < 1e-2
        assert any(getattr(m, "gradient_checkpointing", False) for m in trainer.model.modules()) == checkpointing


def test_gradient_checkpointing_changes_nothing(tmp_path) -> None:
    with cudnn_while_learning() as allowed:
        plain, recomputed = (
            gradients(make_trainer(tmp_path / str(on), **checkpoints(on), max_steps=1)) for on in (False, True)
        )
    assert allowed == {False}, "recomputed activations choose their kernels anew: cuDNN's gradients may be NaN"
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_bfloat16_stays_near_float32(adapters, tmp_path) -> None:
    def first(bf16: bool) -> torch.Tensor:
        options = {"bf16": bf16, "max_steps": 2, "tau": 0.1, "samples_per_prompt": 8, "kl": "exact"}
        trainer = make_trainer(tmp_path / str(bf16), peft_config=lora() if adapters else None, **options)
        trainer.train()
        assert all(value.dtype == torch.float32 for value in trainer.model.parameters()), "weights stay exact"
        assert trainer.rollout_policy.dtype == (torch.bfloat16 if bf16 else torch.float32)
        return torch.tensor(history(trainer, "entropy", "length"))

    exact, rough = first(False), first(True)
    assert bool(((exact - rough).abs() < torch.tensor([0.3, 0.8])).all())


@pytest.mark.parametrize("name", ["beta", "tau"])
def test_schedules_by_epoch_and_by_step(name, tmp_path) -> None:
    """With 16 prompts and 4 per update, a schedule's epoch changes every 4 updates."""
    by_epoch = make_trainer(tmp_path / "epoch", **{name: [0.5, 0.25]}, max_steps=6)
    by_epoch.train()
    assert [row[0] for row in history(by_epoch, name)] == [0.5] * 4 + [0.25] * 2
    by_step = make_trainer(tmp_path / "step", **{name: {0: 0.5, "2": 0.125}}, max_steps=3)
    by_step.train()
    assert [row[0] for row in history(by_step, name)] == [0.5, 0.5, 0.125]
    function = make_trainer(tmp_path / "function", **{name: math.exp2}, max_steps=1)
    function.args.max_steps = 1
    function.train()
    assert history(function, name) == [(1.0,)]


def test_conversations_take_the_chat_template(tmp_path) -> None:
    """The judge receives the prompt as the policy does, and answers without special tokens."""
    records = []

    def judge(prompts, first, second):
        records.append((prompts, first))
        return [0.5] * len(prompts)

    rows = [{"prompt": [{"role": "user", "content": f"say {letter}"}]} for letter in "abcd"]
    trainer = make_trainer(tmp_path, judge=judge, train_dataset=rows, tokenizer=tiny_tokenizer(chat=True), max_steps=1)
    trainer.train()
    assert [prompt.text for prompt in trainer.train_dataset] == [f"<bos>[say {letter}]" for letter in "abcd"]
    assert all(prompt.ids[0] == 1 and prompt.ids.count(1) == 1 for prompt in trainer.train_dataset)
    ((prompts, answers),) = records
    assert sorted(prompts) == [f"<bos>[say {letter}]" for letter in "abcd"]
    assert not any(token in answer for answer in answers for token in ("<pad>", "<eos>"))


def test_dropout_of_adapters_is_taken_off_aloud(tmp_path, caplog) -> None:
    """Adapters' dropout is removed with a warning; the caller's configuration is unchanged."""
    from peft import LoHaConfig

    config = lora(lora_dropout=0.5)
    runs = [make_trainer(tmp_path / str(i), peft_config=each) for i, each in enumerate((config, lora()))]
    for trainer in runs:
        trainer.train()
    assert history(runs[0], "loss", "kl") == history(runs[1], "loss", "kl")
    assert caplog.text.count("NashTrainer: peft_config: lora_dropout=0.5 is trained as 0") == 1
    assert config.lora_dropout == 0.5 and runs[0].model.peft_config["default"].lora_dropout == 0.0
    loha = LoHaConfig(r=2, target_modules=["q_proj"], rank_dropout=0.25, task_type="CAUSAL_LM")
    assert make_trainer(tmp_path / "loha", peft_config=loha).model.peft_config["default"].rank_dropout == 0.0
    assert "rank_dropout=0.25 is trained as 0" in caplog.text


def test_the_backend_is_that_of_every_kernel(tmp_path, monkeypatch) -> None:
    """The configured backend reaches all kernels, and the rollouts' attention, which has no argument for it."""
    records = []
    inside = trainer_module.RolloutEngine.rollout
    monkeypatch.setattr(
        trainer_module.RolloutEngine, "rollout",
        lambda engine, *a: records.append(settings.requested(None).backend) or inside(engine, *a),
    )  # fmt: skip
    make_trainer(tmp_path / "1", backend="torch", max_steps=1).train()
    make_trainer(tmp_path / "2", max_steps=1).train()
    assert records == ["torch", settings.requested(None).backend]
    with pytest.raises(nlhf_kernels.BackendUnavailable, match="cuda"):
        make_trainer(tmp_path / "3", backend="cuda", max_steps=1).train()


def test_rollouts_are_compiled_where_that_is_asked_for(tmp_path, monkeypatch) -> None:
    requests = []
    engine = trainer_module.RolloutEngine
    monkeypatch.setattr(
        trainer_module, "RolloutEngine", lambda *a, compile, **k: requests.append(compile) or engine(*a, **k)
    )
    for on in (False, True, "auto"):
        make_trainer(tmp_path / str(on), compile_rollouts=on, eval_opponent=tiny_model("llama", seed=2))
    assert requests == [False, False, True, True, "auto", "auto"]
    with pytest.raises(ValueError, match="compile_rollouts: expected true, false or auto; got 'yes'"):
        make_trainer(tmp_path / "yes", compile_rollouts="yes")


def test_the_engine_is_told_how_many_rollouts_are_to_come(tmp_path, monkeypatch) -> None:
    expected, inside = [], trainer_module.RolloutEngine.rollout
    monkeypatch.setattr(
        trainer_module.RolloutEngine,
        "rollout",
        lambda engine, *a, **k: expected.append(engine.rollouts_to_come) or inside(engine, *a, **k),
    )
    make_trainer(tmp_path, gradient_accumulation_steps=2, max_steps=3).train()
    assert expected == [6, 6, 4, 4, 2, 2]


def test_an_end_token_of_the_model_alone_ends_answers(tmp_path) -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [2, 50, 51]
    trainer = make_trainer(tmp_path, model=model, max_new_tokens=40, samples_per_prompt=8, max_steps=1)
    trainer.train()
    (experience,) = trainer.experiences
    last = [row[row >= 0][-1].item() for row in experience.targets]
    assert {50, 51} & set(last) and trainer.collector.settings.end_ids == (2, 50, 51)
    assert all(not set(row[row >= 0][:-1].tolist()) & {2, 50, 51} for row in experience.targets)


def test_the_judge_is_asked_once_an_update(tmp_path) -> None:
    judge, calls = counted(likes_e)
    make_trainer(tmp_path, judge=judge, gradient_accumulation_steps=2, max_steps=2, samples_per_prompt=3).train()
    assert calls == [2 * 4 * 3] * 2
