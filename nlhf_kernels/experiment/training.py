"""What all trainings of the experiments share: they print nothing, and their folder is removed afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PrinterCallback, TrainerCallback

from .presets import check_heads


def new_model(tokenizer: Any, preset: Any, positions: int, **options: Any) -> Any:
    """Return a Llama of the preset's size, with random weights.

    Args:
        tokenizer: its vocabulary.
        preset (Preset or CandidatePreset): hidden, layers, heads and seed are read.
        positions (int): tokens of a text, at most.
        options: further ones of LlamaConfig.
    """
    check_heads(preset.hidden, preset.heads)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=preset.hidden,
        intermediate_size=3 * preset.hidden,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        max_position_embeddings=positions,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(preset.seed)
        model: Any = transformers.LlamaForCausalLM(config)
    return model


def silent_options(device: torch.device) -> dict[str, Any]:
    """Return options of TrainingArguments: nothing is saved, printed or reported."""
    return {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": device.type == "cpu"}


def train_silently(trainer: Any) -> None:
    """Train, print no logs, and remove the trainer's folder."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    shutil.rmtree(trainer.args.output_dir, ignore_errors=True)


class AfterStep(TrainerCallback):
    """Calls a function with the number of steps made so far, after each of them."""

    def __init__(self, act: Callable[[int], Any]) -> None:
        self.act = act

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.act(state.global_step)


def save_policy(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save model and tokenizer in one folder, as `from_pretrained` reads them."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
