"""End-token ids in every form that models and tokenizers use, and positions independent of padding."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nlhf_kernels.core.tokens import count_positions, end_token_ids, flatten_ids


def test_positions_count_a_rows_own_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert count_positions(mask).tolist() == count_positions(mask.bool()).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize(("ids", "flat"), [(None, ()), (2, (2,)), ([2, 5], (2, 5)), (torch.tensor([2, 5]), (2, 5))])
def test_ids_in_every_form(ids, flat) -> None:
    assert flatten_ids(ids) == flat


@pytest.mark.parametrize(
    ("of_model", "of_tokenizer", "expected"),
    [(None, None, ()), (2, 2, (2,)), ([5, 2], 3, (5, 2, 3)), (None, 3, (3,)), ([5, 3], 3, (5, 3))],
)
def test_end_ids_are_the_models_then_the_tokenizers(of_model, of_tokenizer, expected) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=of_model))
    assert end_token_ids(model, SimpleNamespace(eos_token_id=of_tokenizer)) == expected
    assert end_token_ids(SimpleNamespace()) == ()
