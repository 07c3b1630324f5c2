"""A head that several processes share: each holds the rows of some tokens, a slice of the vocabulary.

transformers loads heads this way (`DistributedConfig(tp_size=...)`): the weight is a DTensor with placement Shard(0) on
the mesh of the tensor-parallel processes, which read the same batches and compute the same loss.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch

TENSOR_PARALLEL = "tp"  # the name of a mesh's dimension in transformers and torchtitan
DATA_PARALLEL = ("fsdp", "dp_shard", "dp_replicate", "dp")  # dimensions of processes that read different batches


@dataclass(frozen=True)
class VocabularySlice:
    """The tokens [first, stop) of process `rank`, of `total`.

    Slices are those of `torch.chunk`: `widest` tokens each, and fewer, or none, in the last where the total does not
    divide.

    Args:
        group (ProcessGroup): the processes that share the vocabulary.
        rank (int): this process's, in the group.
        processes (int): of the group.
        total (int): tokens of the whole vocabulary.
    """

    group: Any
    rank: int
    processes: int
    total: int

    @property
    def widest(self) -> int:
        return -(-self.total // self.processes)

    @property
    def first(self) -> int:
        return min(self.rank * self.widest, self.total)

    @property
    def stop(self) -> int:
        return min(self.first + self.widest, self.total)

    @property
    def width(self) -> int:
        return self.stop - self.first

    def owners(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the rank that holds each token; -1 for ids outside the vocabulary.

        Args:
            tokens (int64): token ids.
        """
        inside = (tokens >= 0) & (tokens < self.total)
        return torch.where(inside, tokens // self.widest, -1)

    def gathered(self, part: torch.Tensor) -> torch.Tensor:  # (...) -> (processes, ...)
        """Return `part` of every process, in the order of their ranks: one collective.

        Args:
            part (tensor): this process's, of one shape everywhere.
        """
        result = torch.empty((self.processes, *part.shape), dtype=part.dtype, device=part.device)
        torch.distributed.all_gather(list(result.unbind(0)), part.contiguous(), group=self.group)
        return result

    def add_up(self, part: torch.Tensor) -> None:
        """Replace `part` by the sum over all processes: one collective.

        Args:
            part (tensor): this process's.
        """
        torch.distributed.all_reduce(part, group=self.group)


def is_dtensor(tensor: object) -> TypeGuard[Any]:
    """Return whether `tensor` is a DTensor. None exists unless its module has been imported.

    Args:
        tensor: anything.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def slice_of(tensor: Any, dim: int = 0) -> VocabularySlice | None:
    """Return this process's slice of a DTensor that tensor-parallel processes share; None of any other layout.

    Shard(dim) says only how a tensor is stored. FSDP stores its parameters the same way, on processes that read
    different batches. So the mesh's dimension must have the name that transformers and torchtitan give it.

    Args:
        tensor (DTensor): a head's weight or bias, or logits.
        dim (int): the dimension of the vocabulary.
    """
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = tensor.device_mesh, tensor.placements
    split = [index for index, placement in enumerate(placements) if placement != Replicate()]
    if len(split) != 1 or (mesh.mesh_dim_names or ())[split[0] : split[0] + 1] != (TENSOR_PARALLEL,):
        return None
    (index,) = split
    if type(placements[index]) is not Shard or placements[index].dim not in (dim, dim - tensor.ndim):
        return None
    part = VocabularySlice(mesh.get_group(index), mesh.get_local_rank(index), mesh.size(index), tensor.shape[dim])
    return part if tensor.to_local().shape[dim] == part.width else None


def same_slice(one: VocabularySlice | None, other: VocabularySlice | None) -> bool:
    """Return whether both are the same tokens, shared by the same processes; each mesh has its own groups.

    Args:
        one, other (VocabularySlice): of this process, or None.
    """
    if one is None or other is None:
        return one is other
    ranks = torch.distributed.get_process_group_ranks
    same_group = one.group is other.group or ranks(one.group) == ranks(other.group)
    return same_group and (one.first, one.total) == (other.first, other.total)


def trained_apart(tensor: Any) -> bool:
    """Return whether processes that read different batches share a DTensor, whose gradient is summed over them.

    Args:
        tensor (DTensor): a parameter.
    """
    from torch.distributed.tensor import Replicate

    names = tensor.device_mesh.mesh_dim_names or ()
    return any(
        name in DATA_PARALLEL
        for name, placement in zip(names, tensor.placements, strict=False)
        if placement != Replicate()
    )
