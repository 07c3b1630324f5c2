"""Models that several processes share, decoded by all of them in step.

Tensor parallelism splits every layer: the processes read the same texts, and each layer sums their partial results.
FSDP shards every parameter: the processes read different texts, and gather a layer's parameters to use it. Both are
transformers' and PyTorch's own. Decoding adds logits that stay in slices of the vocabulary, parameters that are
gathered once per rollout, and the collectives without which one process would wait for another for ever.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from ..core.modes import eval_mode
from ..core.upstream import keep_unsharded
from ..core.vocabulary import TENSOR_PARALLEL, VocabularySlice, is_dtensor, same_slice, slice_of
from .contexts import exact_products, no_autocast, replaced_forward
from .graphs import CAPTURE_ERROR_MODE
from .model_info import ModelInfo


class Sharding:
    """How the models of an engine are shared.

    Args:
        op (str): the engine's name in errors.
        infos (mapping of ModelInfo): the models by their roles, the policy first.

    Attributes:
        tensor_parallel: the process group that splits layers; None: none does.
        fsdp: models whose parameters are sharded.
        fsdp_group: the process group that stores them; None: there are none.
        part: this process's slice of the vocabulary, where all heads are split alike; None: logits are whole.
        notes: fast paths that are not taken, and why.
    """

    def __init__(self, op: str, infos: Mapping[str, ModelInfo]) -> None:
        self.op = op
        self.notes: list[str] = []
        models = [info.model for info in infos.values()]
        self.fsdp = [model for model in models if any(True for _ in fsdp_modules(model))]
        groups = {role: _groups(info.model) for role, info in infos.items()}
        self.tensor_parallel = self._common("layers", {role: split for role, (split, _) in groups.items()})
        self.fsdp_group = self._common("storage", {role: stored for role, (_, stored) in groups.items()})
        self.part: VocabularySlice | None = None
        if self.tensor_parallel is not None:
            self.part = self._common_slice(infos)
        self._captured: bool | str | None = False  # not determined yet

    def _common(self, what: str, groups: Mapping[str, Any]) -> Any:
        """Return the one process group of all models, or None; raise where they differ."""
        first = next(iter(groups.values()))
        for role, group in groups.items():
            if _ranks(group) != _ranks(first):
                raise ValueError(
                    f"{self.op}: {role}: expected a model shared as the policy is, by processes {_ranks(first)} "
                    f"({what}); got {_ranks(group)}"
                )
        return first

    def _common_slice(self, infos: Mapping[str, ModelInfo]) -> VocabularySlice | None:
        parts, reasons = [], []
        for role, info in infos.items():
            part, reason = _slice_of_logits(info)
            parts.append(part)
            reasons += [] if reason is None else [f"the {role}'s {reason}"]
        if not reasons and not all(same_slice(part, parts[0]) for part in parts):
            reasons.append("heads are not all split alike")
        if agreed(not reasons, self.tensor_parallel):
            return parts[0]
        reason = "; ".join(reasons) or "another process cannot"
        self.notes.append(f"logits are gathered before every draw: {reason}")
        return None

    @property
    def in_step(self) -> bool:
        """Whether processes must take the same steps at the same time: a forward pass waits for the others."""
        return self.tensor_parallel is not None or self.fsdp_group is not None

    def agree(self, seed: int | None, ids: torch.Tensor, mask: torch.Tensor, new_tokens: int) -> int | None:
        """Return one seed for all processes, and check that their requests agree.

        Processes that split layers must have the same prompts: their layers sum partial results.

        Args:
            seed: of this process; None where the caller gave none.
            ids, mask ((P, S) int64): the prompts.
            new_tokens: of each response, at most.
        """
        if not self.in_step:
            return seed
        proposed = seed if seed is not None else int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))
        weights = torch.arange(1, ids.numel() + 1, dtype=torch.int64, device=ids.device).view_as(ids)
        text = int(((ids + 1) * mask * weights).sum())
        if self.tensor_parallel is not None:
            request = [*ids.shape, text, new_tokens, seed is not None, proposed if seed is not None else 0]
            everyone = _gathered([*request, proposed], self.tensor_parallel, ids.device)
            if any(other[:-1] != everyone[0][:-1] for other in everyone):
                raise ValueError(
                    f"{self.op}: input_ids: expected the same prompts, settings and seed in all processes that share a "
                    "model's layers; got (rows, length, checksum, new tokens, seeded, seed) of "
                    f"{[other[:-1] for other in everyone]}"
                )
            proposed = everyone[0][-1]
        if self.fsdp_group is not None:
            lengths = [other[0] for other in _gathered([new_tokens], self.fsdp_group, ids.device)]
            if len(set(lengths)) > 1:
                raise ValueError(
                    f"{self.op}: max_new_tokens: expected the same in all processes that share a model's parameters; "
                    f"got {lengths}"
                )
        return proposed

    def any_open(self, gather: bool) -> Callable[[bool], bool] | None:
        """Return the reduction of "a row is open" over processes whose steps wait for each other; None: none wait.

        Processes that split layers have the same rows. Those that store parameters have rows of their own, and wait for
        each other unless the parameters are gathered.

        Args:
            gather (bool): whether FSDP's parameters are gathered for the rollout.
        """
        if self.fsdp_group is not None and not gather:
            return lambda is_open: not agreed(not is_open, self.fsdp_group)
        return None if self.tensor_parallel is None else lambda is_open: is_open

    def gathered_bytes(self) -> int:
        """Return what gathering allocates; the parts stay where they are."""
        parameters = [parameter for model in self.fsdp for parameter in model.parameters() if is_dtensor(parameter)]
        split_by = 1 if self.tensor_parallel is None else torch.distributed.get_world_size(self.tensor_parallel)
        return int(sum(parameter.numel() * parameter.element_size() for parameter in parameters)) // split_by

    @contextmanager
    def decoding(self, infos: Iterable[ModelInfo], slices: bool, gather: bool) -> Iterator[None]:
        """Keep logits in slices and parameters gathered, as asked for, and restore all afterwards.

        Args:
            infos (iterable of ModelInfo): the models.
            slices (bool): keep the logits in slices of the vocabulary.
            gather (bool): gather FSDP's parameters.
        """
        with ExitStack() as stack:
            for model in self.fsdp if gather else ():
                stack.enter_context(_unsharded(model))
            for info in infos if slices else ():
                stack.enter_context(_head_forward(info, _local_product))
            yield

    def why_not_captured(self, device: torch.device) -> str | None:
        """Return why a step with collectives cannot be recorded, or None; determined once, by recording one.

        Args:
            device (torch.device): the models'.
        """
        if self.fsdp_group is not None:
            return "FSDP gathers parameters from the host"
        if self.tensor_parallel is None:
            return None
        if self._captured is False:
            self._captured = _why_not_captured(self.tensor_parallel, device)
        return self._captured  # type: ignore[return-value]


def check_not_shared(op: str, policy: Any) -> None:
    """Check that a policy's modules can be copied around other parameters: shared ones are bound to their own.

    Args:
        op (str): the name in errors.
        policy (torch.nn.Module): the policy.
    """
    parameters = policy.parameters() if isinstance(policy, torch.nn.Module) else ()
    if any(map(is_dtensor, parameters)):
        raise ValueError(
            f"{op}: opponent: expected a model, loaded and shared as the policy; got a mapping of parameters, for "
            "which the policy's modules would be copied, and shared ones keep to the original's parameters"
        )


def agreed(yes: bool, group: Any, device: torch.device | None = None) -> bool:
    """Return whether `yes` is true in all processes of the group: one collective.

    Args:
        yes (bool): the value of this process.
        group (ProcessGroup): the processes.
        device (torch.device): of the tensor that is sent; None: the CPU, or the current GPU under NCCL.
    """
    return all(other[0] for other in _gathered([int(yes)], group, device or _device_of(group)))


def fsdp_modules(model: torch.nn.Module) -> Iterator[Any]:
    """Yield the modules that FSDP2 gathers one by one, outermost first.

    Args:
        model (torch.nn.Module): any model.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:  # else no model has such modules
        yield from (module for module in model.modules() if isinstance(module, fsdp.FSDPModule))


