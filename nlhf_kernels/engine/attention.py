"""`decode_attention` as an attention implementation of transformers: `model.set_attn_implementation("nlhf_decode")`.

Registered through transformers' public AttentionInterface and AttentionMaskInterface. Inside a `decode_window`, and
without gradients, a step of one token takes the kernel: no mask is made, no key or value is copied. Everything else
(prefill, training) takes transformers' sdpa, or the plain softmax below where sdpa lacks a feature (soft caps, sinks).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ..core.checks import FLOATS
from ..core.upstream import (
    attention_name,
    hands_attention_over,
    is_mask_within_window,
    modules_of,
    names_attention,
    set_attention_name,
)
from ..ops import current_decode_window, decode_attention, decode_window

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import causal_mask_function, sdpa_mask
except ImportError as error:
    raise ImportError("nlhf_kernels.engine needs transformers: pip install nlhf-kernels[transformers]") from error

NAME = "nlhf_decode"
_PROBE = "nlhf_decode_probe"
REPLACED = ("sdpa", "eager")  # models' defaults; any other attention was set by the user and stays


def _is_decoding(query_length: int) -> bool:
    return query_length == 1 and current_decode_window() is not None and not torch.is_grad_enabled()


def _is_range(mask_function: Callable[..., Any], local_size: int | None, use_vmap: bool, config: Any, **_: Any) -> bool:
    """Whether the mask is causal, or causal within the model's sliding window, and nothing else (chunks, blocks, masks
    of a model's own). If transformers renames its functions, a mask is built, and the result is still right."""
    if use_vmap:
        return False
    if local_size is None:
        return mask_function is causal_mask_function
    chunked = getattr(config, "attention_chunk_size", None) is not None
    return is_mask_within_window(mask_function) and local_size == getattr(config, "sliding_window", 0) and not chunked


def nlhf_decode_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: Any = 0,
    mask_function: Callable[..., Any] = causal_mask_function, attention_mask: torch.Tensor | None = None,
    config: Any = None, local_size: int | None = None, use_vmap: bool = False, **kwargs: Any,
) -> torch.Tensor | None:  # fmt: skip
    """Return no mask where `nlhf_decode_attention` will take the kernel; else the one that sdpa takes.

    Args:
        batch_size, q_length, kv_length, q_offset, kv_offset: of the scores.
        mask_function: transformers' predicate on (batch, head, query, key).
        attention_mask ((B, L)): 0 at padding.
        config: the model's configuration.
        local_size: of the sliding window; None: there is none.
        use_vmap: whether the predicate has to be vectorised.
        kwargs: passed on to transformers' sdpa_mask.
    """
    if _is_decoding(q_length) and _is_range(mask_function, local_size, use_vmap, config):
        return None
    whole_window = q_length == kv_length and (local_size is None or kv_length < local_size)
    if attention_mask is None and whole_window and kwargs.get("allow_is_causal_skip", True):
        return None  # sdpa's own causal attention: transformers 5.17 makes a mask while a graph is captured
    mask: torch.Tensor | None = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, config=config, local_size=local_size,
        use_vmap=use_vmap, **kwargs,
    )  # fmt: skip
    return mask


def nlhf_decode_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend, as transformers' attention functions do: by the kernel in a step of one token, else by sdpa.

    Returns (B, T, Hq, Dv), and None in place of attention weights.

    Args:
        module: the attention layer.
        query ((B, Hq, T, D)): of T tokens.
        key ((B, Hkv, L, D)): of L slots.
        value ((B, Hkv, L, Dv)): of L slots.
        attention_mask ((B, 1, T, L)): bool or additive; None: causal.
        dropout (float): of attention weights.
        scaling (float): of scores; None: D ** -0.5.
        sliding_window (int): tokens a query sees; None: all before it.
        softcap (float): bound of scores, by tanh.
        s_aux ((Hq,)): a further score per head that takes weight and has no value (a sink).
        kwargs: passed on to transformers' sdpa attention.
    """
    window = current_decode_window()
    if window is not None and _takes_kernel(module, query, attention_mask, kwargs):
        if kwargs.get("position_bias") is not None:
            raise ValueError(f"{NAME}: position_bias: expected none in a decode_window; got one")
        out = decode_attention(
            query[:, :, 0], key, value, starts=window.starts, ends=window.ends, scale=scaling, window=sliding_window,
            softcap=softcap, sinks=s_aux,
        )  # fmt: skip
        return out.unsqueeze(1), None
    if softcap is not None or s_aux is not None:
        return _plain_attention(module, query, key, value, attention_mask, dropout, scaling, softcap, s_aux), None
    out, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, sliding_window=sliding_window,
        **kwargs,
    )  # fmt: skip
    return out, None


def _takes_kernel(
    module: torch.nn.Module, query: torch.Tensor, attention_mask: torch.Tensor | None, options: dict[str, Any]
) -> bool:
    """`options`: the further arguments of the attention function."""
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    return attention_mask is None and bool(causal) and _is_decoding(query.shape[2])


def _plain_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,  # (B, 1, T, L) bool
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    batch, heads, length, dim = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, length, dim)
    scores = grouped @ key.unsqueeze(2).mT * (dim**-0.5 if scaling is None else scaling)
    scores = scores.view(batch, heads, length, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None and length > 1:  # no mask from sdpa_mask: causal from the first slot on
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        # The lowest number, not -inf: a row of padding alone must not become NaN.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(batch, -1, length, -1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    weights = weights if sinks is None else weights[..., :-1]
    weights = torch.nn.functional.dropout(weights, dropout, module.training)
    out = weights.view(batch, key.shape[1], -1, length, weights.shape[-1]) @ value.unsqueeze(2)
    return out.view(batch, heads, length, -1).transpose(1, 2).contiguous()


AttentionInterface.register(NAME, nlhf_decode_attention)
AttentionMaskInterface.register(NAME, nlhf_decode_mask)


@contextmanager
def use_attention(models: Sequence[Any], name: str = NAME) -> Iterator[None]:
    """Set these models' attention, and restore their own afterwards."""
    configs = {model: _configs(model) for model in models}
    before = [(config, attention_name(config)) for each in configs.values() for config in each]
    try:
        for model, each in configs.items():
            if len(each) == 1 and name == NAME:
                set_attention_name(each[0], name)  # its checks, which walk the model, were made with the engine
            else:
                model.set_attn_implementation(name)
        yield
    finally:
        for config, previous in before:
            set_attention_name(config, previous)


