"""Uses of other libraries beyond their documented interfaces, and workarounds for torch.

Valid for torch 2.6 to 2.13, transformers 5.17 to 5.24, peft 0.14 to 0.21 and TRL 1.0 to 1.13, unless noted otherwise.
Each entry has a contract test that names it, in tests/test_upstream.py (TRL's: tests/test_trl_upstream.py).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from types import FrameType
from typing import Any

import torch

# ---- torch -----------------------------------------------------------------------------------------------------------


def viewed(tensor: torch.Tensor) -> torch.Tensor:
    """Return the base tensor of a view, and any other tensor itself."""
    return tensor if tensor._base is None else tensor._base


def version_of(tensor: torch.Tensor) -> int:
    """Return how often a tensor has been written to in place."""
    return tensor._version


def modules_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return a model's modules, each once, in the order of `modules()` and in a third of its time."""
    found: dict[torch.nn.Module, None] = {}
    stack: list[torch.nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        if module is not None and module not in found:
            found[module] = None
            stack.extend(reversed(module._modules.values()))
    return list(found)


def parameters_of(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return a model's parameters, each once, in the order of `parameters()` and in a third of its time."""
    values = (value for module in modules_of(model) for value in module._parameters.values())
    return list(dict.fromkeys(value for value in values if value is not None))


def copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy each source to its target, on a GPU by a few launches instead of one each."""
    if targets:
        torch._foreach_copy_(targets, sources)


def has_forward_hooks(module: torch.nn.Module) -> bool:
    """Return whether hooks run before or after this module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def uncompiled(model: Any) -> Any:
    """Return the model inside what torch.compile made of it, whose forward names its arguments."""
    return getattr(model, "_orig_mod", model)


@contextmanager
def finite_attention_gradients() -> Iterator[None]:
    """Keep cuDNN out of PyTorch's attention, around a forward pass and its backward pass.

    torch 2.11 to 2.13 on compute capability 9.0 (pytorch/pytorch#196678): where a mask is passed and the length is 64
    more than a multiple of 128, cuDNN's gradient of a query is NaN if the scores of its row are low or all masked, as
    they are where a text is padded on the left. Recomputed activations choose their kernel anew in the backward pass.
    """
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


@contextmanager
def keep_unsharded(module: Any) -> Iterator[None]:
    """Keep an FSDP2 module's parameters gathered after its forward pass, and restore its setting afterwards.

    PyTorch has a method that sets this, and none that reads it. torch 2.6 to 2.12: one group of parameters a
    module; 2.13: several.
    """
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    groups = [group for group in ([state._fsdp_param_group] if groups is None else groups) if group is not None]
    automatic = getattr(state, "_auto_reshard_after_forward", None)
    before = [group.post_forward_mesh_info for group in groups]
    module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for group, mesh_info in zip(groups, before, strict=True):
            group.post_forward_mesh_info = mesh_info
        if automatic is not None:
            state._auto_reshard_after_forward = automatic


def observing_operations(observe: Callable[[str, list[torch.Tensor]], None]) -> AbstractContextManager[Any]:
    """Return a context in which `observe` gets the name of every operation of PyTorch's, and the tensors it takes."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Observed(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            leaves = tree_leaves((arguments, options))
            observe(str(operation), [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
            return operation(*arguments, **(options or {}))

    context: AbstractContextManager[Any] = Observed()  # type: ignore[no-untyped-call]
    return context


def _included_keys() -> int:
    keys: int = torch._C._dispatch_tls_local_include_set().raw_repr()
    return keys


def _usual_keys() -> frozenset[int]:
    with torch.inference_mode():
        inference = _included_keys()
    return frozenset((_included_keys(), inference))


_USUAL_KEYS = _usual_keys()


def is_unobserved() -> bool:
    """Return whether an operator's call would only reach its implementation: no mode (of dispatch, of functions, of
    torch.func, of a tracer) is active in this thread, and no profiler."""
    return (
        _included_keys() in _USUAL_KEYS
        and not torch._C._len_torch_function_stack()
        and not torch._C._autograd._profiler_enabled()
    )


def under_function_transforms() -> bool:
    """Return whether a transform of torch.func (grad, vmap, ...) is at work in this thread."""
    return bool(torch._C._are_functorch_transforms_active())


def tensor_exchange() -> Any:
    """Return DLPack's capsule through which C reads tensors, `__dlpack_c_exchange_api__`. torch 2.6 to 2.9: None."""
    return getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)


