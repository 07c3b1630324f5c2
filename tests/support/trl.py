"""The interface of TRL 1.13's Nash-MD, and trainers on tiny models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.support.tiny_models import VOCABULARY, tiny_model, tiny_tokenizer
from tests.support.training import PROMPTS

#: Options that TRL 1.13's NashMDConfig adds to transformers' TrainingArguments or changes, with their defaults.
OPTIONS = {
    "learning_rate": 5e-7,
    "logging_steps": 10,
    "gradient_checkpointing": True,
    "bf16": None,
    "remove_unused_columns": False,
    "reward_model_path": None,
    "max_new_tokens": 64,
    "max_length": 512,
    "temperature": 0.9,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "generation_kwargs": None,
    "cache_implementation": None,
    "missing_eos_penalty": None,
    "beta": [0.1],
    "loss_type": "sigmoid",
    "disable_dropout": True,
    "use_vllm": False,
    "vllm_model_impl": "vllm",
    "vllm_structured_outputs_regex": None,
    "vllm_gpu_memory_utilization": 0.55,
    "vllm_mode": "colocate",
    "vllm_server_base_url": None,
    "vllm_server_host": "0.0.0.0",
    "vllm_server_port": 8000,
    "vllm_server_timeout": 240.0,
    "vllm_group_port": 51216,
    "vllm_tensor_parallel_size": 1,
    "vllm_enable_sleep_mode": False,
    "ds3_gather_for_generation": True,
    "model_init_kwargs": None,
    "trust_remote_code": False,
    "reward_weights": None,
    "mixture_coef": [0.5],
}
ARGUMENTS = (  # of its NashMDTrainer, in order
    "model", "ref_model", "reward_funcs", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class",
    "peft_config", "compute_metrics", "callbacks", "optimizers", "preprocess_logits_for_metrics",
)  # fmt: skip
SMALL = {
    "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_steps": 1,
    "logging_steps": 1, "per_device_train_batch_size": 4, "max_new_tokens": 6, "max_length": 64, "seed": 5,
}  # fmt: skip


def default(entry: Any) -> Any:
    """Return the default of a dataclass's field."""
    return entry.default_factory() if callable(entry.default_factory) else entry.default


def make_config(output: Path | str, **given: Any) -> Any:
    from nlhf_kernels.integrations.trl import NashMDConfig

    return NashMDConfig(str(output), **{**SMALL, **given})


def make_trainer(output: Path | str, **given: Any) -> Any:
    """Make this library's NashMDTrainer; all arguments that are not its own go to NashMDConfig."""
    from nlhf_kernels.integrations.trl import NashMDTrainer

    own = {*ARGUMENTS, "judge", "reward_processing_classes"}
    arguments = {name: given.pop(name) for name in own if name in given}
    usual = {"model": tiny_model("llama"), "train_dataset": PROMPTS, "processing_class": tiny_tokenizer()}
    trainer = NashMDTrainer(**{**usual, **arguments, "args": make_config(output, **given)})
    trainer.args.log_samples = 0
    return trainer


def trl_trainer(output: Path | str, model: Any = None, **given: Any) -> Any:
    """Make TRL's own NashMDTrainer, extended to record the responses and probabilities of every micro-batch."""
    os.environ.setdefault("CI", "1")  # otherwise TRL sends usage telemetry
    from datasets import Dataset
    from trl.experimental.nash_md import NashMDConfig, NashMDTrainer

    class Remembering(NashMDTrainer):
        def _log_statistics(self, model_data, mixture_data, policy, reference, probability, *rest):
            self.seen = [*getattr(self, "seen", []), (model_data, mixture_data, policy, reference, probability)]
            super()._log_statistics(model_data, mixture_data, policy, reference, probability, *rest)

    arguments = {name: given.pop(name) for name in ARGUMENTS if name in given}
    rows = Dataset.from_list(given.pop("rows", PROMPTS))
    usual = {"reward_funcs": reward_model(), "processing_class": tiny_tokenizer(), "train_dataset": rows}
    args = NashMDConfig(str(output), **{**SMALL, "max_grad_norm": 0.0, **given})
    return Remembering(model=model or tiny_model("gpt2"), args=args, **{**usual, **arguments})


def reward_model(seed: int = 0) -> Any:
    """Make a reward model with weights large enough that every token affects the reward."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, num_labels=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlamaForSequenceClassification(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()
