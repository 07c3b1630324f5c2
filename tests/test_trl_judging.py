"""Rewards and judges of TRL's kinds: their arguments, the conversion of their results, refusals."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("accelerate", reason="training needs accelerate")

from nlhf_kernels.integrations.trl.judging import RewardDifference, TrlJudge, _is_judge
from nlhf_kernels.integrations.trl.rows import Rows, with_answer
from nlhf_kernels.preference import JudgeError, PairwisePreferenceModel, RewardModel
from tests.support.preference import comparison_model
from tests.support.tiny_models import tiny_tokenizer
from tests.support.training import PROMPTS, history, likes_e, single_thread  # noqa: F401
from tests.support.trl import make_trainer, reward_model

CHAT = [{"prompt": [{"role": "user", "content": f"say {letter}"}], "letter": letter} for letter in "abcd"]


def worth(text: str) -> float:
    return sum(map(ord, text)) % 7


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def expected(trainer, score) -> torch.Tensor:
    """Return sigmoid of the difference of scores of the last micro-batch."""
    experience = trainer.experiences[0]
    return torch.tensor([score(a) - score(b) for a, b in zip(*experience.answers, strict=True)]).double().sigmoid()


def test_rewards_are_summed_by_their_weights(tmp_path) -> None:
    def value(prompts, completions):
        return [worth(text) if text else None for text in completions]

    trainer = make_trainer(tmp_path, reward_funcs=[length, value], reward_weights=[0.5, 0.25], beta=0.0)
    trainer.train()
    result, target = trainer.experiences[0].value, expected(trainer, lambda text: 0.5 * len(text) + 0.25 * worth(text))
    torch.testing.assert_close(result, target)
    assert result.unique().numel() > 1
    torch.testing.assert_close(trainer.experiences[0].advantage, target - 0.5)


def test_a_missing_end_costs_reward_on_both_sides(tmp_path) -> None:
    """The penalty applies to both answers; enough rows are sampled that some end and some do not."""
    rows = [{"prompt": f"say {index}"} for index in range(32)]
    trainer = make_trainer(
        tmp_path, reward_funcs=length, missing_eos_penalty=3.0, train_dataset=rows, per_device_train_batch_size=32
    )
    trainer.train()
    experience = trainer.experiences[0]
    one, two = experience.unended.double().unbind(1)
    assert float((one - two).abs().sum()) > 0, "answers that end beside answers that do not"
    plain = expected(trainer, len)
    torch.testing.assert_close(experience.value, (plain.logit() - 3.0 * (one - two)).sigmoid())
    torch.testing.assert_close(experience.advantage, experience.value - 0.5)


def test_a_missing_end_costs_preference_with_a_judge(tmp_path) -> None:
    trainer = make_trainer(tmp_path, judge=likes_e, missing_eos_penalty=0.25, per_device_train_batch_size=16)
    trainer.train()
    experience = trainer.experiences[0]
    torch.testing.assert_close(experience.advantage, experience.value - 0.25 * experience.unended[:, 0].double() - 0.5)


def test_functions_get_the_rows_own_prompts_and_columns(tmp_path) -> None:
    calls = []

    def reward(prompts, completions, letter, **rest):
        calls.append((prompts, completions, letter, rest))
        return [text[0]["content"].count(own) for text, own in zip(completions, letter, strict=True)]

    trainer = make_trainer(
        tmp_path, reward_funcs=reward, train_dataset=CHAT, processing_class=tiny_tokenizer(chat=True), eval_dataset=CHAT
    )
    trainer.train()
    trainer.evaluate()
    assert len(calls) == 4, "both sides of an update and of an evaluation"
    for prompts, completions, letters, rest in calls:
        assert [message[0]["content"] for message in prompts] == [f"say {letter}" for letter in letters]
        assert all(text[0]["role"] == "assistant" for text in completions) and rest == {}


def test_reward_models_score_the_end_of_the_whole_text(tmp_path) -> None:
    """Scores equal the model's own forward pass, row by row, for prompts of different lengths in one batch."""
    model, tokenizer = reward_model(), tiny_tokenizer()
    rows = [{"prompt": "a"}, {"prompt": "a longer one"}, {"prompt": "b"}, {"prompt": "two"}]
    trainer = make_trainer(tmp_path, reward_funcs=model, train_dataset=rows)
    trainer.train()
    experience = trainer.experiences[0]

    def score(prompt: str, answer: str) -> float:
        ids = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return float(model(input_ids=torch.tensor([ids])).logits)

    with torch.no_grad():
        sides = [[score(p, a) for p, a in zip(experience.prompts, side, strict=True)] for side in experience.answers]
    expected = (torch.tensor(sides[0]) - torch.tensor(sides[1])).double().sigmoid()
    torch.testing.assert_close(experience.value, expected, rtol=1e-4, atol=1e-5)
    assert float((expected - 0.5).abs().max()) > 0.01
    assert not any(value.requires_grad for value in model.parameters())


