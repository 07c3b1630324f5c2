"""Preference models: scores of single texts, both orders, padding, truncation."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers

from nlhf_kernels.preference import InputFormat, PairwisePreferenceModel, RewardModel
from nlhf_kernels.preference.template import InputFormatter
from tests.support.preference import TEMPLATES, comparison_model, shorter_wins, untrained
from tests.support.tiny_models import ARCHITECTURES, one_thread, tiny_model, tiny_tokenizer

KINDS = pytest.mark.parametrize("kind", [PairwisePreferenceModel, RewardModel], ids=lambda kind: kind.KIND)


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def columns(count: int = 20, seed: int = 0) -> tuple[list[str], list[str], list[str]]:
    prompts, first, second = zip(*shorter_wins(count, seed), strict=True)
    return list(prompts), list(first), list(second)


def by_hand(model, *texts: str) -> float:
    """Compute the head's score of one text, read alone and in float64."""
    template = TEMPLATES[type(model)]
    text = template.format(**dict(zip(model.FIELDS, texts, strict=True)))
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    hidden = model.body.double()(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
    model.body.float()
    return float(hidden @ model.head.weight[0].double())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@KINDS
def test_probabilities_are_those_of_each_pair_read_alone(kind, architecture) -> None:
    """Probabilities do not depend on the batch and its padding, for all kinds of positions, masks and states."""
    model = comparison_model(kind, architecture)
    prompts, first, second = columns(7)
    with torch.no_grad():
        if kind is RewardModel:
            rewards = [[by_hand(model, *both) for both in zip(prompts, side, strict=True)] for side in (first, second)]
            expected = torch.tensor(rewards[0], dtype=torch.float64).sub(torch.tensor(rewards[1])).sigmoid()
        else:
            orders = [
                [by_hand(model, *three) for three in zip(prompts, *sides, strict=True)]
                for sides in ((first, second), (second, first))
            ]
            forth, back = (torch.tensor(order, dtype=torch.float64).sigmoid() for order in orders)
            expected = (forth + 1 - back) / 2
    assert expected.std() > 0.003, "opinions that differ"
    for batch_size in (1, 3, 16):
        result = model.probabilities(prompts, first, second, batch_size)
        assert result.dtype == torch.float64
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-6)


@KINDS
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e-6), (torch.float32, 20.0), (torch.bfloat16, 1.0)])
def test_antisymmetry_is_exact(kind, dtype, scale) -> None:
    """P(a > b) + P(b > a) = 1 as Python floats, in separate calls with any pairs swapped, near 0, 1/2 and 1."""
    model = comparison_model(kind)
    model.body.to(dtype)
    model.head.weight.data *= scale
    prompts, first, second = columns(50)
    straight = model.probabilities(prompts, first, second, 8).tolist()
    back = model.probabilities(prompts, second, first, 8).tolist()
    assert all(p + q == 1.0 for p, q in zip(straight, back, strict=True)) and len(set(straight)) > 20
    mixed = [(b, a) if index % 3 else (a, b) for index, (a, b) in enumerate(zip(first, second, strict=True))]
    turned = model.probabilities(prompts, *map(list, zip(*mixed, strict=True)), 8).tolist()
    assert turned == [q if index % 3 else p for index, (p, q) in enumerate(zip(straight, back, strict=True))]
    assert model.probabilities(prompts, first, first, 8).tolist() == [0.5] * 50
    model.head.weight.data.fill_(torch.nan)
    assert model.probabilities(prompts, first, first, 8).isnan().all(), "a broken model has no opinion of 1/2"


@KINDS
def test_scoring_switches_dropout_off_and_restores_every_mode(kind) -> None:
    model = comparison_model(kind, "gpt2")  # has dropout
    model.train()
    model.body.h[0].eval()
    before = [part.training for part in model.modules()]
    assert torch.equal(model.probabilities(*columns()), model.probabilities(*columns()))
    assert [part.training for part in model.modules()] == before
    with pytest.raises(ValueError, match="too long"):
        model.probabilities(["a" * 200], ["b"], ["c"])
    assert [part.training for part in model.modules()] == before


@KINDS
def test_a_new_model_has_no_opinion(kind) -> None:
    assert untrained(kind).probabilities(*columns()).tolist() == [0.5] * 20


def test_no_pairs_no_probabilities() -> None:
    assert comparison_model().probabilities([], [], []).shape == (0,)
    assert comparison_model(RewardModel).rewards([], []).shape == (0,)


def test_rewards_are_what_the_reward_model_compares() -> None:
    model = comparison_model(RewardModel)
    prompts, first, second = columns()
    gap = model.rewards(prompts, first, 3).double() - model.rewards(prompts, second).double()
    torch.testing.assert_close(model.probabilities(prompts, first, second), gap.sigmoid(), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "template",
    ["{prompt} {first}", "{prompt} {first} {second} {first}", "{prompt} {first} {second} {third}", "{", "{} {} {}",
     "{prompt!r} {first} {second}", "{prompt} {first:>9} {second}", "{prompt.x} {first} {second}"],
)  # fmt: skip
def test_templates_must_hold_each_field_once(template) -> None:
    with pytest.raises(ValueError, match="template: expected .*{prompt}, {first}, {second}"):
        comparison_model(template=template)


