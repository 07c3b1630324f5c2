"""Small training runs: a trainer in one call, and a game of one-token responses with a known equilibrium."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from nlhf_kernels.tabular import random_games
from tests.support.tiny_models import one_thread, tiny_model, tiny_tokenizer

LETTERS = "abcdef"
PROMPTS = [{"prompt": f"{kind} {letter}"} for kind in ("say", "tell me") for letter in "abcdefgh"]
QUIET = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "log_samples": 0}


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    """Use one thread in the test files that import this fixture."""
    with one_thread():
        yield


def likes_e(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    """Return preferences that grow with the first response's share of vowels and fall with the second's."""
    return [0.5 + 0.4 * (_vowels(a) - _vowels(b)) for a, b in zip(first, second, strict=True)]


def _vowels(text: str) -> float:
    return sum(c in "aeiouAEIOU" for c in text) / max(len(text), 1)


def make_trainer(output: Path | str, *, model: Any = None, judge: Any = likes_e, **given: Any) -> Any:
    """Make a NashTrainer on a tiny model; all arguments that are not its own go to NashConfig."""
    from nlhf_kernels.train import NashConfig, NashTrainer

    own = ("reference_model", "eval_dataset", "peft_config", "callbacks", "reward", "eval_opponent", "optimizers")
    arguments = {name: given.pop(name) for name in own if name in given}
    rows, tokenizer = given.pop("train_dataset", PROMPTS), given.pop("tokenizer", None) or tiny_tokenizer()
    kind = given.pop("trainer", NashTrainer)
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "max_new_tokens": 6, "logging_steps": 1, "seed": 5}
    args = NashConfig(str(output), **{**QUIET, **settings, **given})
    model = tiny_model("llama") if model is None else model
    return kind(model, judge=judge, args=args, train_dataset=rows, processing_class=tokenizer,
                **arguments)  # fmt: skip


def history(trainer: Any, *names: str) -> list[tuple[float, ...]]:
    """Return the logged values of every update."""
    return [tuple(entry[name] for name in names) for entry in trainer.state.log_history if "loss" in entry]


class LetterGame:
    """A random preference game over responses of one token: a letter, or the empty text (any special token)."""

    def __init__(self, seed: int = 0) -> None:
        self.texts = [*LETTERS, ""]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.preference = random_games(1, len(self.texts))[0].double()
            self.rewards = torch.rand(len(self.texts), dtype=torch.float64)

    def judge(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> torch.Tensor:
        a, b = (torch.tensor([self.texts.index(text) for text in column]) for column in (first, second))
        return self.preference[a, b]

    def reward(self, prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        return self.rewards[[self.texts.index(text) for text in responses]]

    def tokenizer(self) -> Any:
        from tokenizers import Tokenizer, decoders, models

        words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {letter: 3 + i for i, letter in enumerate(LETTERS)}
        fast = Tokenizer(models.BPE(words, merges=[]))
        fast.decoder = decoders.Fuse()
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=fast, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
        )

    def model(self) -> Any:
        config = transformers.LlamaConfig(
            vocab_size=3 + len(LETTERS), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = transformers.LlamaForCausalLM(config)
            torch.nn.init.normal_(model.lm_head.weight, std=0.3)
        return model

    @torch.no_grad()
    def log_probabilities(self, model: Any) -> torch.Tensor:
        """Return the log-probabilities of the texts in float64."""
        logits = model.eval()(input_ids=torch.tensor([[3]])).logits[0, -1].double().log_softmax(-1)
        return torch.cat([logits[3:], logits[:3].logsumexp(0, keepdim=True)])


def gradients(trainer: Any) -> dict[str, torch.Tensor]:
    """Return the gradients of one update before the optimizer's step; the weights stay unchanged."""
    copies: dict[str, torch.Tensor] = {}

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            copies.update({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.add_callback(Look())
    trainer.train()
    return copies


def counted(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    """Return a wrapped function and the list of its calls' row counts."""
    calls: list[int] = []

    def wrapped(prompts: Sequence[str], *rest: Sequence[str]) -> Any:
        calls.append(len(prompts))
        return function(prompts, *rest)

    return wrapped, calls


def lora(**options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options})


def checkpoints(on: bool) -> dict[str, bool]:
    """Return the option of activation checkpointing under its name in this version of transformers."""
    fields = transformers.TrainingArguments.__dataclass_fields__
    return {"activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing": on}
