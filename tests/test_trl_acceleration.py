"""accelerate_trl: the TRL versions that it accepts; with one installed, training by these rollouts and losses."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
import types
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("accelerate", reason="training needs accelerate")

import transformers

from nlhf_kernels.integrations.trl import accelerate_trl
from tests.support.attention import cudnn_while_learning
from tests.support.tiny_models import tiny_model, tiny_tokenizer
from tests.support.training import PROMPTS, lora, single_thread  # noqa: F401
from tests.support.trl import ARGUMENTS, OPTIONS, default, trl_trainer

installed = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
MISSING = r"accelerate_trl: TRL 1\.\S+ imports requests for .* does not bring it: pip install requests"


def fake_trl(monkeypatch, version: str) -> type:
    """Install a fake TRL with the methods that are checked before anything is changed."""

    class NashMDTrainer:
        def _generate_completions(self, model, prompts): ...

        def _compute_logprobs(self, model, model_data, context_length): ...

        def _compute_losses(self, model_logprobs_model_data, ref_logprobs_model_data, probability): ...

        def training_step(self, model, inputs, num_items_in_batch=None): ...

    for name in ("trl", "trl.experimental", "trl.experimental.nash_md"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["trl"].__version__ = version
    sys.modules["trl.experimental.nash_md"].NashMDTrainer = NashMDTrainer
    return NashMDTrainer


@pytest.mark.parametrize("version", ["0.29.1", "1.14.0", "1.16.0", "2.0", "unknown"])
def test_other_versions_are_refused(version, monkeypatch) -> None:
    trainer = fake_trl(monkeypatch, version)
    before = dict(vars(trainer))
    with pytest.raises(RuntimeError, match=f"accelerate_trl: expected TRL 1.0 to 1.13; found {version} "):
        accelerate_trl()
    assert dict(vars(trainer)) == before


def test_no_trl_is_refused(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match="accelerate_trl: expected TRL 1.0 to 1.13; found none: pip install"):
        accelerate_trl()


def test_a_trl_that_has_been_changed_is_refused(monkeypatch) -> None:
    trainer = fake_trl(monkeypatch, "1.13.0")
    trainer._compute_losses = lambda self, logprobs: logprobs
    with pytest.raises(RuntimeError, match=r"found 1.13.0 whose NashMDTrainer._compute_losses takes self, logprobs"):
        accelerate_trl()
    assert "beta" not in vars(trainer)


@pytest.mark.parametrize("version", ["1.0.0", "1.6.0", "1.13.0", "1.13.1.dev0"])
def test_what_is_changed_is_changed_back(version, monkeypatch) -> None:
    trainer = fake_trl(monkeypatch, version)
    before = dict(vars(trainer))
    with accelerate_trl() as acceleration:
        changed = {name for name, value in vars(trainer).items() if before.get(name) is not value}
        assert {"_generate_completions", "_compute_logprobs", "_compute_losses", "beta", "mixture_coef"} < changed
    assert dict(vars(trainer)) == before
    acceleration.undo()
    assert dict(vars(trainer)) == before, "a second time changes nothing"
    with pytest.raises(ValueError, match="accelerate_trl: kl: expected one of to_go, sequence, token; got 'exact'"):
        accelerate_trl(kl="exact")


def test_twice_is_once(monkeypatch) -> None:
    trainer = fake_trl(monkeypatch, "1.13.0")
    before = dict(vars(trainer))
    with accelerate_trl(kl="sequence") as acceleration:
        changed = dict(vars(trainer))
        with accelerate_trl(kl="sequence") as again:
            assert again is acceleration and dict(vars(trainer)) == changed
        assert dict(vars(trainer)) == changed, "the inner block has not undone the outer one's"
        with pytest.raises(ValueError, match="accelerate_trl: kl: expected 'sequence', as .* already .*; got 'to_go'"):
            accelerate_trl()
        with pytest.raises(ValueError, match="accelerate_trl: backend: expected None, as .*; got 'torch'"):
            accelerate_trl(kl="sequence", backend="torch")
    assert dict(vars(trainer)) == before
    assert accelerate_trl() is accelerate_trl() is not acceleration
    accelerate_trl().undo()
    assert dict(vars(trainer)) == before, "one undo() for any number of calls"


class Absent(importlib.abc.MetaPathFinder):
    """A finder for which a package is not installed."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture
