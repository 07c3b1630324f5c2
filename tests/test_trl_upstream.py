"""Contract tests for every undocumented name of an installed TRL that is used."""

from __future__ import annotations

import importlib.util
import inspect

import pytest

pytest.importorskip("accelerate", reason="training needs accelerate")

from nlhf_kernels.core import upstream
from tests.support.tiny_models import tiny_model
from tests.support.training import single_thread  # noqa: F401
from tests.support.trl import trl_trainer

pytestmark = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")


def test_version() -> None:
    import trl

    numbers = tuple(int(part) for part in trl.__version__.split(".")[:2])
    assert upstream.TRL_OLDEST <= numbers < upstream.TRL_BEFORE


@pytest.mark.parametrize("name", upstream.TRL_METHODS)
def test_method(name) -> None:
    result = inspect.signature(getattr(upstream.trl_trainer_class("test"), name))
    assert tuple(result.parameters) == ("self", *upstream.TRL_METHODS[name])


@pytest.mark.parametrize("name", upstream.TRL_ATTRIBUTES)
def test_attribute(name, tmp_path) -> None:
    expected = {"_beta": [0.1, 0.2], "_mixture_coef": [0.5, 0.25], "ref_model": tiny_model("llama", seed=4)}
    trainer = trl_trainer(
        tmp_path,
        ref_model=expected["ref_model"],
        beta=expected["_beta"],
        mixture_coef=expected["_mixture_coef"],
        top_k=5,
    )
    if name == "generation_kwargs":
        assert trainer.generation_kwargs["top_k"] == 5 and "max_new_tokens" in trainer.generation_kwargs
    else:
        assert getattr(trainer, name) is expected[name]


def test_wrapped_forward(tmp_path) -> None:
    """A model that accelerate prepares for bfloat16 is restored once both names in its __dict__ are removed."""
    trainer = trl_trainer(tmp_path, bf16=True)
    model, before = tiny_model("gpt2"), tiny_model("gpt2").forward
    trainer.accelerator.prepare_model(model)
    assert model.forward.__func__ is not before.__func__
    for name in upstream.WRAPPED_FORWARD:
        del vars(model)[name]
    assert model.forward.__func__ is before.__func__