def test_reward_models_read_conversations_by_their_own_template(tmp_path) -> None:
    template = tiny_tokenizer(chat=True)
    template.chat_template = (
        "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }};{% endfor %}"
    )
    trainer = make_trainer(
        tmp_path, reward_funcs=[reward_model()], reward_processing_classes=[template], train_dataset=CHAT,
        processing_class=tiny_tokenizer(chat=True),
    )  # fmt: skip
    (reward,) = trainer.collector.judge.rewards
    ids = reward._encode("<bos>[say a]", "no")
    assert template.decode(ids) == "u:say a;a:no;"
    trainer.train()
    assert history(trainer, "preference")[0][0] != 0.5


def test_reward_models_by_name(tmp_path) -> None:
    reward_model(seed=3).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    by_name = make_trainer(tmp_path / "named", reward_model_path=str(tmp_path / "model"))
    given = make_trainer(tmp_path / "given", reward_funcs=reward_model(seed=3))
    for trainer in (by_name, given):
        trainer.train()
    torch.testing.assert_close(by_name.experiences[0].value, given.experiences[0].value)


def test_models_of_the_library_are_judges_and_rewards(tmp_path) -> None:
    pairwise, bradley_terry = comparison_model(PairwisePreferenceModel), comparison_model(RewardModel)
    for name, model in (("pairwise", pairwise), ("reward", bradley_terry)):
        trainer = make_trainer(tmp_path / name, reward_funcs=model)
        trainer.train()
        experience = trainer.experiences[0]
        torch.testing.assert_close(
            experience.value, model.probabilities(experience.prompts, *experience.answers), rtol=1e-4, atol=1e-5
        )


class Soft:
    def judge(self, prompts, completions, shuffle_order=True, return_scores=False):
        assert return_scores
        return [0.75 if len(one) >= len(two) else 0.25 for one, two in completions]


class Hard:
    def __init__(self, *answers: int) -> None:
        self.answers = answers

    def judge(self, prompts, completions, shuffle_order=True):
        return [self.answers[index % len(self.answers)] for index in range(len(prompts))]


def test_trls_judge_objects(tmp_path, caplog) -> None:
    texts = (["p"] * 3, ["long", "x", "x"], ["s", "longer", "y"])
    assert TrlJudge(Soft())(*texts) == [0.75, 0.25, 0.75]
    assert TrlJudge(Hard(0, 1, -1))(*texts) == [1.0, 0.0, 0.5]
    assert "Hard could not say of 1 of 3 pairs" in caplog.text
    for name in ("judge", "reward_funcs"):
        trainer = make_trainer(tmp_path / name, **{name: Hard(0, 1)})
        trainer.train()
        assert trainer.experiences[0].value.tolist() == [1.0, 0.0, 1.0, 0.0]
    with pytest.raises(JudgeError, match="judge Hard: raised ValueError: expected 0, 1, or -1 .*; got 2"):
        make_trainer(tmp_path / "wrong", judge=Hard(2)).train()


def test_several_judges_are_averaged(tmp_path) -> None:
    trainer = make_trainer(tmp_path, reward_funcs=[Hard(0), Hard(1)], reward_weights=[3.0, 1.0])
    trainer.train()
    assert trainer.experiences[0].value.tolist() == [0.75] * 4
    with pytest.raises(ValueError, match="AverageJudge: weights: "):
        make_trainer(tmp_path, judge=likes_e, reward_weights=[0.0])


def test_functions_that_are_async_are_refused(tmp_path) -> None:
    async def reward(prompts, completions):
        return [0.0] * len(prompts)

    with pytest.raises(
        TypeError, match="reward_funcs: expected functions that return numbers; got one .* async: reward"
    ):
        make_trainer(tmp_path, reward_funcs=reward)