# ---- heads -----------------------------------------------------------------------------------------------------------


def _head_forward(
    info: ModelInfo, product: Callable[[Any, torch.Tensor], torch.Tensor]
) -> AbstractContextManager[None]:
    """Replace the head's forward by `product(head, hidden states)`."""
    head: Any = info.model.get_output_embeddings()  # type: ignore[operator]
    return replaced_forward(head, partial(product, head))


def _local_product(head: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits of this process's slice; transformers would gather all."""
    bias = head.bias.to_local() if is_dtensor(head.bias) else head.bias
    return torch.nn.functional.linear(hidden, head.weight.to_local(), bias)


def _slice_of_logits(info: ModelInfo) -> tuple[VocabularySlice | None, str | None]:
    """Return this process's slice of the head, or why logits cannot stay in slices, by two forward passes."""
    head: Any = info.model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, torch.nn.Linear):
        return None, f"head is a {type(head).__name__}"
    slices: list[VocabularySlice | None] = []
    usual = head.forward

    def look(_: Any, hidden: torch.Tensor) -> torch.Tensor:
        weight, bias = head.weight, head.bias
        part = slice_of(weight) if is_dtensor(weight) else None
        whole_bias = bias is not None and not (is_dtensor(bias) and same_slice(slice_of(bias), part))
        slices.append(None if whole_bias else part)
        return usual(hidden)

    token = torch.zeros(1, 2, dtype=torch.int64, device=info.device)
    inputs = {"input_ids": token, "attention_mask": torch.ones_like(token), "use_cache": False}
    accepted = {name: value for name, value in inputs.items() if name in info.accepted}
    with no_autocast(info.device), eval_mode(info.model), exact_products():
        with _head_forward(info, look):
            whole = info.model(**accepted, return_dict=True).logits
        part = slices[0] if slices else None
        if part is None or part.total != whole.shape[-1]:
            return None, "head is not split along the vocabulary"
        if part.widest * (part.processes - 1) >= part.total:
            return None, f"vocabulary, of {part.total} tokens, leaves a process without any"
        with _head_forward(info, _local_product):
            local = info.model(**accepted, return_dict=True).logits
    expected = whole[..., part.first : part.stop].float()
    allowed = 1e-2 * float(expected.abs().max())
    if local.shape != expected.shape or not bool(((local.float() - expected).abs() <= allowed).all()):
        return None, "logits depend on more than a head's own columns"
    return part, None