def allocator(device: torch.device) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]:
    """Return (shape, strides, dtype) -> an uninitialised tensor on `device`. A GPU has to be the current one.

    torch 2.6 to 2.13: the functions of compiled code, at half the cost of torch.empty_strided.
    """
    fast = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    if fast is not None and device.type in ("cpu", "cuda"):
        return fast  # type: ignore[no-any-return]
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device)


# ---- triton ----------------------------------------------------------------------------------------------------------

TRITON_LAUNCHED_BY_ADDRESS = ((3, 6), (3, 7))  # versions whose compiled kernels `launch_by_address` can launch


def launch_by_address(
    compiled: Any, kernel: Any, grid: tuple[int, ...], stream: Any, arguments: Sequence[Any], options: Mapping[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
    """Return a function that launches a compiled kernel, and its arguments; None where Triton's own way is the only
    one.

    Args:
        compiled: what `kernel[grid](...)` returned, for the same grid, numbers and options.
        kernel: a triton.JITFunction.
        grid: programs along each axis.
        stream: its address, or what stands for it.
        arguments: the kernel's first parameters: addresses, or what stands for them, and numbers.
        options: its constants, the last of its parameters, and the launch's options.
    """
    if compiled is None or _triton_version() not in TRITON_LAUNCHED_BY_ADDRESS:
        return None
    constants = [options[name] for name in kernel.arg_names[len(arguments) :]]
    programs = (*grid, 1, 1)[:3]
    # The three None are the launch's description for hooks, and the hooks; see `triton_is_observed`.
    start = (*programs, stream, compiled.function, compiled.packed_metadata, None, None, None)
    return compiled.run, (*start, *arguments, *constants)


def triton_is_observed() -> bool:
    """Return whether launches must be reported to hooks, as those of Triton's profiler Proton."""
    runtime = _triton_runtime()
    return bool(runtime is None or runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def current_raw_stream(index: int) -> int:
    """Return the address of PyTorch's current stream on GPU `index`, without making a Stream of it."""
    stream: int = torch._C._cuda_getCurrentRawStream(index)
    return stream


@cache
def _triton_version() -> tuple[int, int]:
    major, minor = importlib.import_module("triton").__version__.split(".")[:2]
    return int(major), int(minor)


@cache
def _triton_runtime() -> Any:
    """Return Triton's settings for launches; None where they are not as in TRITON_LAUNCHED_BY_ADDRESS."""
    if _triton_version() not in TRITON_LAUNCHED_BY_ADDRESS:
        return None
    return importlib.import_module("triton.knobs").runtime


# ---- transformers: models --------------------------------------------------------------------------------------------

#: The names of a Cache in a model's forward and generate(). transformers 5.17 to 5.23: the first, and the second in
#: recurrent models; 5.24: the third, in all of them.
CACHES = ("past_key_values", "cache_params", "cache")


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """Return the name of the argument by which `forward` takes a Cache of transformers, or None.

    XLM and Flaubert take a `cache` that is a dict, in all versions.
    """
    parameters = inspect.signature(forward).parameters
    names = [name for name in CACHES if name in parameters and "dict" not in str(parameters[name].annotation)]
    return names[0] if names else None


def attention_name(config: Any) -> str | None:
    """Return the attention implementation that a configuration names; its models look it up in every forward."""
    name: str | None = getattr(config, "_attn_implementation", None)
    return name


def names_attention(config: Any) -> bool:
    """Return whether a configuration can name one; that of a submodel without attention may name none."""
    return hasattr(config, "_attn_implementation")


def set_attention_name(config: Any, name: str | None) -> None:
    """Set another, without the checks of `set_attn_implementation`, which an earlier name has passed."""
    config._attn_implementation = name


@cache
def eager_masks_copy_from_host() -> bool:
    """Return whether masks of eager attention contain a number that is copied from the host, which capture refuses.

    transformers 5.17: they do; 5.23: they do not.
    """
    from transformers.masking_utils import eager_mask

    return "torch.tensor(" in inspect.getsource(eager_mask)


@cache
def longrope_reads_positions() -> bool:
    """Return whether rotations of the kind longrope compare positions on the host, which capture refuses.

    transformers 5.17: they do; 5.23: they do not.
    """
    from transformers.modeling_rope_utils import dynamic_rope_update

    return "if seq_len > original_max_position_embeddings" in inspect.getsource(dynamic_rope_update)


def experts_name(config: Any) -> str | None:
    """Return the implementation of mixtures of experts that a configuration names."""
    name: str | None = getattr(config, "_experts_implementation", None)
    return name


def hands_attention_over(model: Any) -> bool:
    """Return whether a model declares that its layers attend through AttentionInterface."""
    return bool(getattr(model, "_supports_attention_backend", False))


def keeps_recurrent_state(model: Any) -> bool:
    """Return whether a model declares that its cache holds more than keys and values."""
    return bool(getattr(model, "_is_stateful", False))


def is_mask_within_window(mask_function: Callable[..., Any]) -> bool:
    """Return whether a mask function is a conjunction of others, as those of sliding windows are."""
    return mask_function.__name__ == "and_mask"


def has_injected_adapter(model: Any) -> bool:
    """Return whether `add_adapter` or `load_adapter` of transformers has put an adapter into a model of its own."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


# ---- transformers: models that several processes share ---------------------------------------------------------------


def distributed_config_class() -> Any:
    """Return transformers' DistributedConfig where it has the three sizes; None where it is too old for them."""
    try:
        from transformers.distributed import DistributedConfig  # type: ignore[attr-defined]
    except ImportError:
        return None
    known = inspect.signature(DistributedConfig).parameters
    return DistributedConfig if {"tp_size", "fsdp_size", "dp_replicate_size"} <= known.keys() else None


def plain_class(module: Any) -> Any:
    """Return the class of a module as it was written; FSDP2 derives one of its own from it.

    Args:
        module: a torch.nn.Module.
    """
    kind = type(module)
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule

        if isinstance(module, FSDPModule):
            return kind.__mro__[2]
    return kind


def skeleton(model: Any) -> Any:
    """Return a model of the same class and configuration on the meta device, split as `model` is by tensor parallelism
    alone: without FSDP2's wrappers, whose modules cannot be copied.

    Args:
        model: a model of transformers.
    """
    from copy import deepcopy

    kind, config = plain_class(model), deepcopy(model.config)
    split = getattr(config, "distributed_config", None)
    config.distributed_config = None
    with torch.device("meta"):
        result = kind(config)
    set_attention_name(result.config, attention_name(model.config))
    manager = getattr(model, "_mesh_manager", None)
    if split is not None and manager is not None and split.tp_size > 1:
        head = result.get_output_embeddings() if hasattr(result, "get_output_embeddings") else None
        if head is not None:  # plans address parameters by name, and a tied head has none; it is tied again below
            head.weight = torch.nn.Parameter(torch.empty_like(head.weight))
        alone = distributed_config_class()(tp_size=split.tp_size, tp_plan=split.tp_plan)
        result = kind.maybe_distribute_model(result, alone, manager)
    result.tie_weights()
    return result


@contextmanager
def accepting_split_models(args: Any) -> Iterator[None]:
    """Let Trainer's constructor accept a split model, which it and accelerate refuse although it works.

    transformers 5.23 and 5.24 refuse a save_strategy, as their own checkpoints of such models cannot be resumed.
    accelerate 1.15 refuses tensor parallelism on a CPU, though it only informs data loaders of it.

    Args:
        args: TrainingArguments.
    """
    from accelerate import ParallelismConfig

    before, check = args.save_only_model, ParallelismConfig._validate_accelerator
    args.save_only_model = True
    if args.device.type == "cpu":
        ParallelismConfig._validate_accelerator = lambda *_: None
    try:
        yield
    finally:
        args.save_only_model = before
        ParallelismConfig._validate_accelerator = check


# ---- transformers: generate() and the Trainer ------------------------------------------------------------------------


def dropped_by_generate(caller: FrameType | None) -> dict[str, Any]:
    """Return, from generate()'s frame, the arguments that it passes to no custom function; none for other callers."""
    given = caller.f_locals if caller is not None and caller.f_code.co_name == "generate" else {}
    return {name: given[name] for name in ("streamer", "assistant_model") if given.get(name) is not None}


#: Methods of Trainer that NashTrainer overrides, and their arguments.
TRAINER_METHODS = {
    "_get_output_dir": ("self", "trial"),
    "_load_best_model": ("self",),
    "_load_from_checkpoint": ("self", "resume_from_checkpoint", "model"),
    "_load_optimizer_and_scheduler": ("self", "checkpoint"),
    "_save": ("self", "output_dir", "state_dict"),
    "_save_checkpoint": ("self", "model", "trial"),
    "_save_optimizer_and_scheduler": ("self", "output_dir"),
}


def wandb_of(callback: Any) -> Any:
    """Return the wandb module that a WandbCallback reports to; None where there is none."""
    return callback._wandb


# ---- peft ------------------------------------------------------------------------------------------------------------


def plain_lora_layers() -> tuple[type, ...]:
    """Return peft's layers whose forward is their base layer's plus `lora_B(lora_A(x)) * scaling`."""
    from peft.tuners import lora

    names = ("Linear", "Linear8bitLt", "Linear4bit")  # the last two where bitsandbytes is installed
    return tuple(getattr(lora, name) for name in names if hasattr(lora, name))


#: peft's kinds of adapters that act within layers, on every token independently. X-LoRA, Poly, Shadow and
#: adaption prompts do something in between layers; Lily takes a mean over all tokens of a batch.
ADAPTERS_PER_TOKEN = {
    "LORA", "ADALORA", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA",
    "IA3", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA",
    "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT",
}  # fmt: skip
#: LoRA's initialisations that leave the base's weights as they are; pissa, olora, corda, loftq and lora_ga change them.
INITS_BESIDE_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")


# ---- accelerate ------------------------------------------------------------------------------------------------------


def fully_shard_by_accelerate(accelerator: Any, model: Any) -> Any:
    """Shard a model in place as `Accelerator.prepare` does with its FSDP2 plugin, and return it; one that is sharded
    already is left as it is.

    Args:
        accelerator: with the plugin.
        model: a whole model.
    """
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    return fsdp2_prepare_model(accelerator, model)


#: Where accelerate leaves a model's own forward when it wraps it: both in the instance's __dict__.
WRAPPED_FORWARD = ("forward", "_original_forward")


# ---- TRL 1.0 to 1.13 -------------------------------------------------------------------------------------------------

TRL_OLDEST, TRL_BEFORE = (1, 0), (1, 14)  # versions; 1.14 has no NashMDTrainer
_TRL_EXPECTED = "expected TRL 1.0 to 1.13"
TRL_NASH_MD = "trl.experimental.nash_md"
#: Methods of TRL's NashMDTrainer that are replaced, and their arguments.
TRL_METHODS = {
    "_generate_completions": ("model", "prompts"),
    "_compute_logprobs": ("model", "model_data", "context_length"),
    "_compute_losses": ("model_logprobs_model_data", "ref_logprobs_model_data", "probability"),
    "training_step": ("model", "inputs", "num_items_in_batch"),
}
#: Attributes of TRL's NashMDTrainer that are read: the schedules behind its properties `beta` and `mixture_coef`, its
#: sampling options, and its frozen reference, None where that is the policy's base.
TRL_ATTRIBUTES = ("_beta", "_mixture_coef", "generation_kwargs", "ref_model")


def trl_trainer_class(op: str) -> Any:
    """Return the installed TRL's NashMDTrainer. Raise where there is none, or one that is not known."""
    version = _trl_version(op)
    numbers = tuple(int(part) if part.isdigit() else -1 for part in version.split(".")[:2])
    if not TRL_OLDEST <= numbers < TRL_BEFORE:
        raise RuntimeError(
            f"{op}: {_TRL_EXPECTED}; found {version} (NashMDTrainer of nlhf_kernels.integrations.trl needs none)"
        )
    try:
        return importlib.import_module(TRL_NASH_MD).NashMDTrainer
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "trl"):
            raise
        raise ImportError(
            f"{op}: TRL {version} imports {package} for its NashMDTrainer and does not bring it: pip install {package}"
        ) from error


def check_trl_methods(op: str, trainer: Any) -> None:
    """Raise where the methods that are replaced take other arguments than TRL's do."""
    for name, arguments in TRL_METHODS.items():
        arguments_there = tuple(inspect.signature(getattr(trainer, name)).parameters)
        if arguments_there != ("self", *arguments):
            raise RuntimeError(
                f"{op}: {_TRL_EXPECTED} as released; found {_trl_version(op)} whose NashMDTrainer.{name} takes "
                f"{', '.join(arguments_there)}"
            )


def trl_schedule(trainer: Any, name: str) -> Any:
    """Return `beta` or `mixture_coef` as it was given: a number, or a list by epoch."""
    return getattr(trainer, f"_{name}")


def _trl_version(op: str) -> str:
    try:
        return str(getattr(importlib.import_module("trl"), "__version__", "unknown"))
    except ImportError as error:
        raise ImportError(f"{op}: {_TRL_EXPECTED}; found none: pip install 'trl>=1.0,<1.14'") from error
