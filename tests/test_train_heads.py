"""Hidden states and the output layer reproduce a model's logits, including its scaling and caps."""

from __future__ import annotations

import pytest
import torch
import transformers

pytest.importorskip("accelerate", reason="training needs accelerate")

from nlhf_kernels.core.tokens import count_positions
from nlhf_kernels.ops import linear_logprobs
from nlhf_kernels.train.heads import check_head, head_of, hidden_states
from tests.support.tiny_models import ARCHITECTURES, VOCABULARY, padded, prompts, random_model, tiny_model
from tests.support.training import history, make_trainer, single_thread  # noqa: F401

_SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
_MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4}
SCALED = {  # architecture -> its configuration, and the scale of its logits
    "minicpm3": (lambda: transformers.MiniCPM3Config(**_SPECIAL, **_SHAPE, **_LATENT, dim_model_base=8), 1.0),
    "granite": (lambda: transformers.GraniteConfig(**_SPECIAL, **_SHAPE, logits_scaling=6.0), 1 / 6),
    "cohere": (lambda: transformers.CohereConfig(**_SPECIAL, **_SHAPE, logit_scale=0.3), 0.3),
    "falcon_h1": (
        lambda: transformers.FalconH1Config(
            **_SPECIAL, **_SHAPE, **_MAMBA, num_key_value_heads=2, lm_head_multiplier=0.3
        ),
        0.3,
    ),
    **{name: (lambda name=name: ARCHITECTURES[name](32), 1.0) for name in ("gemma2", "gpt2", "llama", "opt")},
}


@pytest.mark.parametrize("architecture", SCALED)
def test_the_head_gives_the_models_log_probabilities(architecture) -> None:
    """Log-probabilities equal the model's: MiniCPM3 scales the states before its head, Granite and Cohere scale the
    logits, Gemma 2 caps them."""
    config, scale = SCALED[architecture]
    model = random_model(config(), 0)
    assert check_head(model, "model") == VOCABULARY
    assert head_of(model).scale == pytest.approx(scale, rel=1e-6)
    batch = padded(prompts())
    mask, targets = batch["attention_mask"].bool(), batch["input_ids"].roll(-1, 1)
    with torch.no_grad():
        result = linear_logprobs(hidden_states(model, **batch), head_of(model), targets).policy
        placed = (
            {"position_ids": count_positions(batch["attention_mask"])} if architecture not in ("falcon_h1",) else {}
        )
        logits = model(**batch, **placed, use_cache=False).logits.double()
    expected = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    assert torch.allclose(result[mask].double(), expected[mask], atol=1e-4)


def test_minicpm3_is_trained(tmp_path) -> None:
    trainer = make_trainer(tmp_path, model=random_model(SCALED["minicpm3"][0](), 0), max_steps=2, learning_rate=1e-2)
    trainer.train()
    (_, first), (_, second) = history(trainer, "loss", "kl")
    assert first == pytest.approx(0, abs=1e-4) and second != first


@pytest.mark.parametrize(
    "change", [lambda logits: logits.tanh(), lambda logits: logits / logits.norm(dim=-1, keepdim=True)],
    ids=["bent", "normalised"],
)  # fmt: skip
@pytest.mark.parametrize("architecture", ["gemma2", "gpt2", "llama"])
def test_a_model_that_does_something_else_is_refused(architecture, change) -> None:
    model = tiny_model(architecture)
    forward = model.forward

    def changed(*args, **options):
        result = forward(*args, **options)
        result.logits = change(result.logits)
        return result

    model.forward = changed
    with pytest.raises(ValueError, match=r"model: expected logits = cap tanh\(scale \(W h \+ b\) / cap\)"):
        check_head(model, "model")