def no_imports_yet(monkeypatch) -> Iterator[None]:
    """Remove TRL and its dependencies from sys.modules, so that they are imported anew; restore them afterwards."""
    modules = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in ("trl", "requests")}
    for name in modules:
        del sys.modules[name]
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("trl", "requests")]:
        del sys.modules[name]
    sys.modules.update(modules)


def test_a_package_that_trl_needs_is_named(tmp_path, monkeypatch, no_imports_yet) -> None:
    package = tmp_path / "trl" / "experimental"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text('__version__ = "1.13.0"')
    (package / "__init__.py").write_text("")
    (package / "nash_md.py").write_text("import requests.adapters")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [Absent("requests"), *sys.meta_path])
    with pytest.raises(ImportError, match=MISSING):
        accelerate_trl()
    (package / "nash_md.py").write_text("from trl.experimental import something")
    with pytest.raises(ImportError, match="cannot import name 'something'"):
        accelerate_trl()


# ---- with a TRL ------------------------------------------------------------------------------------------------------


def gradients(trainer) -> dict[str, torch.Tensor]:
    copies: dict[str, torch.Tensor] = {}

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__) -> None:
            copies.update({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.add_callback(Look())
    trainer.train()
    return copies


def row_logprobs(model, data) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log p (B, T) of the answers by one forward pass with positions, and the mask of tokens that count."""
    width = data["attention_mask"].shape[1] - 1
    positions = (data["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = model(data["input_ids"], attention_mask=data["attention_mask"], position_ids=positions).logits
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, data["input_ids"][:, 1:, None])[..., 0]
    answers = torch.arange(width)[None] >= width - data["answer"]
    return logprobs, answers & (data["attention_mask"][:, 1:] > 0)


@torch.no_grad()
def likeliest(model, data, width: int) -> float:
    """Return the share of the answers' tokens that are this model's likeliest."""
    ids, mask = data["input_ids"], data["attention_mask"]
    logits = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    same = (logits[:, :-1].argmax(-1) == ids[:, 1:])[:, -width:]
    return float(same[mask[:, -width:] > 0].float().mean())


@installed
def test_requests_is_named_where_it_is_missing(monkeypatch, no_imports_yet) -> None:
    monkeypatch.setattr(sys, "meta_path", [Absent("requests"), *sys.meta_path])
    with pytest.raises(ImportError, match=MISSING):
        accelerate_trl()


@installed
def test_the_options_listed_are_those_of_trl() -> None:
    import dataclasses
    import inspect

    from trl.experimental.nash_md import NashMDConfig, NashMDTrainer

    plain = {entry.name: default(entry) for entry in dataclasses.fields(transformers.TrainingArguments)}
    theirs = {entry.name: default(entry) for entry in dataclasses.fields(NashMDConfig)}
    changed = {name for name in theirs if name not in plain or theirs[name] != plain[name]}
    assert {name: theirs[name] for name in changed | set(OPTIONS)} == OPTIONS
    assert tuple(inspect.signature(NashMDTrainer.__init__).parameters)[1:] == ARGUMENTS


@installed
@pytest.mark.parametrize("kl", ["sequence", "token"])
def test_the_gradient_is_that_of_the_loss(kl, tmp_path) -> None:
    """The gradient equals autograd's through log-softmax with position ids, on left-padded prompts (GPT-2)."""
    reference = tiny_model("gpt2", seed=4)
    with accelerate_trl(kl=kl):
        trainer = trl_trainer(tmp_path, ref_model=reference, beta=0.3, per_device_train_batch_size=8)
        result = gradients(trainer)
    ((data, _, logged, _, probability),) = trainer.seen
    data = {**data, "answer": logged.shape[1]}
    model = tiny_model("gpt2")
    policy, counts = row_logprobs(model, data)
    with torch.no_grad():
        price = (policy - row_logprobs(reference, data)[0]) * counts
    price = price.sum(1, keepdim=True) if kl == "sequence" else price
    advantage = (probability - 0.5)[:, None] - 0.3 * price
    (-(policy * counts * advantage).sum(1).mean()).backward()
    assert len({len(row["prompt"]) for row in PROMPTS}) > 1, "some prompts are padded"
    for name, value in model.named_parameters():
        torch.testing.assert_close(
            result[name], value.grad, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    torch.testing.assert_close(logged.sum(1), (policy * counts).sum(1), rtol=1e-4, atol=1e-4)


@installed
def test_gradient_accumulation_averages(tmp_path) -> None:
    """With top_k=1, free of noise, accumulation averages; TRL sums: its gradient of two is twice that of one."""

    def found(name, count):
        trainer = trl_trainer(
            tmp_path / name, model=tiny_model("llama"), ref_model=tiny_model("llama", seed=4), top_k=1,
            rows=PROMPTS[:4], train_sampling_strategy="sequential",
            per_device_train_batch_size=4 // count, gradient_accumulation_steps=count,
        )  # fmt: skip
        values = gradients(trainer)
        (loss,) = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        return values, loss

    with accelerate_trl(kl="token"):
        (whole, loss), (parts, parts_loss) = found("whole", 1), found("parts", 2)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-5)
    assert parts_loss == pytest.approx(loss, abs=2e-4)
    theirs, _ = found("theirs", 2)
    largest = max(whole, key=lambda name: float(whole[name].abs().max()))
    torch.testing.assert_close(theirs[largest], 2 * whole[largest], rtol=1e-2, atol=1e-3)


@installed
@pytest.mark.parametrize("given", [{"bf16": True}, {"gradient_checkpointing": False}, {"peft": True}], ids=str)
def test_trainers_of_every_kind_train(given, tmp_path) -> None:
    adapters = {"peft_config": lora(), "learning_rate": 1e-2} if given.pop("peft", False) else {}
    with accelerate_trl(), cudnn_while_learning() as allowed:
        trainer = trl_trainer(
            tmp_path,
            model=tiny_model("llama"),
            max_steps=6,
            mixture_coef=[0.5, 0.25],
            beta=[0.1, 0.2],
            **adapters,
            **given,
        )
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [(entry["beta"], entry["mixture_coef"]) for entry in logs] == [(0.1, 0.5)] * 4 + [(0.2, 0.25)] * 2
    assert logs[0]["loss/kl"] == pytest.approx(0, abs=1e-4 if not given.get("bf16") else 0.5), "its own copy, or base"
    assert all(entry["grad_norm"] > 0 for entry in logs)
    assert allowed == {False}, "cuDNN's gradients may be NaN"


@installed
@pytest.mark.parametrize("kind", ["texts", "messages", "peft", "adapted"])
def test_what_trls_own_tests_train(kind, tmp_path) -> None:
    """References in another dtype, conversations, and models with adapters are trained; TRL removes dropout."""
    from peft import get_peft_model

    adapters, reference = lora(lora_dropout=0.1), tiny_model("llama", seed=4).to(torch.bfloat16)
    given = {
        "texts": {"ref_model": reference, "learning_rate": 0.9},
        "messages": {
            "rows": [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in PROMPTS],
            "processing_class": tiny_tokenizer(chat=True), "ref_model": reference, "learning_rate": 0.9,
        },
        "peft": {"peft_config": adapters, "ref_model": reference},
        "adapted": {"model": get_peft_model(tiny_model("llama"), adapters)},
    }[kind]  # fmt: skip
    with accelerate_trl():
        trainer = trl_trainer(tmp_path, max_steps=3, max_grad_norm=1.0, **{"model": tiny_model("llama"), **given})
        trainer.train()
    assert "train_loss" in trainer.state.log_history[-1]
    assert all(value.isfinite().all() for value in trainer.model.parameters())


@installed
def test_with_adapters_the_mixture_holds_the_base(tmp_path) -> None:
    """With mixture_coef = 1 and top_k = 1 the second answer is the base's likeliest one, however large the adapter."""
    with accelerate_trl():
        trainer = trl_trainer(tmp_path, model=tiny_model("llama"), peft_config=lora(), mixture_coef=1.0, top_k=1)
        for name, value in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.5)
        trainer.train()
    ((first, second, *_),) = trainer.seen
    assert likeliest(tiny_model("llama"), second, 6) == 1.0
    assert likeliest(tiny_model("llama"), first, 6) < 0.8
    assert trainer.state.log_history[0]["loss/kl"] > 0.1, "the policy has its adapter, the reference has not"


@installed
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"repetition_penalty": 1.2}, "repetition_penalty: expected plain sampling; got 1.2"),
        ({"generation_kwargs": {"num_beams": 2}}, "generation_kwargs: expected .*; got 'num_beams'"),
        ({"cache_implementation": "static"}, "cache_implementation: expected its default; got 'static'"),
        ({"disable_dropout": False}, "model: expected no dropout, .*; got transformer.drop.p = 0.1"),
    ],
)
def test_what_cannot_be_honoured_is_refused(given, message, tmp_path) -> None:
    with accelerate_trl(), pytest.raises(ValueError, match=f"accelerate_trl: {message}"):
        trl_trainer(tmp_path, **given).train()
