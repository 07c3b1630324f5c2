"""The supervised policy: a causal language model trained on the examples, start and reference of all contestants.

A model that starts from random weights learns from the prompts' tokens too, as it has the language to learn; a
pretrained one learns from the answers alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from ..core.loading import load_model
from ..core.terminal import Reporter
from ..core.upstream import finite_attention_gradients
from ..data import encode, encode_prompts
from ..ops.logprobs.layout import IGNORED
from .corpus import Corpus, Example, Material
from .presets import Preset
from .training import AfterStep, new_model, save_policy, silent_options, train_silently
from .workspace import write_json


def encode_examples(
    tokenizer: Any, examples: Sequence[Example], preset: Preset, whole: bool
) -> list[dict[str, list[int]]]:
    """Return token ids and labels of each example; with `whole` the prompt's tokens are labels too."""
    prompts = encode_prompts(tokenizer, [row.prompt for row in examples], preset.prompt_tokens)
    answers = encode(tokenizer, [row.answer for row in examples])
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        response = [*answer[: preset.answer_tokens - 1], tokenizer.eos_token_id]
        prompt_labels = prompt if whole else [IGNORED] * len(prompt)
        rows.append({"input_ids": prompt + response, "labels": prompt_labels + response})
    return rows


class Padding:
    """A data collator: rows into a batch, padded on the right."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        padding = [longest - len(row["input_ids"]) for row in rows]
        columns = {
            "input_ids": [row["input_ids"] + [self.pad_id] * n for row, n in zip(rows, padding, strict=True)],
            "labels": [row["labels"] + [IGNORED] * n for row, n in zip(rows, padding, strict=True)],
            "attention_mask": [[1] * (longest - n) + [0] * n for n in padding],
        }
        return {name: torch.tensor(values, dtype=torch.int64, device="cpu") for name, values in columns.items()}


def make_policy(
    work: Path, corpus: Corpus, preset: Preset, material: Material, device: torch.device, reporter: Reporter
) -> None:
    """Train the policy, measure it on the test examples, save model and tokenizer in one folder."""
    if material.model is None:
        model = new_model(corpus.tokenizer, preset, preset.positions)
    else:
        model = load_model("experiment: --model", material.model, merge=True, dtype=torch.float32)
    rows = encode_examples(corpus.tokenizer, corpus.train, preset, whole=material.model is None)
    losses = train(model, rows, corpus.tokenizer.pad_token_id, preset, device, work / "trainer", reporter)
    model = model.to(device).eval()
    test = encode_examples(corpus.tokenizer, corpus.test[: 4 * preset.test_prompts], preset, whole=False)
    held_out = answer_loss(model, test, corpus.tokenizer.pad_token_id, preset.batch)
    reporter.say(
        f"  {held_out:.3f} nats per token of the test answers (guessing: {math.log(len(corpus.tokenizer)):.3f})"
    )
    save_policy(model, corpus.tokenizer, work / "model")
    parameters = sum(value.numel() for value in model.parameters())
    write_json(work / "measures.json", {"losses": losses, "test_loss": held_out, "parameters": parameters})


def train(
    model: Any,
    rows: Sequence[dict[str, list[int]]],
    pad_id: int,
    preset: Preset,
    device: torch.device,
    output: Path,
    reporter: Reporter,
) -> list[float]:
    """Train for `preset.sft_steps` with transformers' Trainer; returns the losses, one per step."""
    if not preset.sft_steps:
        return []
    arguments = transformers.TrainingArguments(
        str(output),
        max_steps=preset.sft_steps,
        per_device_train_batch_size=preset.sft_batch,
        learning_rate=preset.sft_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, preset.sft_steps // 20),
        adam_beta2=0.98,
        bf16=preset.bfloat16,
        seed=preset.seed,
        logging_steps=1,
        remove_unused_columns=False,
        **silent_options(device),
    )
    with reporter.bar("supervised training", preset.sft_steps) as advance:
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=list(rows),
            data_collator=Padding(pad_id),
            callbacks=[AfterStep(advance)],
        )
        with finite_attention_gradients():
            train_silently(trainer)
    return [round(float(entry["loss"]), 4) for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def answer_loss(model: Any, rows: Sequence[dict[str, list[int]]], pad_id: int, batch: int) -> float:
    """Return the loss of the answers in nats per token, the end token included."""
    padding, total, count = Padding(pad_id), 0.0, 0
    for start in range(0, len(rows), batch):
        columns = {name: value.to(model.device) for name, value in padding(rows[start : start + batch]).items()}
        labels = columns.pop("labels")[:, 1:]
        logits = model(**columns, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="sum"
        )
        total, count = total + float(losses), count + int((labels != IGNORED).sum())
    return total / count


@dataclass(frozen=True)
class Setting:
    """The shared inputs of all stages after the supervised policy."""

    corpus: Corpus
    policy: Path  # folder of the supervised policy
    preset: Preset
    device: torch.device
    reporter: Reporter

    def fresh_policy(self) -> Any:
        """Return a copy of the supervised policy, on the device."""
        return self.load_policy(self.policy)

    def load_policy(self, folder: Path) -> Any:
        """Return a policy, on the device.

        Args:
            folder (Path): where it was saved.
        """
        return load_model("experiment: policy", folder, device=self.device, dtype=torch.float32)
