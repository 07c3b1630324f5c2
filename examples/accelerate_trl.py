"""TRL's own NashMDTrainer, with one line that gives it this library's rollouts and loss.

Needs TRL 1.0 to 1.13, whose online trainers import requests: pip install "trl>=1.0,<1.14" requests

    python examples/accelerate_trl.py --model Qwen/Qwen2.5-0.5B-Instruct --reward-model YOURS --steps 100
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tiny import load_model, load_tokenizer
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

from nlhf_kernels.integrations.trl import accelerate_trl


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a folder or hub name; none: a tiny model of random weights")
    parser.add_argument("--reward-model", help="a sequence classifier; none: a tiny one of random weights")
    parser.add_argument("--output", default="runs/trl", help="the run's folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    return parser.parse_args()


def load_reward_model(name: str | None) -> Any:
    """Load a sequence classifier, as TRL's trainer requires; without a name, make one with random weights."""
    if name is not None:
        return AutoModelForSequenceClassification.from_pretrained(name, num_labels=1)
    config = load_model(None, seed=2).config
    config.num_labels = 1
    return LlamaForSequenceClassification(config)


def main() -> None:
    arguments = parse_arguments()
    acceleration = accelerate_trl()  # first: it reports what is missing if TRL cannot be imported
    from datasets import Dataset
    from trl.experimental.nash_md import NashMDConfig, NashMDTrainer

    prompts = [f"Say it in a word: {text}" for text in ("rain again", "the long road", "blue sea", "a cat")]
    trainer = NashMDTrainer(
        model=load_model(arguments.model),
        ref_model=load_model(arguments.model),
        reward_funcs=load_reward_model(arguments.reward_model),
        args=NashMDConfig(
            arguments.output,
            max_new_tokens=arguments.max_new_tokens,
            per_device_train_batch_size=4,
            max_steps=arguments.steps,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts * 2}),
        processing_class=load_tokenizer(arguments.model),
    )
    trainer.train()
    acceleration.undo()


if __name__ == "__main__":
    main()
