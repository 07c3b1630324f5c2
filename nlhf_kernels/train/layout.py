"""The layout of a model over processes: the slice of every parameter that each of them holds. No model is loaded here.

The three sizes mean what transformers' `DistributedConfig` means by them. Processes of one tensor-parallel group read
the same rows and hold slices of every matrix; FSDP2 shards the trained state (weights, gradients, the optimizer's
state) over `fsdp_size` groups; and `dp_replicate_size` replicas of these average their gradients.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.checks import check_integer

#: transformers' styles of tensor parallelism -> the dimension of a matrix that is split, counted from the last.
_SPLIT = {
    "colwise": -2, "colwise_gather_output": -2, "colwise_rep": -2, "packed_colwise": -2, "embedding_rowwise": -2,
    "rowwise": -1, "rowwise_split_input": -1, "rowwise_rep": -1, "packed_rowwise": -1, "embedding_colwise": -1,
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """The sizes of a run's process groups.

    Args:
        tp_size: processes of a tensor-parallel group.
        fsdp_size: tensor-parallel groups that the trained state is split over.
        dp_replicate_size: replicas of these groups.
    """

    tp_size: int = 1
    fsdp_size: int = 1
    dp_replicate_size: int = 1

    @property
    def processes(self) -> int:
        """Number of processes that the layout needs."""
        return self.tp_size * self.data_parallel

    @property
    def data_parallel(self) -> int:
        """Number of groups of processes that read different rows."""
        return self.fsdp_size * self.dp_replicate_size

    @property
    def sharded(self) -> bool:
        """Whether a process holds less than the whole model."""
        return self.tp_size > 1 or self.fsdp_size > 1

    def __str__(self) -> str:
        names = {"tp": self.tp_size, "fsdp": self.fsdp_size, "replicate": self.dp_replicate_size}
        return " x ".join(f"{name} {size}" for name, size in names.items() if size > 1) or "one process"


def layout_of(op: str, tp_size: int, fsdp_size: int, dp_replicate_size: int | None, processes: int) -> Layout:
    """Return the layout of a run, checked against its number of processes.

    Args:
        op: how an error begins.
        tp_size, fsdp_size: as in `Layout`.
        dp_replicate_size: as in `Layout`; None: as many as the processes allow.
        processes: of the run.
    """
    for name, size in (("tp_size", tp_size), ("fsdp_size", fsdp_size), ("dp_replicate_size", dp_replicate_size)):
        if size is not None:
            check_integer(op, name, size, 1, 2**20)
    shares = tp_size * fsdp_size
    layout = Layout(tp_size, fsdp_size, dp_replicate_size or max(1, processes // shares))
    if layout.processes != processes:
        expected = f"{layout.processes}" if dp_replicate_size else f"a multiple of {shares}"
        raise ValueError(
            f"{op}: tp_size: expected {expected} processes, for tp_size {tp_size}, fsdp_size {fsdp_size}"
            + (f", dp_replicate_size {dp_replicate_size}" if dp_replicate_size else "")
            + f"; got {processes}"
        )
    return layout


def check_divides(op: str, name: str, config: Any, tp_size: int) -> None:
    """Raise where tensor parallelism would cut a head or give processes unequal parts of the vocabulary.

    Args:
        op: how an error begins.
        name: the argument that the model came as.
        config: the model's configuration.
        tp_size: processes of a tensor-parallel group.
    """
    text = config.get_text_config(decoder=True)
    for field in ("num_attention_heads", "num_key_value_heads", "vocab_size"):
        value = getattr(text, field, None)
        if isinstance(value, int) and value % tp_size:
            raise ValueError(
                f"{op}: tp_size: expected a divisor of the {field} of {name}, {value}; got {tp_size} (fsdp_size shares "
                "a model without dividing it)"
            )


def check_optimizer(op: str, optim: Any, layout: Layout) -> None:
    """Raise for an optimizer that does not work on split parameters.

    Args:
        op: how an error begins.
        optim: transformers' name of it.
        layout: of the run.
    """
    name = str(getattr(optim, "value", optim))
    if layout.sharded and "adafactor" in name:
        raise ValueError(
            f"{op}: optim: expected an optimizer whose state has its parameters' shapes, AdamW say, for split models: "
            f"Adafactor keeps sums over rows and columns, and adds them up as if they were whole; got {name}"
        )


def share_of(name: str, shape: tuple[int, ...], plan: Mapping[str, str], layout: Layout) -> int:
    """Return how many numbers of a parameter the process with the most of them holds.

    Args:
        name: of the parameter.
        shape: of the whole parameter.
        plan: transformers' plan of tensor parallelism: names with * for a layer's number -> styles.
        layout: of the run.
    """
    sizes = list(shape)
    split = _split_dimension(name, plan)
    if split is not None and layout.tp_size > 1:
        if len(sizes) >= 2:
            sizes[split] = math.ceil(sizes[split] / layout.tp_size)
        elif sizes and split == -2:  # the bias of a layer whose outputs are split
            sizes[0] = math.ceil(sizes[0] / layout.tp_size)
    if sizes and layout.fsdp_size > 1:
        sizes[0] = math.ceil(sizes[0] / layout.fsdp_size)
    return math.prod(sizes)


def adapter_share_of(name: str, shape: tuple[int, ...], plan: Mapping[str, str], layout: Layout) -> int:
    """Return how many numbers of an adapter's parameter the process with the most of them holds: FSDP2 stores none, and
    tensor parallelism splits the outputs of lora_B, or the inputs of lora_A, as it splits the layer.

    Args:
        name: of the parameter, without peft's prefix.
        shape: of the whole parameter.
        plan: transformers' plan of tensor parallelism.
        layout: of the run.
    """
    layer, _, part = name.partition(".lora_")
    splits = {"A": -1, "B": -2}.get(part[:1]) == _split_dimension(f"{layer}.weight", plan)
    within = Layout(tp_size=layout.tp_size)
    return share_of(f"{layer}.weight", shape, plan, within) if part and splits else math.prod(shape)


def _split_dimension(name: str, plan: Mapping[str, str]) -> int | None:
    """Return the dimension of a matrix that tensor parallelism splits, counted from the last, or None."""
    generic = re.sub(r"\.\d+(?=\.|$)", ".*", name)
    return _SPLIT.get(plan.get(generic) or plan.get(generic.rpartition(".")[0]) or "")