def reads_ranges_only(model: Any) -> bool:
    """Whether a model's steps attend by `decode_attention` now, which reads no slot outside a row's range."""
    return attention_name(model.config) == NAME


def _configs(model: Any) -> list[Any]:
    """Return the configurations of a model and its parts, each of which may name an attention of its own.

    A configuration precedes those of its parts, because setting its attention sets theirs.
    """
    configs: dict[int, Any] = {}
    # A module without an attribute looks for it in three dictionaries first.
    modules: Iterator[Any] = (
        each for each in modules_of(model) if "config" in vars(each) or hasattr(type(each), "config")
    )
    stack = [module.config for module in modules if hasattr(module, "config")][::-1]
    while stack:
        config = stack.pop()
        if id(config) not in configs and names_attention(config):
            configs[id(config)] = config
            stack += [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    return list(configs.values())


class _Call(NamedTuple):
    """One call of the attention function in a step."""

    mask: torch.Tensor | None
    window: int | None  # as passed to the attention function
    by_kernel: bool


def takes_decode_attention(model: Any, step: Callable[[], tuple[int, int, int]]) -> bool:
    """Whether the masks of this model allow it to decode under NAME.

    `step` takes one step of one token past every window, and returns how many layers stored keys, and the range of
    slots that may be seen. Each of those layers must call the attention function, without a mask of the model's own,
    and take the kernel there: a layer with its own attention, or with a bidirectional one, would need the mask that is
    not made. The masks that the model makes under sdpa must be the ranges that the kernel reads.
    """
    if not hands_attention_over(model) or model.dtype not in FLOATS:
        return False
    if attention_name(model.config) not in REPLACED:
        return False
    try:
        (layers, start, end), kernel_calls = _calls(model, step, nlhf_decode_mask)
        _, sdpa_calls = _calls(model, step, _explicit_mask)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the model fails on a cache that is not its own
        return False
    if not layers == len(kernel_calls) == len(sdpa_calls) or not all(call.by_kernel for call in kernel_calls):
        return False
    slots = torch.arange(end, dtype=torch.int64, device=model.device)
    for call, sdpa_call in zip(kernel_calls, sdpa_calls, strict=True):
        visible = slots >= max(start, 0 if call.window is None else end - call.window)
        mask = sdpa_call.mask
        if mask is None or mask.dtype != torch.bool or not torch.equal(mask.flatten(), visible):
            return False
    return True


def _explicit_mask(*arguments: Any, **options: Any) -> torch.Tensor | None:
    """Return the mask that sdpa takes, even where sdpa would run without one."""
    mask: torch.Tensor | None = sdpa_mask(
        *arguments, **{**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    )
    return mask


def _calls(
    model: Any, step: Callable[[], tuple[int, int, int]], mask: Callable[..., torch.Tensor | None]
) -> tuple[tuple[int, int, int], list[_Call]]:
    """Return the result of `step`, and its calls of an attention function that computes nothing."""
    calls: list[_Call] = []
    # Gemma 2's soft cap, until transformers made its attention eager by default.
    ignored = ("softcap", "s_aux") if attention_name(model.config) == "sdpa" else ()

    def attention(
        module: Any, query: torch.Tensor, key: Any, value: torch.Tensor, attention_mask: torch.Tensor | None,
        *_: Any, **options: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        unsupported = [name for name in ("position_bias", *ignored) if options.get(name) is not None]
        by_kernel = _takes_kernel(module, query, attention_mask, options) and not unsupported
        calls.append(_Call(attention_mask, options.get("sliding_window"), by_kernel))
        batch, heads, length = query.shape[:3]
        return query.new_zeros(batch, length, heads, value.shape[-1]), None

    AttentionInterface.register(_PROBE, attention)
    AttentionMaskInterface.register(_PROBE, mask)
    one = torch.ones(1, dtype=torch.int64, device=model.device)
    with torch.no_grad(), use_attention([model], _PROBE), decode_window(None, one):
        return step(), calls
