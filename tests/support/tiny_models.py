"""Causal language models of many architectures with two layers and random weights, made in milliseconds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import transformers

VOCABULARY = 97
BETA = 0.3
LENGTHS = (1, 6, 9)  # of prompts
_SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "max_position_embeddings": 128}


def _config(name: str, **options: object) -> Callable[[int], transformers.PretrainedConfig]:
    return lambda hidden: getattr(transformers, name)(
        vocab_size=VOCABULARY, hidden_size=hidden, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options
    )


#: Each differs in its positions, masks or caches.
ARCHITECTURES = {
    "gpt2": _config("GPT2Config", n_layer=2, n_head=4, n_positions=128),  # absolute positions
    "opt": _config("OPTConfig", num_hidden_layers=2, num_attention_heads=4, ffn_dim=40, max_position_embeddings=128),
    "bloom": _config("BloomConfig", n_layer=2, n_head=4),  # ALiBi; takes no position ids
    "gpt_neox": _config("GPTNeoXConfig", **_SHAPE),  # rotary on a part of the head
    "llama": _config("LlamaConfig", **_SHAPE, num_key_value_heads=2),
    "qwen2": _config("Qwen2Config", **_SHAPE, num_key_value_heads=2),
    "mistral": _config("MistralConfig", **_SHAPE, num_key_value_heads=2, sliding_window=4),  # the cache drops tokens
    "gemma2": _config("Gemma2Config", **_SHAPE, num_key_value_heads=2, head_dim=8, sliding_window=4),  # soft caps
    "mamba": _config("MambaConfig", num_hidden_layers=2, state_size=4),  # no key/value cache
}


def tiny_model(architecture: str = "gpt2", seed: int = 0, hidden: int = 32) -> torch.nn.Module:
    return random_model(ARCHITECTURES[architecture](hidden), seed)


def random_model(config: transformers.PretrainedConfig, seed: int, kind: type | None = None) -> torch.nn.Module:
    """Make a model with weights large enough that every token depends on all earlier ones. `kind` is its class."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config) if kind is None else kind._from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "A_log" not in name:
                torch.nn.init.normal_(parameter, std=0.4 if "embed" in name or "wte" in name else 0.25)
    return model.eval()


@torch.no_grad()
def teacher_forced(model: torch.nn.Module, prompt: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities (T, V), float64, at every token: one forward pass without padding or cache. The last
    token is not read, as in a rollout."""
    exact = copy.deepcopy(model).double().eval()
    if any(hasattr(exact.config, name) for name in ("num_local_experts", "num_experts")):
        exact.set_experts_implementation("eager")  # the grouped matrix product does not support float64
    logits = exact(torch.cat([prompt, tokens[:-1]])[None], use_cache=False).logits[0]
    return logits[len(prompt) - 1 :].log_softmax(-1)


def tiny_tokenizer(chat: bool = False, first: str = " ") -> transformers.PreTrainedTokenizerFast:
    """Make a tokenizer with one token per character: the 94 from `first` (space to }) have the ids from 3 on."""
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {chr(ord(first) - 3 + id): id for id in range(3, VOCABULARY)}
    fast = Tokenizer(models.BPE(vocabulary, merges=[]))
    fast.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    if chat:
        tokenizer.chat_template = "<bos>{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    return tokenizer


def pair(architecture: str = "gpt2") -> tuple:
    return tiny_model(architecture, seed=1, hidden=32), tiny_model(architecture, seed=2, hidden=48)


def prompts(lengths=LENGTHS, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]


def padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for row, prompt in enumerate(rows):
        ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
    return {"input_ids": ids, "attention_mask": mask}


def chosen(logprobs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logprobs.gather(-1, tokens[:, None]).squeeze(-1)


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread: models this small are many times slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
