"""Training of the reference policy, the two models of the human pairs, contestants and best responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...core.loading import load_model, load_tokenizer
from ...core.terminal import Reporter
from ...data import Pair
from ...preference import PreferenceTraining, save_preference_model, train_preference_model
from ...preference.models import KINDS, ComparisonModel
from ...train import NashConfig, NashTrainer
from ..training import AfterStep, new_model, save_policy, silent_options, train_silently
from ..workspace import write_json
from .judges import OnlineReward, TableJudge, TableReward, Votes
from .presets import CONTESTANTS, CandidatePreset
from .world import World, candidate_log_probs, load_world, save_world, word_tokenizer

TEMPLATES = {"pairwise": "{prompt} {first} or {second}", "reward": "{prompt} {response}"}
POLICY, TABLES = "policy", "tables.safetensors"


@dataclass(frozen=True)
class Setting:
    """The shared inputs of all stages after the reference policy.

    Args:
        world (World): prompts, candidates, annotators.
        tokenizer: of words.
        start (Path): the reference policy's folder.
        log_reference (tensor (M, A)): the reference policy, float64.
        preset (CandidatePreset): the experiment's numbers.
        device (torch.device): where models are.
        reporter (Reporter): progress lines and bars.
    """

    world: World
    tokenizer: Any
    start: Path
    log_reference: torch.Tensor
    preset: CandidatePreset
    device: torch.device
    reporter: Reporter

    def policy(self, folder: Path | None = None) -> Any:
        """A model of its own on the device.

        Args:
            folder: where it was saved; None: the reference policy.
        """
        return load_model("experiment: policy", folder or self.start, device=self.device, dtype=torch.float32)

    def log_probs(self, model: Any) -> torch.Tensor:
        """`candidate_log_probs` of this world.

        Args:
            model: a policy.
        """
        return candidate_log_probs(model, self.tokenizer, self.world)


# ---- the reference policy --------------------------------------------------------------------------------------------


def make_start(work: Path, world: World, preset: CandidatePreset, device: torch.device) -> None:
    """Fit a small Llama to the frequencies of the candidates, by cross-entropy over all prompts at once; save it.

    Args:
        work: the stage's folder.
        world: prompts and frequencies.
        preset: the model's size and the number of steps.
        device: where to train.
    """
    tokenizer = word_tokenizer(world)
    ids = torch.tensor([tokenizer(p)["input_ids"] for p in world.prompts], dtype=torch.int64, device=device)
    # At the usual initializer_range, 0.02, layers this narrow learn word pairs slowly.
    model = new_model(tokenizer, preset, 16, initializer_range=0.1).to(device)
    chosen = tokenizer.convert_tokens_to_ids(world.candidates)
    target = torch.zeros(len(ids), len(tokenizer), dtype=torch.float32, device=device)
    target[:, chosen] = world.common.float().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, preset.start_steps)
    for _ in range(preset.start_steps):
        optimizer.zero_grad()
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        torch.nn.functional.cross_entropy(logits, target).backward()
        optimizer.step()
        schedule.step()
    save_policy(model, tokenizer, work / POLICY)
    save_world(world, work / "world.json")
    save_table(candidate_log_probs(model, tokenizer, world), work)
    write_json(work / "measures.json", {"parameters": sum(value.numel() for value in model.parameters())})


def load_setting(folder: Path, preset: CandidatePreset, device: torch.device, reporter: Reporter) -> Setting:
    """Load the result of `make_start`.

    Args:
        folder: its stage.
        preset, device, reporter: as in `Setting`.
    """
    world, log_reference = load_world(folder / "world.json"), load_table(folder)
    tokenizer = load_tokenizer("experiment: reference policy", folder / POLICY)
    return Setting(world, tokenizer, folder / POLICY, log_reference, preset, device, reporter)


def load_table(folder: Path) -> torch.Tensor:
    """Load a stage's table: log-probabilities (M, A), (marks, M, A) of a training run, or a comparison model's numbers.

    Args:
        folder: the stage's.
    """
    from safetensors.torch import load_file

    return load_file(folder / TABLES)["table"]


def save_table(table: torch.Tensor, folder: Path) -> None:
    """Save a stage's table for `load_table`.

    Args:
        table: the stage's result.
        folder: the stage's.
    """
    from safetensors.torch import save_file

    save_file({"table": table.contiguous()}, folder / TABLES)


# ---- a sample of human pairs, and the two models of it ---------------------------------------------------------------


def make_pairs(work: Path, setting: Setting) -> None:
    """Sample pairs of different answers of the reference policy, each with one vote, and an eighth more to hold out.

    Args:
        work: the stage's folder.
        setting: world, reference and the number of pairs.
    """
    preset, world = setting.preset, setting.world
    generator = torch.Generator().manual_seed(preset.seed + 1)
    count = preset.pairs + preset.pairs // 8
    rows = torch.randint(len(world.prompts), (count,), generator=generator, dtype=torch.int64, device="cpu")
    chances = setting.log_reference[rows, :-1].exp()
    sides = torch.multinomial(chances, 2, replacement=False, generator=generator)
    prompts = [world.prompts[row] for row in rows.tolist()]
    first, second = ([world.candidates[c] for c in side] for side in sides.T.tolist())
    won = Votes(TableJudge(world, world.preference), preset.seed + 2)(prompts, first, second)
    pairs = [
        {"prompt": prompt, "chosen": f" {a if win else b}", "rejected": f" {b if win else a}"}
        for prompt, a, b, win in zip(prompts, first, second, won.tolist(), strict=True)
    ]
    write_json(work / "pairs.json", {"train": pairs[: preset.pairs], "held_out": pairs[preset.pairs :]})


def make_comparison_model(work: Path, kind: str, pairs: dict[str, list[Pair]], setting: Setting) -> None:
    """Train one model for each learning rate from the reference policy, keep that of the lowest held-out log-loss.

    Args:
        work: the stage's folder.
        kind: pairwise, the preference model, or reward.
        pairs: train and held_out.
        setting: preset and start.
    """
    preset, tried = setting.preset, []
    models: list[ComparisonModel] = []
    for rate in preset.comparison_rates:
        model = KINDS[kind](setting.policy(), setting.tokenizer, template=TEMPLATES[kind]).to(setting.device)
        training = PreferenceTraining(preset.comparison_steps, preset.comparison_batch, learning_rate=rate,
                                      seed=preset.seed)  # fmt: skip
        outcome = train_preference_model(
            model, pairs["train"], training, held_out=pairs["held_out"], progress=setting.reporter.shown
        )
        assert outcome.evaluation is not None
        tried.append({"learning_rate": rate, **asdict(outcome.evaluation)})
        models.append(model)
    best = min(range(len(tried)), key=lambda index: tried[index]["log_loss"])
    save_preference_model(models[best], work / "model")
    table = preference_table if kind == "pairwise" else reward_table
    save_table(table(models[best], setting), work)
    write_json(work / "measures.json", {"tried": tried, "chosen": best})


@torch.no_grad()
def preference_table(model: ComparisonModel, setting: Setting) -> torch.Tensor:
    """Return the preference model's P(a > b) for all candidates of all prompts, (M, A, A); others lose to them.

    Args:
        model: a pairwise one.
        setting: the world.
    """
    world, table = setting.world, setting.world.preference.clone()
    for a, first in enumerate(world.candidates):
        for b, second in enumerate(world.candidates):
            if a < b:
                scored = model.probabilities(world.prompts, [f" {first}"] * len(world.prompts),
                                             [f" {second}"] * len(world.prompts)).double().cpu()  # fmt: skip
                table[:, a, b], table[:, b, a] = scored, 1 - scored
    return table


@torch.no_grad()
def reward_table(model: Any, setting: Setting) -> torch.Tensor:
    """Return the reward model's rewards of all candidates, (M, A); others get the worst of them, less 1.

    Args:
        model: a reward model.
        setting: the world, and the reference policy under which rewards have the mean 0.
    """
    world = setting.world
    columns = [model.rewards(world.prompts, [f" {word}"] * len(world.prompts)).double().cpu()
               for word in world.candidates]  # fmt: skip
    return centred(torch.stack(columns, -1), setting.log_reference)


def centred(rewards: torch.Tensor, log_reference: torch.Tensor) -> torch.Tensor:
    """Shift the candidates' rewards (M, k) to a mean of 0 under the reference; append the worst less 1 for others.

    Args:
        rewards (M, k): of the candidates.
        log_reference (M, A): the reference policy.
    """
    whole = torch.cat([rewards, rewards.amin(-1, keepdim=True) - 1], -1)
    return whole - (log_reference.exp() * whole).sum(-1, keepdim=True)


# ---- contestants and best responses ----------------------------------------------------------------------------------


def make_run(work: Path, contestant: str, index: int, run: int, tables: dict[str, torch.Tensor],
             setting: Setting) -> None:  # fmt: skip
    """Train a contestant at one tau; save its policy and its log-probabilities at every mark.

    Args:
        work: the stage's folder.
        contestant: a key of CONTESTANTS.
        index: which tau of its grid.
        run: number of the run; runs of equal number share prompts, noise, and the votes on equal pairs.
        tables: `preference` and `reward`, learned from the sample of human pairs.
        setting: start, preset, world.
    """
    preset, chosen = setting.preset, CONTESTANTS[contestant]
    seed = 1000 * preset.seed + run
    votes = Votes(TableJudge(setting.world, setting.world.preference), 7_000_000 + seed)
    if chosen.information == "pairs":
        judge: Any = TableJudge(setting.world, tables["preference"])
        reward: Any = TableReward(setting.world, tables["reward"])
    else:
        judge, reward = votes, OnlineReward(votes, setting.log_reference)
    model = setting.policy()
    marks, recorded = frozenset(preset.marks()), []

    def record(step: int) -> None:
        if step in marks:
            recorded.append(setting.log_probs(model))

    options = preset.options(contestant, index)
    _train(model, judge, reward, setting, work, seed, options, [AfterStep(record)])
    save_table(torch.stack(recorded), work)
    model.save_pretrained(work / POLICY)
    write_json(work / "measures.json", {"votes": votes.asked, "updates": preset.updates})


def make_response(work: Path, opponent: torch.Tensor, start: Path | None, tau: float, seed: int,
                  setting: Setting) -> None:  # fmt: skip
    """Train a best response to a fixed policy, RLHF whose reward is P(y > opponent); save its log-probabilities.

    Args:
        work: the stage's folder.
        opponent (M, A): log-probabilities of the fixed policy.
        start: the policy to start from; None: the reference.
        tau: coefficient of the KL from the reference.
        seed: of the run.
        setting: reference, preset, world.
    """
    worth = (setting.world.preference @ opponent.exp().unsqueeze(-1)).squeeze(-1)
    reward = TableReward(setting.world, worth - (setting.log_reference.exp() * worth).sum(-1, keepdim=True))
    model = setting.policy(start)
    options = {"algorithm": "rlhf", "tau": tau}
    _train(model, None, reward, setting, work, seed, options, [])
    save_table(setting.log_probs(model), work)


def _train(model: Any, judge: Any, reward: Any, setting: Setting, work: Path, seed: int, options: dict[str, Any],
           callbacks: Sequence[Any]) -> None:  # fmt: skip
    """Train `model` in place, with the common budget: every prompt in every update."""
    preset, world = setting.preset, setting.world
    config = NashConfig(
        str(work / "trainer"),
        max_steps=preset.updates,
        per_device_train_batch_size=len(world.prompts),
        samples_per_prompt=preset.samples_per_prompt,
        max_prompt_length=8,
        max_new_tokens=1,
        learning_rate=preset.learning_rate,
        lr_scheduler_type="linear",  # last iterates are compared: a constant rate would leave noise in them
        adam_beta1=0.0,  # momentum overshoots where the opponent moves too
        logging_steps=preset.updates,
        log_samples=0,
        seed=seed,
        **silent_options(setting.device),
        **options,
    )
    rewarded = options["algorithm"] == "rlhf"
    trainer = NashTrainer(
        model,
        setting.policy(),
        judge=None if rewarded else judge,
        args=config,
        train_dataset=[{"prompt": prompt} for prompt in world.prompts],
        processing_class=setting.tokenizer,
        callbacks=list(callbacks),
        reward=reward if rewarded else None,
    )
    train_silently(trainer)