def test_templates_may_be_anything_else() -> None:
    model = comparison_model(template="{{x}} {second}{first} to {prompt}")
    ((a, b),) = model.encode(["why"], ["yes"], ["no"])
    assert model.tokenizer.decode(a) == "{x} noyes to why" and model.tokenizer.decode(b) == "{x} yesno to why"
    for kind in (PairwisePreferenceModel, RewardModel):
        default = kind(tiny_model("bloom"), tiny_tokenizer())
        default.head.weight.data.normal_()
        assert default.input_format.max_length is None
        assert default.probabilities(["p"], ["q"], ["r"]).item() != 0.5


def test_texts_stand_where_they_should_behind_the_first_mark() -> None:
    from tests.test_data import with_bos

    model = PairwisePreferenceModel(tiny_model(), with_bos(), template="{prompt}|{first}|{second}")
    ((a, _),) = model.encode(["why"], ["yes"], ["no"])
    assert a == [1, *tiny_tokenizer()("why|yes|no")["input_ids"]]


CUTS = {  # prompt, first, second within 8 tokens -> what is read
    ("abcdefgh", "ij", "kl"): "efgh|ij|kl",  # the prompt is cut from its beginning
    ("abcdefgh", "", ""): "abcdefgh||",
    ("abcdefgh", "ijklm", "no"): "h|ijklm|no",
    ("abc", "ijklmnop", "qr"): "|ijklmn|qr",  # then the longer response from its end
    ("abc", "ijklmnop", "qrstuvw"): "|ijkl|qrst",  # then both to half the tokens
    ("ab", "ij", "kl"): "ab|ij|kl",
}


def test_truncation_takes_the_prompts_beginning_then_the_longer_responses_end() -> None:
    model = comparison_model(template="{prompt}|{first}|{second}", max_length=10, overlong="truncate")
    prompts, first, second = map(list, zip(*CUTS, strict=True))
    with pytest.warns(UserWarning, match="4 of 6 texts cut to 10 tokens"):
        rows = model.encode(prompts, first, second)
    assert [model.tokenizer.decode(a) for a, _ in rows] == list(CUTS.values())
    assert all(sorted(a) == sorted(b) and len(a) <= 10 for a, b in rows), "both orders hold the same tokens"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode(prompts[-1:], first[-1:], second[-1:])
    reward = comparison_model(RewardModel, template="{prompt}|{response}", max_length=4, overlong="truncate")
    with pytest.warns(UserWarning, match="texts cut"):
        ((a, b),) = reward.encode(["abc"], ["ij"], ["klmnop"])
    assert (reward.tokenizer.decode(a), reward.tokenizer.decode(b)) == ("c|ij", "|klm")


def test_overlong_pairs_are_refused_by_default() -> None:
    model = comparison_model(max_length=12)
    model.encode(["abc"], ["abc"], ["abc"])
    with pytest.raises(
        ValueError, match=r"1 of 2 texts are too long: expected at most 9 tokens .* got 10 in number 1, prompt 'abcd'"
    ):
        model.encode(["a", "abcd"], ["a", "abc"], ["a", "abc"])


def test_what_a_model_can_be_made_of() -> None:
    base, tokenizer = tiny_model("llama"), tiny_tokenizer()
    assert PairwisePreferenceModel(
        base, tokenizer, template=TEMPLATES[PairwisePreferenceModel]
    ).input_format == InputFormat(TEMPLATES[PairwisePreferenceModel], 128, "error")
    with pytest.raises(ValueError, match="max_length: expected at most 128, the model's positions; got 129"):
        PairwisePreferenceModel(base, tokenizer, max_length=129)
    with pytest.raises(ValueError, match="max_length: expected more than the template's own 3 tokens; got 3"):
        comparison_model(max_length=3)
    with pytest.raises(ValueError, match="max_length: expected an integer in"):
        comparison_model(max_length=0)
    with pytest.raises(ValueError, match="overlong: expected one of error, truncate; got 'cut'"):
        comparison_model(overlong="cut")
    with pytest.raises(TypeError, match="expected a causal language model of transformers; got Linear"):
        PairwisePreferenceModel(torch.nn.Linear(2, 2), tokenizer)
    config = transformers.T5Config(vocab_size=97, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="expected a decoder-only model"):
        PairwisePreferenceModel(transformers.T5ForConditionalGeneration(config), tokenizer)
    sizes = {"vocab_size": 97, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertConfig(**sizes, intermediate_size=8, is_decoder=True)
    with pytest.raises(ValueError, match="AutoModel can load back; got BertModel without pooler"):
        PairwisePreferenceModel(transformers.AutoModelForCausalLM.from_config(bert), tokenizer)
    base._hf_peft_config_loaded = True
    with pytest.raises(ValueError, match="expected a model without adapters"):
        PairwisePreferenceModel(base, tokenizer)


def test_columns_must_be_of_one_length_and_rows_of_some_tokens() -> None:
    with pytest.raises(ValueError, match="as many texts of each; got 2 of prompt, 1 of first, 2 of second"):
        comparison_model().probabilities(["a", "b"], ["c"], ["d", "e"])
    with pytest.raises(TypeError, match="second: expected a list of texts; got one string, 'de'"):
        comparison_model().probabilities(["a", "b"], ["c", "d"], "de")
    with pytest.raises(ValueError, match="batch_size: expected an integer in"):
        comparison_model().probabilities(["a"], ["c"], ["d"], 0)
    formatter = InputFormatter(tiny_tokenizer(), InputFormat("{prompt}", None), ("prompt",))
    with pytest.raises(ValueError, match="expected at least one token to read"):
        formatter.fill(prompt=[])
