"""`nlhf-kernels sample`: text from the mixture of a policy and a reference, token by token.

Prints every token's log-probability under the policy, the reference and the mixture it was drawn from; green tokens
are likelier under the policy, red ones under the reference. `--policy` alone samples from the policy.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from rich.text import Text

from ..core.adapters import base_of, is_adapter
from ..core.checks import check_integer, check_number
from ..core.loading import load_model, load_tokenizer
from ..core.optional import require
from ..core.places import locate
from ..core.terminal import cut_lines, new_console, new_progress, printable
from ..core.text import read_text
from ..core.tokens import end_token_ids
from ..data import encode_prompts, load_prompts, pad_left
from .common import find_device, read_data
from .errors import BadInput

if TYPE_CHECKING:
    from ..engine import Responses

DTYPES = ("auto", "float32", "bfloat16", "float16")
ROWS = (".jsonl", ".json", ".csv")  # files of rows; any other file has one prompt per line
LARGE_RATIO = 2.0  # nats between policy and reference at which a token has the full colour


@dataclass(frozen=True)
class Token:
    id: int
    text: str
    policy: float | None  # log-probabilities; None where there is no model, or the value is not finite
    reference: float | None
    mixture: float | None


@dataclass(frozen=True)
class Sample:
    prompt: str
    index: int  # among the prompt's samples
    text: str
    tokens: list[Token]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models = parser.add_argument_group("models: folders or names on the Hugging Face hub, safetensors only")
    models.add_argument("--policy", required=True)
    models.add_argument("--reference", help="needs --beta; has the policy's vocabulary (default: an adapter's base)")
    models.add_argument("--beta", type=float, help="the reference's weight: 0 the policy, 1 the reference (default 0)")
    models.add_argument("--dtype", choices=DTYPES, default="auto", help="default auto: the checkpoint's own")
    models.add_argument("--device", help="default: cuda where there is one, else cpu")
    models.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with a model")
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--prompt", action="append", default=[], help="may be given several times")
    prompts.add_argument(
        "--prompts-file", type=Path, help="a prompt a line; .jsonl, .json, .csv: rows with a prompt, as for training"
    )
    prompts.add_argument("--chat", action="store_true", help="texts are a user's messages, for the chat template")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--num-samples", type=int, default=1, help="of every prompt (default 1)")
    sampling.add_argument("--max-new-tokens", type=int, default=64, help="(default 64)")
    sampling.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default 1)")
    sampling.add_argument("--top-k", type=int, default=0, help="0 keeps all (default)")
    sampling.add_argument("--top-p", type=float, default=1.0, help="1 keeps all (default)")
    sampling.add_argument("--min-p", type=float, default=0.0, help="0 keeps all (default)")
    sampling.add_argument("--seed", type=int, default=0, help="(default 0)")
    sampling.add_argument("--batch-size", type=int, default=16, help="rows at once; changes no sample (default 16)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--text", action="store_true", help="print the responses alone, without tables")
    output.add_argument("--stream", action="store_true", help="the same, each response as it is sampled")
    output.add_argument("--json", action="store_true", help="print one JSON document instead of tables")


def run(arguments: argparse.Namespace) -> int:
    require("nlhf-kernels sample", ("transformers",), "transformers")
    _check(arguments)
    if arguments.stream:
        arguments.batch_size = 1  # responses are streamed one at a time
    samples = _generate(arguments)
    console = new_console()
    if arguments.json:
        print(_as_json(arguments, samples))
    elif arguments.text:
        for sample in samples:
            print(printable(sample.text) if console.is_terminal else sample.text)
    elif not arguments.stream:
        for sample in samples:
            _print(console, sample, arguments.num_samples)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    for name, low, high in (("num_samples", 1, 10**6), ("max_new_tokens", 1, 10**6), ("batch_size", 1, 10**6)):
        check_integer("sample", f"--{name.replace('_', '-')}", getattr(arguments, name), low, high)
    check_integer("sample", "--seed", arguments.seed, -(2**63), 2**63 - 1)
    check_integer("sample", "--top-k", arguments.top_k, 0, 2**24)
    check_number("sample", "--temperature", arguments.temperature, 0.0)
    check_number("sample", "--top-p", arguments.top_p, 0.0, 1.0, open_low=True)
    check_number("sample", "--min-p", arguments.min_p, 0.0, 1.0)
    if arguments.beta is not None:
        check_number("sample", "--beta", arguments.beta)
    if arguments.reference is None and is_adapter(locate("sample: --policy", arguments.policy)):
        return  # its base is the reference
    if (arguments.beta is None) is not (arguments.reference is None):
        present, missing = ("--beta", "--reference") if arguments.reference is None else ("--reference", "--beta")
        raise BadInput(f"sample: {missing}: expected together with {present}; got {present} alone")


def _prompts(arguments: argparse.Namespace, tokenizer: Any) -> list[tuple[str, str]]:
    """Return (text to show, text that the models read) of every prompt."""
    texts, path = list(arguments.prompt), arguments.prompts_file
    prompts = []
    if path is not None and path.suffix.lower() in ROWS:
        read = read_data("sample: --prompts-file", load_prompts, path, tokenizer, chat=arguments.chat)
        prompts = [(text, text) for text in read]
    elif path is not None:
        try:
            texts += [line.rstrip("\r") for line in read_text(path).split("\n") if line.strip()]
        except ValueError as error:
            raise BadInput(f"sample: --prompts-file: {path}: {error}") from error
    if not texts and not prompts:
        raise BadInput("sample: --prompt: expected at least one, or --prompts-file; got none")
    if arguments.chat and not tokenizer.chat_template:
        raise BadInput("sample: --chat: expected a tokenizer with a chat template; got one without")
    if not all(texts):
        raise BadInput("sample: --prompt: expected at least one token; got none in ''")
    rows = [{"prompt": text} for text in texts]
    read = load_prompts(rows, tokenizer, chat=True) if rows and arguments.chat else texts
    return [*prompts, *zip(texts, read, strict=True)]


def _generate(arguments: argparse.Namespace) -> list[Sample]:
    from ..engine import Hooks, Player, RolloutEngine, RolloutSettings, has_key_value_cache

    device = find_device("sample", arguments.device)
    tokenizer = load_tokenizer("sample: --policy", arguments.policy, trust_remote_code=arguments.trust_remote_code)
    prompts = _prompts(arguments, tokenizer)  # fail before models are loaded
    policy, reference, width = _load(arguments, tokenizer, device)
    encoded = encode_prompts(tokenizer, [text for _, text in prompts])
    rows = [ids for ids in encoded for _ in range(arguments.num_samples)]
    _check_room((policy, reference), max(map(len, rows)) + arguments.max_new_tokens)
    end_ids = end_token_ids(policy, tokenizer)
    pad = next(iter(end_ids), 0)  # any id of the vocabulary: padding is masked
    cached = all(has_key_value_cache(model) for model in (policy, reference) if model is not None)
    engine = RolloutEngine(policy, reference, vocab_size=width, use_cache=cached, op="sample")
    settings = RolloutSettings(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        seed=arguments.seed,
        end_ids=end_ids,
        pad_id=pad,
    )
    samples: list[Sample] = []
    batches = math.ceil(len(rows) / arguments.batch_size)
    display = _Stream(tokenizer) if arguments.stream else _Bar(batches, arguments.max_new_tokens)
    with display as streamer:
        for start in range(0, len(rows), arguments.batch_size):
            batch = rows[start : start + arguments.batch_size]
            # Row ids count through all batches, so that responses do not depend on the batch size.
            ids = torch.arange(start, start + len(batch), dtype=torch.int64, device=device)
            player = Player(0.0 if arguments.beta is None else arguments.beta, row_ids=ids)
            padded = pad_left(batch, pad, device)
            (result,) = engine.rollout(
                padded["input_ids"], padded["attention_mask"], (player,), settings, Hooks(streamer=streamer)
            )
            result.check_finite("sample")
            for row in range(len(batch)):
                prompt, index = divmod(start + row, arguments.num_samples)
                samples.append(_sample(tokenizer, prompts[prompt][0], index, result, row))
    return samples


class _Bar:
    """A streamer that advances a progress bar on stderr by every step of a batch."""

    def __init__(self, batches: int, steps: int) -> None:
        self.progress = new_progress(new_console(stderr=True))
        self.task = self.progress.add_task("steps", total=batches * steps)
        self.steps, self.batches_done = steps, 0

    def __enter__(self) -> _Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def put(self, tokens: torch.Tensor) -> None:
        self.progress.advance(self.task)

    def end(self) -> None:
        """Count the steps that the batch did not need as done."""
        self.batches_done += 1
        self.progress.update(self.task, completed=self.batches_done * self.steps)


class _Stream:
    """A streamer that prints a batch of one response while it is sampled, in complete characters only."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.terminal = tokenizer, new_console().is_terminal
        self.ids: list[int] = []
        self.printed = 0  # characters

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def put(self, tokens: torch.Tensor) -> None:
        self.ids.append(int(tokens[0]))
        self._print(self.tokenizer.decode(self.ids, skip_special_tokens=True).rstrip("\ufffd"))

    def end(self) -> None:
        self._print(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        print(flush=True)
        self.ids, self.printed = [], 0

    def _print(self, text: str) -> None:
        new = text[self.printed :]
        print(printable(new) if self.terminal else new, end="", flush=True)
        self.printed = max(self.printed, len(text))


def _load(arguments: argparse.Namespace, tokenizer: Any, device: torch.device) -> tuple[Any, Any, int | None]:
    """Load both models; return them and the number of logits that both heads have in common (None: all)."""
    trust = {"trust_remote_code": arguments.trust_remote_code}
    models: list[Any] = [
        None if name is None else load_model(f"sample: {option}", name, device=device, dtype=arguments.dtype, **trust)
        for option, name in (("--policy", arguments.policy), ("--reference", arguments.reference))
    ]
    policy, reference = models
    if reference is None:
        return policy, None, None
    try:
        reference_tokenizer = load_tokenizer("sample: --reference", arguments.reference, **trust)
    except ValueError:
        reference_tokenizer = None  # a folder of weights alone: only the sizes can be compared
    if reference_tokenizer is not None:
        _check_same_tokens(tokenizer, reference_tokenizer)
    widths = [model.get_output_embeddings().weight.shape[0] for model in models]
    if reference_tokenizer is not None and len(tokenizer) <= min(widths) < max(widths):
        return policy, reference, min(widths)  # the same vocabulary, heads padded to different sizes
    return policy, reference, None


def _check_same_tokens(tokenizer: Any, reference_tokenizer: Any) -> None:
    """Check that ids known to both tokenizers mean the same tokens; either may have more, such as a padding token."""
    policy_tokens, reference_tokens = (
        {id: token for token, id in one.get_vocab().items()} for one in (tokenizer, reference_tokenizer)
    )
    for id in sorted(policy_tokens.keys() & reference_tokens.keys()):
        if policy_tokens[id] != reference_tokens[id]:
            raise BadInput(
                f"sample: --reference: expected the policy's vocabulary, {len(policy_tokens)} tokens; got another one, "
                f"{len(reference_tokens)} tokens: token {id} is {reference_tokens[id]!r}, the policy's "
                f"{policy_tokens[id]!r}"
            )


def _check_room(models: Sequence[Any], length: int) -> None:
    """Refuse texts longer than the models' position limits, where lookups fail and rotary positions are untrained."""
    for model in models:
        room = model and getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if room and length > room:
            raise BadInput(
                f"sample: --max-new-tokens: expected prompt and new tokens within {room} positions of "
                f"{type(model).__name__}; got {length}"
            )


def _sample(tokenizer: Any, prompt: str, index: int, result: Responses, row: int) -> Sample:
    count = int(result.mask[row].sum())
    ids = result.tokens[row, :count].tolist()
    columns = []
    for matrix in (result.policy_logprobs, result.reference_logprobs, result.mixture_logprobs):
        values = [None] * count if matrix is None else matrix[row, :count].tolist()
        columns.append([value if value is not None and math.isfinite(value) else None for value in values])
    tokens = [Token(id, tokenizer.decode([id]), *three) for id, *three in zip(ids, *columns, strict=True)]
    return Sample(prompt, index, tokenizer.decode(ids, skip_special_tokens=True), tokens)


def _as_json(arguments: argparse.Namespace, samples: list[Sample]) -> str:
    names = ("policy", "reference", "beta", "temperature", "top_k", "top_p", "min_p", "seed", "max_new_tokens")
    document: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    if arguments.reference is None and is_adapter(arguments.policy):
        document["reference"] = base_of(arguments.policy)
    document["samples"] = [{**vars(sample), "tokens": [vars(token) for token in sample.tokens]} for sample in samples]
    return json.dumps(document, indent=2, allow_nan=False)


def _print(console: Any, sample: Sample, samples: int) -> None:
    number = f" (sample {sample.index + 1} of {samples})" if samples > 1 else ""
    text = Text(cut_lines(printable(sample.prompt), console.width, 2, end=True), style="bold")
    for token in sample.tokens:
        text.append(printable(token.text), style=_style(token))
    console.print(text)
    mixed = any(token.reference is not None for token in sample.tokens)
    table = Table(title=f"log-probabilities{number}", title_justify="left")
    for column in ("token", "id", "policy", *(("reference", "policy - reference", "mixture") if mixed else ("drawn",))):
        table.add_column(column, justify="left" if column == "token" else "right")
    for token in sample.tokens:
        cells: list[Text | str] = [
            Text(printable(token.text).replace("\n", "\\n"), style=_style(token)),
            str(token.id),
        ]
        cells.append(_number(token.policy))
        if mixed:
            cells += [_number(token.reference), _number(_ratio(token))]
        table.add_row(*cells, _number(token.mixture))
    console.print(table)


def _ratio(token: Token) -> float | None:
    return None if token.policy is None or token.reference is None else token.policy - token.reference


def _style(token: Token) -> str:
    """Return the colour: from grey to green the likelier the token is under the policy, to red under the reference."""
    ratio = _ratio(token)
    if ratio is None:
        return ""
    strength = round(120 * min(abs(ratio) / LARGE_RATIO, 1.0))
    faded = 135 - strength
    return f"rgb({faded},{135 + strength},{faded})" if ratio > 0 else f"rgb({135 + strength},{faded},{faded})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
