"""Generated packages: sources with enough docstrings for a tiny experiment."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

VERBS = ("Return", "Compute", "Remove", "Store", "Count", "Find", "Parse", "Split", "Merge", "Draw")
THINGS = ("the names of all users", "the lines of a file", "every open window", "the words of a text",
          "two sorted lists", "the colour of a pixel", "a table of numbers", "the size of the queue")  # fmt: skip
BODIES = ("Values that are not known are left out, and the order of the others stays as it was before.",
          "This is done in one pass, so a generator may be given; nothing is kept after the call has ended.",
          "An error is raised where the argument is empty, because nothing can be said of it then.")  # fmt: skip


def fake_packages(folder: Path, modules: int = 20, functions: int = 8) -> Path:
    """Write modules whose functions have distinct docstrings of a first line and a body."""
    generator = random.Random(0)
    pairs = [(verb, thing) for verb in VERBS for thing in THINGS]
    generator.shuffle(pairs)
    for module in range(modules):
        lines = ['"""A module."""', ""]
        for function in range(functions):
            number = module * functions + function
            verb, thing = pairs[number % len(pairs)]
            name = _letters(number)
            lines += [f"def f{number}():", f'    """{verb} {thing} of {name}.', "",
                      f"    For {name}: {BODIES[number % len(BODIES)]}", '    """', ""]  # fmt: skip
        place = folder / f"package{module % 3}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"module{module}.py").write_text("\n".join(lines))
    return folder


def _letters(number: int) -> str:
    """Return a distinct word for every number."""
    return "".join("bdfgklmnrt"[int(digit)] + "aeiou"[int(digit) % 5] for digit in f"{number:03d}")


def numbers(*, seeds: int = 3, prompts: int = 128, cycles: bool = True) -> dict[str, Any]:
    """Make results in the pipeline's format with made-up numbers, for tests of the report."""
    names = ["sft", "rlhf", "nash-md-0", "nash-md-0.25", "nash-md-1"]
    labels = ["SFT", "RLHF", "Nash-MD 0", "Nash-MD 0.25", "Nash-MD 1"]
    size = {"prompts": prompts, "seeds": seeds}
    cell = lambda i, j: None if i == j else {"mean": 0.5 + 0.04 * (i - j), "half": 0.03, **size}  # noqa: E731
    estimate = lambda mean: {"mean": mean, "half": 0.02, **size}  # noqa: E731
    judge = {
        "frontiers": {name: [{"kl": estimate(0.9 * n), "rate": estimate(0.5 + 0.05 * n)} for n in range(3)]
                      for name in names[1:]},
        "matrix": [[cell(i, j) for j in range(5)] for i in range(5)],
        "by_beta": [{"beta": b, "against": "RLHF", "mean": 0.5 + b / 10, "half": 0.05, **size}
                    for b in (0.0, 0.25, 1.0)],
        "cycles": [["SFT", "RLHF", "Nash-MD 1"]] if cycles else [],
        "claims": [{"claim": "the earth is round", "verdict": "contradicted", "best": "Nash-MD 0.25", "compared": 1,
                    "kl": 1.5, "matches": [{"first": "Nash-MD 0.25", "second": "RLHF", **cell(3, 1)}]}],
    }  # fmt: skip
    test = {"count": 10, "accuracy": 0.7, "log_loss": 0.6, "calibration_error": 0.05, "bins": []}
    cyclic = {"triples": 40, "cyclic": 2, "prompts": 8, "cyclic_prompts": [1, 3], "share": 0.05, "responses": 5}
    history = [{"step": s, "kl": 0.1 * s, "length": 9.0, "eval_win_rate_reference": 0.5 + 0.01 * s} for s in (1, 2)]
    update = {"kernels_ms": 10.0, "torch_ms": 25.0, "speedup": 2.5}
    return {
        "preset": {"seeds": seeds, "updates": 2, "prompts_per_update": 4, "samples_per_prompt": 1,
                   "judge": "preference-model", "contestants": names[1:], "taus": [0.3, 0.1]},
        "material": {"data": None, "split": None, "model": None},
        "machine": {"device": "cpu: x", "cores": 2, "threads": 1, "torch": "2", "transformers": "5"},
        "corpus": {"train": 100, "test": 8, "vocabulary": 300},
        "sft": {"losses": [3.0, 2.0], "test_loss": 2.5, "parameters": 12345},
        "annotators": {"scales": [1, 1, 1], "train": {"ceiling": 0.8}, "test": {"ceiling": 0.81}},
        "preference_model": {"losses": [0.7], "test": test},
        "reward_model": {"losses": [0.7], "test": test},
        "cycles": {"preference-model": cyclic, "annotators": cyclic},
        "histories": {f"{name} {index} {seed}": [{**entry, "kl": entry["kl"] * (1 + index)} for entry in history]
                      for name in names[1:] for index in range(2) for seed in range(seeds)},
        "tournament": {"names": names, "labels": labels, "prompts": prompts, "answers": 1,
                       "budget": 2.0, "kl": 1.5, "nearest": {name: int(name == "rlhf") for name in names[1:]},
                       "policies": [{"contestant": name, "tau": None if name == "sft" else 0.25, "length": 9.0,
                                     "end_rate": 1.0, "runs": 1, "kl": 0.5, "kl_error": 0.1} for name in names],
                       "samples": [{"prompt": "<script>alert(1)</script>", "truth": "x",
                                    "answers": dict.fromkeys(names, "<b>y</b>"),
                                    "chances": {name: [0.5, 0.125, 0.75, 0.875, 0.625]
                                                for name in ("preference-model", "annotators")}}],
                       "judges": {"preference-model": judge, "annotators": judge}},
        "speed": {"algorithm": "nash-md-0.25", "update": update, "updates_timed": 4, "threads": 1, "device": "cpu",
                  "operations": [{"name": "mixture_sample", "size": "4 rows", "backend": "cpu", **update}]},
        "exploitability": {"nash-md-0.25": {"start": "reference", "kl": 2.0, "opponent_kl": 1.0, **cell(3, 1)}},
        "seconds": {"corpus": 1.0, "sft": 2.0},
    }  # fmt: skip