# ---- parameters ------------------------------------------------------------------------------------------------------


@contextmanager
def _unsharded(model: torch.nn.Module) -> Iterator[None]:
    """Gather a model's parameters, once, and keep them gathered."""
    modules = list(fsdp_modules(model))
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(keep_unsharded(module))
        try:
            for module in modules:
                module.unshard()
            yield
        finally:
            for module in modules:
                module.reshard()


def _groups(model: torch.nn.Module) -> tuple[Any, Any]:
    """The process groups that split a model's layers, and that store its parameters; None where there are none."""
    split, stored = None, None
    managed = any(True for _ in fsdp_modules(model))
    for parameter in filter(is_dtensor, model.parameters()):
        from torch.distributed.tensor import Replicate

        mesh = parameter.device_mesh
        names = mesh.mesh_dim_names or ("",) * mesh.ndim
        for dim, placement in enumerate(parameter.placements):
            if placement == Replicate():
                continue
            if names[dim] == TENSOR_PARALLEL or not managed:
                split = mesh.get_group(dim)
            else:
                stored = mesh.get_group(dim)
    return split, stored


# ---- processes -------------------------------------------------------------------------------------------------------


def _ranks(group: Any) -> list[int]:
    return [] if group is None else torch.distributed.get_process_group_ranks(group)


def _device_of(group: Any) -> torch.device:
    on_gpu = torch.distributed.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _gathered(numbers: list[int], group: Any, device: torch.device) -> list[list[int]]:
    """Return the numbers of every process of the group, in the order of their ranks."""
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    everyone = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(everyone, own, group=group)
    return torch.stack(everyone).tolist()


def _why_not_captured(group: Any, device: torch.device) -> str | None:
    backend = torch.distributed.get_backend(group)
    if backend != "nccl":
        return f"collectives of {backend} cannot be recorded"
    processes, reason = torch.distributed.get_world_size(group), None
    try:
        total = torch.ones(8, dtype=torch.float32, device=device)
        torch.distributed.all_reduce(total, group=group)  # initialises the communicator
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode=CAPTURE_ERROR_MODE):
            torch.distributed.all_reduce(total, group=group)
        graph.replay()
        if not bool((total == processes**2).all()):
            reason = "a recorded collective gave another sum"
    except RuntimeError as error:
        reason = f"recording a collective failed ({error})"
    return reason if agreed(reason is None, group, device) else reason or "another process cannot record collectives"
