"""Models that compare two responses: the pairwise preference model, and the Bradley-Terry reward model beside it.

Both are a causal language model's body and a linear head on the last token's hidden state. The head starts at zero, so
every preference starts at 1/2, no answer word has to exist in the vocabulary, and logits over it are never computed.
(The alternative, the difference of two answer tokens' logits, starts with the model's biases for words and positions.)
Both models read two rows per pair. Training and scoring use the same two numbers (a, b):

    preference   a reads (prompt, y, y'), b reads (prompt, y', y)    P(y > y') = (sigmoid(a) + 1 - sigmoid(b)) / 2
    reward       a reads (prompt, y),     b reads (prompt, y')       P(y > y') = sigmoid(a - b)

Swapping y and y' swaps a and b. Scoring sorts the two rows of every pair, so that the swapped pair sends the same batch
through the model, and P(y > y') + P(y' > y) = 1 holds to the last bit.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch.nn.functional import softplus

from ..core.adapters import new_adapter
from ..core.checks import check_integer
from ..core.identity import digest, weights_digest
from ..core.loading import HUB, load_model, load_tokenizer
from ..core.modes import eval_mode
from ..core.optional import need
from ..core.upstream import has_injected_adapter
from .template import InputFormat, InputFormatter

Rows = tuple[list[int], list[int]]  # the token ids of a pair's two rows
Model = TypeVar("Model", bound="ComparisonModel")


class ComparisonModel(torch.nn.Module):
    """A body, a head, a tokenizer and an input format.

    Rows are padded on the right and the head reads the last token of each. Attention is causal, so padding changes
    nothing, whatever the model's positions, mask or state.

    Args:
        model: a causal language model of transformers; its body is used as it is, not copied.
        tokenizer: the model's.
        template: text around the fields of a pair; None: the class's `TEMPLATE`.
        max_length: tokens of a row; None: the model's number of positions.
        overlong: "error" refuses longer rows, "truncate" truncates them.
    """

    KIND: ClassVar[str]
    FIELDS: ClassVar[tuple[str, ...]]
    TEMPLATE: ClassVar[str]

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        template: str | None = None,
        max_length: int | None = None,
        overlong: str = "error",
    ) -> None:
        super().__init__()
        self.body = _body(model)
        text = self.body.config.get_text_config()
        room = getattr(text, "max_position_embeddings", None)
        room = None if room is not None and room < 1 else room  # XLNet's -1 stands for no bound
        if max_length is not None and room is not None and max_length > room:
            raise ValueError(
                f"preference: max_length: expected at most {room}, the model's positions; got {max_length}"
            )
        template = self.TEMPLATE if template is None else template
        input_format = InputFormat(template, room if max_length is None else max_length, overlong)
        self.formatter = InputFormatter(tokenizer, input_format, self.FIELDS)
        # float32 whatever the body's dtype
        self.head = torch.nn.Linear(text.hidden_size, 1, bias=False, dtype=torch.float32, device=self.body.device)
        torch.nn.init.zeros_(self.head.weight)

    @classmethod
    def from_base(
        cls: type[Model],
        name: str,
        *,
        template: str | None = None,
        max_length: int | None = None,
        overlong: str = "error",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Model:
        """Return a new model on a base from a folder or the hub.

        Args:
            name: a folder or a name on the hub.
            template, max_length, overlong: as for the class.
            dtype: of the body's weights.
            options: for transformers' `from_pretrained`.
        """
        where = {key: options[key] for key in (*HUB, "trust_remote_code") if key in options}
        tokenizer = load_tokenizer("preference: from_base", name, **where)
        base = load_model("preference: from_base", name, merge=True, dtype=dtype, **options)
        return cls(base, tokenizer, template=template, max_length=max_length, overlong=overlong)

    def add_adapter(self: Model, peft_config: Any, seed: int = 0) -> Model:
        """Put an adapter on the body; training then changes the adapter and the head alone. Return the model.

        Args:
            peft_config: a configuration of peft's, a LoraConfig say.
            seed: determines the adapter's first values.
        """
        if self.adapted:
            raise ValueError("preference: add_adapter: expected a model without an adapter; got one that has one")
        configuration = copy.copy(peft_config)
        configuration.task_type = None  # of a body, whatever the configuration was written for
        self.body = new_adapter(self.body, configuration, seed)
        return self

    @property
    def adapted(self) -> bool:
        """Whether the body has an adapter."""
        return hasattr(self.body, "peft_config")

    @property
    def tokenizer(self) -> Any:
        return self.formatter.tokenizer

    @property
    def identity(self) -> str:
        """Kind, template and weights as a short text: equal texts, equal answers."""
        return f"{self.KIND} {digest(repr(self.input_format))} {weights_digest(self.named_parameters())}"

    @property
    def input_format(self) -> InputFormat:
        return self.formatter.input_format

    @abstractmethod
    def encode(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[Rows]:
        """Return the two rows of every pair; raise an error or warn about overlong rows, as set by `input_format`.

        Args:
            prompts, first, second: N texts each.
        """

    @abstractmethod
    def pair_losses(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy (N,) of "the first is preferred".

        Args:
            a, b ((N,)): the head's numbers for the first and second rows of the pairs.
        """

    @abstractmethod
    def margin(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return P(y > y') - 1/2, (N,), where margin(b, a) == -margin(a, b) to the last bit.

        Args:
            a, b ((N,)): the head's numbers for the first and second rows of the pairs.
        """

    def logits(self, rows: Sequence[list[int]]) -> torch.Tensor:
        """Return the head's number for every row, (N,) float32.

        Args:
            rows: N rows of token ids.
        """
        longest = max(map(len, rows))
        device = self.head.weight.device
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int64, device=device)
        last = torch.tensor([len(row) - 1 for row in rows], dtype=torch.int64, device=device)
        mask = torch.arange(longest, dtype=torch.int64, device=device) <= last[:, None]
        output = self.body(input_ids=ids, attention_mask=mask.long(), use_cache=False)
        row = torch.arange(len(rows), dtype=torch.int64, device=device)
        hidden = output.last_hidden_state[row, last]  # (N, D)
        with torch.autocast(device.type, enabled=False):  # one product a row: float32 costs nothing
            return hidden.float() @ self.head.weight[0].float()  # type: ignore[no-any-return]

    def forward(self, pairs: Sequence[Rows]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (a, b), each (N,), from one batch of all rows.

        Args:
            pairs: the rows of N pairs, as `encode` returns them.
        """
        a, b = self.logits([row for side in zip(*pairs, strict=True) for row in side]).chunk(2)
        return a, b

    @torch.no_grad()
    def probabilities(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], batch_size: int = 16
    ) -> torch.Tensor:
        """Return P(first > second | prompt), (N,) float64 on the CPU, computed without dropout.

        Args:
            prompts, first, second: N texts each.
            batch_size: pairs of a forward pass.
        """
        check_integer("probabilities", "batch_size", batch_size, 1, 10**6)
        pairs = self.encode(prompts, first, second)
        swapped = [b < a for a, b in pairs]
        ordered = [(b, a) if swap else (a, b) for (a, b), swap in zip(pairs, swapped, strict=True)]
        margins = torch.empty(len(pairs), dtype=torch.float64, device="cpu")
        by_length = sorted(range(len(ordered)), key=lambda index: (-max(map(len, ordered[index])), index))
        with eval_mode(self):
            for start in range(0, len(by_length), batch_size):
                indices = by_length[start : start + batch_size]
                a, b = self([ordered[index] for index in indices])
                margins[indices] = self.margin(a.double().cpu(), b.double().cpu())
        # Equal responses give exactly 1/2, whatever the positions of their rows in the batch; NaN stays NaN.
        margins[[a == b for a, b in pairs]] *= 0.0
        margins = torch.where(torch.tensor(swapped, dtype=torch.bool, device="cpu"), -margins, margins)
        stronger = 0.5 + margins.abs()  # in [1/2, 1], where 1 - x is exact
        return torch.where(margins >= 0, stronger, 1.0 - stronger)


class PairwisePreferenceModel(ComparisonModel):
    """A model that reads both responses at once, so that it can represent any preference, cycles included.

    Args:
        model: a causal language model of transformers; its body is used as it is, not copied.
        tokenizer: the model's.
        template: text around the fields of a pair; None: the class's `TEMPLATE`.
        max_length: tokens of a row; None: the model's number of positions.
        overlong: "error" refuses longer rows, "truncate" truncates them.
    """

    KIND = "pairwise"
    FIELDS = ("prompt", "first", "second")
    TEMPLATE = (
        "Two answers to one request. Which of them is better?\n\nRequest:\n{prompt}\n\n"
        "First answer:\n{first}\n\nSecond answer:\n{second}\n\nIs the first one better?"
    )

    def encode(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[Rows]:
        rows = []
        for prompt, one, two in self.formatter.tokenize((prompts, first, second)):
            a = self.formatter.fill(prompt=prompt, first=one, second=two)
            b = self.formatter.fill(prompt=prompt, first=two, second=one)
            rows.append((a, b))
        return rows

    def pair_losses(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (softplus(-a) + softplus(b)) / 2

    def margin(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.sigmoid() - b.sigmoid()) / 2


class RewardModel(ComparisonModel):
    """A model that scores single responses by a reward; preferences are sigmoids of differences and have no cycles.

    Args:
        model: a causal language model of transformers; its body is used as it is, not copied.
        tokenizer: the model's.
        template: text around the fields of a pair; None: the class's `TEMPLATE`.
        max_length: tokens of a row; None: the model's number of positions.
        overlong: "error" refuses longer rows, "truncate" truncates them.
    """

    KIND = "reward"
    FIELDS = ("prompt", "response")
    TEMPLATE = (
        "How good is this answer to the request?\n\nRequest:\n{prompt}\n\nAnswer:\n{response}\n\nIt is this good:"
    )

    def encode(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[Rows]:
        return list(zip(self._encode(prompts, first), self._encode(prompts, second), strict=True))

    def _encode(self, prompts: Sequence[str], responses: Sequence[str]) -> list[list[int]]:
        tokens = self.formatter.tokenize((prompts, responses))
        return [self.formatter.fill(prompt=prompt, response=response) for prompt, response in tokens]

    def pair_losses(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return softplus(b - a)

    def margin(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ((a - b).abs().sigmoid() - 0.5).copysign(a - b)

    @torch.no_grad()
    def rewards(self, prompts: Sequence[str], responses: Sequence[str], batch_size: int = 16) -> torch.Tensor:
        """Return r(prompt, response), (N,) float32 on the CPU; only differences at one prompt have a meaning.

        Args:
            prompts, responses: N texts each.
            batch_size: rows of a forward pass.
        """
        check_integer("rewards", "batch_size", batch_size, 1, 10**6)
        rows = self._encode(prompts, responses)
        with eval_mode(self):
            parts = [self.logits(rows[i : i + batch_size]).cpu() for i in range(0, len(rows), batch_size)]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float32, device="cpu")


KINDS: dict[str, type[ComparisonModel]] = {kind.KIND: kind for kind in (PairwisePreferenceModel, RewardModel)}


def _body(model: Any) -> Any:
    """Return the model without its head over the vocabulary, whose output is the last hidden state."""
    transformers = need("transformers", "preference: a model")
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(
            f"preference: model: expected a causal language model of transformers; got {type(model).__name__} (an "
            "adapter is merged first, or put on afterwards: add_adapter)"
        )
    if has_injected_adapter(model):
        raise ValueError("preference: model: expected a model without adapters, whose saving would leave its own out")
    if model.config.is_encoder_decoder:
        raise ValueError(f"preference: model: expected a decoder-only model; got {type(model).__name__}")
    body: Any = model.base_model
    if body.get_output_embeddings() is not None:
        raise ValueError(
            f"preference: model: expected a model with a body apart from its head; got {type(model).__name__}"
        )
    _check_loadable(transformers, body)
    return body


def _check_loadable(transformers: Any, body: Any) -> None:
    """Raise where a saved body would not load: `AutoModel` may expect weights that it lacks (BERT's pooler)."""
    if not type(body).__module__.startswith("transformers."):
        return  # remote code: loading another instance would need trust_remote_code
    with torch.device("meta"):  # names alone, no memory
        again = transformers.AutoModel.from_config(body.config)
    lacking = sorted({name for name, _ in again.named_parameters()} - {name for name, _ in body.named_parameters()})
    if lacking:
        raise ValueError(
            f"preference: model: expected a body that transformers.AutoModel can load back; got {type(body).__name__} "
            f"without {lacking[0]}"
        )
