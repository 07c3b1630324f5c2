"""Which KL modes are unbiased: the expected gradient by exact enumeration of all sequences, against the true gradient.

The objective is E[P(y)] - tau KL(pi, mu) over sequences, for a policy with its own logits after every prefix, in
float64. The estimator is the library's own, called on every sequence and weighted with the sequence's probability.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import nlhf_kernels

TAU = 0.7


class TinyLanguage:
    """Enumerate sequences of `length` tokens of V, with a policy and a reference of separate logits per prefix."""

    def __init__(self, vocabulary: int, length: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.sequences = torch.tensor(list(itertools.product(range(vocabulary), repeat=length)))  # (S, T)
        prefixes = {
            prefix: index
            for index, prefix in enumerate(
                prefix for n in range(length) for prefix in itertools.product(range(vocabulary), repeat=n)
            )
        }
        self.prefix_of = torch.tensor(
            [[prefixes[tuple(s[:n])] for n in range(length)] for s in self.sequences.tolist()]
        )
        shape = (len(prefixes), vocabulary)
        self.theta = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        self.mu = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.preference = torch.rand(len(self.sequences), generator=generator, dtype=torch.float64)

    def log_probability(self, table: torch.Tensor) -> torch.Tensor:  # (S,)
        by_token = table.log_softmax(-1)[self.prefix_of].gather(2, self.sequences.unsqueeze(2))
        return by_token.squeeze(2).sum(1)

    def true_gradient(self) -> torch.Tensor:
        log_pi, log_mu = self.log_probability(self.theta), self.log_probability(self.mu)
        objective = (log_pi.exp() * (self.preference - TAU * (log_pi - log_mu))).sum()
        return torch.autograd.grad(objective, self.theta)[0]

    def samples(self, kl: str, entrance: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each sequence's gradient estimate, (S, prefixes, V), and the sequences' probabilities."""
        estimates = []
        for s in range(len(self.sequences)):
            logits = self.theta[self.prefix_of[s : s + 1]]
            reference = self.mu[self.prefix_of[s : s + 1]]
            common = (self.sequences[s : s + 1], self.preference[s : s + 1])
            if entrance == "logits":
                result = nlhf_kernels.nash_pg_loss(logits, *common, reference, tau=TAU, kl=kl)
            else:
                head = torch.eye(logits.shape[-1], dtype=torch.float64)
                result = nlhf_kernels.linear_nash_pg_loss(
                    logits, head, *common, reference, head, tau=TAU, kl=kl, chunk_bytes=48
                )
            estimates.append(-torch.autograd.grad(result.loss, self.theta)[0])
        return torch.stack(estimates), self.log_probability(self.theta).exp().detach()


def relative_bias(language: TinyLanguage, kl: str, entrance: str = "logits") -> float:
    estimates, probability = language.samples(kl, entrance)
    truth = language.true_gradient()
    expected = (estimates * probability[:, None, None]).sum(0)
    return float((expected - truth).norm() / truth.norm())


@pytest.mark.parametrize("kl", ["sequence", "to_go", "exact"])
@pytest.mark.parametrize(("vocabulary", "length"), [(2, 2), (3, 2), (2, 4), (3, 3), (2, 6)])
def test_unbiased(vocabulary, length, kl) -> None:
    assert relative_bias(TinyLanguage(vocabulary, length), kl) < 1e-12


@pytest.mark.parametrize("kl", ["sequence", "to_go", "exact"])
def test_unbiased_from_hidden_states(kl) -> None:
    assert relative_bias(TinyLanguage(2, 4), kl, "hidden") < 1e-12


def test_the_token_mode_is_biased_and_more_so_the_longer_the_response() -> None:
    bias = [sum(relative_bias(TinyLanguage(2, length, seed), "token") for seed in range(4)) / 4 for length in (2, 4, 6)]
    assert bias[0] > 0.01 and bias[0] < bias[1] < bias[2], bias


def test_variance_falls_from_sequence_to_go_to_exact() -> None:
    """The order holds for the average over policies; a single policy may reverse it."""
    total = dict.fromkeys(("sequence", "to_go", "exact"), 0.0)
    for seed in range(4):
        language = TinyLanguage(2, 5, seed)
        truth = language.true_gradient()
        for kl in total:
            estimates, probability = language.samples(kl, "logits")
            total[kl] += float(((estimates - truth).square().sum((1, 2)) * probability).sum())
    assert total["sequence"] > total["to_go"] > total["exact"], total


def test_the_paper_gradient_at_the_fixed_point_vanishes() -> None:
    """At pi proportional to mu exp(P / tau) the expected gradient is 0: one-token responses are a tabular game."""
    language = TinyLanguage(3, 1)
    with torch.no_grad():
        language.theta.copy_(language.mu.log_softmax(-1) + language.preference / TAU)
    for kl in ("sequence", "to_go", "exact"):
        estimates, probability = language.samples(kl, "logits")
        assert (estimates * probability[:, None, None]).sum(0).abs().max() < 1e-12