def test_judges_and_rewards_are_told_apart_by_what_they_take() -> None:
    assert _is_judge("reward_funcs", likes_e) and _is_judge("reward_funcs", lambda a, b, c: [0.5])
    assert not _is_judge("reward_funcs", length) and not _is_judge("reward_funcs", lambda prompts, **rest: [0.5])
    with pytest.raises(ValueError, match="cannot tell which .* is .a judge can be given as judge=."):
        _is_judge("reward_funcs", lambda *given, **named: [0.5])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "expected one of reward_funcs, judge, args.reward_model_path; got none"),
        ({"judge": likes_e, "reward_funcs": length}, "expected one of .*; got reward_funcs and judge"),
        ({"reward_funcs": [likes_e, length]}, "reward_funcs: expected judges or rewards; got both"),
        ({"reward_funcs": []}, "reward_funcs: expected judges or rewards; got an empty list"),
        ({"reward_funcs": length, "reward_weights": [1.0, 2.0]}, "reward_weights: expected 1, one for each; got 2"),
        ({"reward_funcs": lambda prompts, completions, completion_ids: [0]}, "got one that asks for completion_ids"),
        ({"reward_funcs": length, "reward_processing_classes": object()}, "expected None beside function; got one"),
        ({"judge": likes_e, "reward_processing_classes": object()}, "expected with reward models; got judges"),
        ({"reward_funcs": torch.nn.Linear(2, 1)}, "expected a decoder with one linear score .*; got Linear"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(given, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"NashMDTrainer: .*{message}"):
        make_trainer(tmp_path, **given)


def test_rewards_that_are_no_numbers_are_named(tmp_path) -> None:
    with pytest.raises(JudgeError, match=r"RewardDifference: .*reward: nonsense: expected finite numbers; got nan"):

        def nonsense(prompts, completions):
            return [float("nan")] * len(prompts)

        make_trainer(tmp_path, reward_funcs=nonsense).train()


def test_prompts_are_rendered_by_trls_rules() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{{ mark }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    user, begun = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "so"}
    rows = [{"prompt": [user]}, {"prompt": [user], "chat_template_kwargs": {"mark": "!"}}, {"prompt": [user, begun]}]
    texts = Rows(tokenizer).read("train_dataset", [*rows, {"prompt": "as it is"}])
    assert [row["prompt"] for row in texts] == ["[hi]>", "![hi]>", "[hi][so", "as it is"]
    assert with_answer([user, begun], " it goes") == [user, {"role": "assistant", "content": "so it goes"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "image": None}, "row 0: expected prompts of text alone; got a column 'image'"),
        ({"question": "a"}, "row 0: expected a column 'prompt', .*; got None"),
        ({"prompt": "a", "chat_template_kwargs": {"x": 1}}, "row 0: chat_template_kwargs: expected with a prompt of"),
        ({"prompt": [{"role": "system", "content": "a"}]}, "expected the last message from user, .*; got 'system'"),
    ],
)
def test_rows_that_cannot_be_read_are_named(row, message) -> None:
    with pytest.raises(ValueError, match=f"NashMDTrainer: train_dataset: .*{message}"):
        Rows(tiny_tokenizer(chat=True)).read("train_dataset", [row])


def test_columns_are_found_by_the_prompt_or_refused() -> None:
    rows, twice = Rows(tiny_tokenizer()), [{"prompt": "a", "x": 1, "y": 1}, {"prompt": "a", "x": 1, "y": 2}]
    rows.register(["x"])
    assert len(rows.read("train_dataset", twice)) == 2 and rows.row("a")["x"] == 1
    rows.register(None)
    with pytest.raises(ValueError, match="row 1: expected one 'y' for one prompt, .*'a' and a different one"):
        rows.read("train_dataset", twice)


def test_scores_far_apart_stay_numbers() -> None:
    """The penalty is subtracted before the sigmoid, which would round to 1."""
    judge = RewardDifference((lambda prompts, answers: [float(text) for text in answers],), (1.0,), penalty=150.0)
    ended = judge(["p"], ["100"], ["0"])
    missing = RewardDifference(judge.rewards, judge.weights, 150.0, torch.tensor([[True, False]]))(
        ["p"], ["100"], ["0"]
    )
    assert float(ended) == 1.0 and float(missing) < 1e-10
