"""Train a preference model on human votes on summaries, then a Nash-MD policy against that model.

The defaults, a tiny model and a handful of pairs, run in seconds as a demonstration only. A real run:

    python examples/train_tldr.py --model Qwen/Qwen2.5-0.5B --pairs trl-lib/tldr-preference --output runs/tldr \\
        --judge-steps 2000 --steps 1000 --batch-size 16 --max-new-tokens 64 --learning-rate 1e-6
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tiny import load_model, load_tokenizer

from nlhf_kernels import NashConfig, NashTrainer
from nlhf_kernels.data import load_pairs, split_by_prompt
from nlhf_kernels.preference import (
    PairwisePreferenceModel,
    PreferenceModelJudge,
    PreferenceTraining,
    evaluate,
    save_preference_model,
    train_preference_model,
)

POST = "SUBREDDIT: r/{place}\nPOST: {story}\nTL;DR:"
PAIRS = [  # what `--pairs` names in a real run: rows with prompt, chosen, rejected
    {"prompt": POST.format(place=place, story=story), "chosen": f" {short}", "rejected": f" {story} {story}"}
    for place, story, short in (
        ("pets", "My cat sleeps all day and runs about all night.", "Cat is awake at night."),
        ("travel", "I missed the train and the next one was full.", "Missed one train, next was full."),
        ("cooking", "I salted the soup twice and my guests were polite.", "Salted soup twice."),
        ("running", "My knee hurts when I run downhill, not uphill.", "Knee hurts downhill."),
    )
    for place, story, short in [(place, f"{story} ({number})", short) for number in range(6)]
]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a folder or hub name; none: a tiny model of random weights")
    parser.add_argument("--pairs", help="a file, folder or hub name of human pairs; none: a few, made here")
    parser.add_argument("--output", default="runs/example", help="the run's folder (default: %(default)s)")
    parser.add_argument("--judge-steps", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    output = Path(arguments.output)
    if output.exists():
        raise SystemExit(f"train_tldr: --output: expected a folder that is not there yet; got {output}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(arguments.model)
    train, test = split_by_prompt(load_pairs(arguments.pairs or PAIRS, tokenizer), fraction=0.25, seed=0)

    # 1. Learn P(y > y' | x) from the votes; evaluate it on held-out prompts.
    preference = PairwisePreferenceModel(load_model(arguments.model, seed=1), tokenizer).to(device)
    settings = PreferenceTraining(steps=arguments.judge_steps, batch_size=8, learning_rate=arguments.learning_rate)
    train_preference_model(preference, train, settings)
    judge = PreferenceModelJudge(preference)
    quality = evaluate(judge, test)
    print(f"preference model: accuracy {quality.accuracy:.2f}, log loss {quality.log_loss:.3f} (0.693 knows nothing)")
    save_preference_model(preference, output / "judge")

    # 2. Train the policy against its geometric mixture with the reference, which is the initial policy.
    args = NashConfig(
        str(output / "nash-md"),
        algorithm="nash-md",
        beta=0.125,
        tau=0.01,
        max_new_tokens=arguments.max_new_tokens,
        missing_eos_penalty=0.1,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        max_steps=arguments.steps,
        logging_steps=max(1, arguments.steps // 20),
        bf16=device == "cuda",
    )
    trainer = NashTrainer(
        load_model(arguments.model),
        judge=judge,
        args=args,
        train_dataset=[{"prompt": pair.prompt} for pair in train],
        eval_dataset=[{"prompt": pair.prompt} for pair in test],
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(output / "policy"))
    measures = trainer.evaluate()
    rate, kl = measures["eval_win_rate_reference"], measures["eval_kl"]
    print(f"preferred to the reference: {rate:.2f}, at {kl:.2f} nats an answer; saved in {output / 'policy'}")


if __name__ == "__main__":
    main()
