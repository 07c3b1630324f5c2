"""The processes of a training: the groups that read different rows, their sums, and calls of judges.

Processes of one tensor-parallel group hold slices of one model and read the same rows, so rows, means and calls of
judges are per group, not per process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from ..core.identity import describe
from ..core.vocabulary import is_dtensor
from .layout import Layout
from .sharded import local


class DataParallel:
    """The groups of processes that read different rows.

    Args:
        accelerator: of the trainer.
        layout: of its models.
    """

    def __init__(self, accelerator: Any, layout: Layout) -> None:
        self.accelerator, self.layout = accelerator, layout
        self.device: torch.device = accelerator.device
        self.groups: int = accelerator.num_processes // layout.tp_size
        self.group: int = accelerator.process_index // layout.tp_size  # a mesh's last dimension is tensor parallelism's
        self.name = "processes" if layout.tp_size == 1 else f"groups of {layout.tp_size} processes"

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum over all groups. All processes must call.

        Args:
            value: this group's, the same on all its processes.
        """
        total: torch.Tensor = self.accelerator.reduce(value, reduction="sum")
        return total / self.layout.tp_size if self.layout.tp_size > 1 else total

    def all_finite(self, gradients: Sequence[torch.Tensor]) -> bool:
        """Return whether all gradients are finite, the same on all processes.

        Args:
            gradients: of the model, after they have been reduced.
        """
        if not self.layout.sharded:
            return bool(torch.nn.utils.get_total_norm(gradients).isfinite())
        wrong = torch.stack([(~local(value).isfinite()).any() for value in gradients]).any().float()
        return not bool(self.accelerator.reduce(wrong, reduction="sum") > 0)

    def ask_once(self, judge: Any) -> Any:
        """Return a judge or reward that only the first process of each group calls, for all of them.

        A judge whose model is split over the group is called by all its processes, which compute together.

        Args:
            judge: a Judge or a Reward; None stays None.
        """
        if judge is None or self.layout.tp_size == 1 or any(map(is_dtensor, _parameters(judge, set()))):
            return judge
        first = self.accelerator.process_index - self.accelerator.process_index % self.layout.tp_size
        ranks = range(0, self.accelerator.num_processes, self.layout.tp_size)
        groups = [
            torch.distributed.new_group(range(rank, rank + self.layout.tp_size), backend="gloo") for rank in ranks
        ]
        return AskedOnce(judge, first, groups[self.group])


class AskedOnce:
    """A judge or reward that one process calls; the others of its group get the result, or the error.

    Args:
        judge: the judge or reward.
        first: the rank that calls it.
        group: the processes that get the result.
    """

    def __init__(self, judge: Callable[..., Any], first: int, group: Any) -> None:
        self.judge, self.first, self.group = judge, first, group
        self.__name__ = str(getattr(judge, "__name__", type(judge).__name__))

    @property
    def identity(self) -> str:
        """Identity of the judge in checkpoints, independent of the number of processes."""
        return describe(self.judge)

    def __call__(self, *texts: Sequence[str]) -> Any:
        share = partial(torch.distributed.broadcast_object_list, src=self.first, group=self.group)
        calls = torch.distributed.get_rank() == self.first
        return result_of_one(partial(self.judge, *texts), calls, share, f"process {self.first} asked")


def result_of_one(act: Callable[[], Any], acts: bool, share: Callable[[list[Any]], Any], failed: str) -> Any:
    """Return the result of a function that one process calls on all of them, or raise its error on all of them.

    Args:
        act: the function.
        acts: whether this process calls it.
        share: overwrites a list by that of the process that acts; all processes call it.
        failed: how the error begins on the others.
    """
    message: list[Any] = [None, None]  # the result, the error
    raised: Exception | None = None
    if acts:
        try:
            message[0] = act()
        except Exception as error:
            raised, message[1] = error, f"{type(error).__name__}: {error}"
    share(message)
    if raised is not None:
        raise raised
    if message[1] is not None:
        raise RuntimeError(f"{failed}: {message[1]}")
    return message[0]


def _parameters(value: Any, visited: set[int]) -> Iterator[torch.Tensor]:
    """Yield the parameters of all models that a judge holds in attributes, lists and the like."""
    if id(value) in visited or isinstance(value, str | int | float | torch.Tensor):
        return
    visited.add(id(value))
    if isinstance(value, torch.nn.Module):
        yield from value.parameters()
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _parameters(part, visited)
    else:
        for part in (getattr(value, "__self__", None), *getattr(value, "__dict__", {}).values()):
            yield from _parameters(part, visited)
