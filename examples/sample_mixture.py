"""Sample from Nash-MD's opponent pi^(1 - beta) mu^beta for several beta, by one more argument of generate().

python examples/sample_mixture.py --policy runs/tldr/policy --reference Qwen/Qwen2.5-0.5B --prompt "TL;DR:"
"""

from __future__ import annotations

import argparse

import torch
from tiny import load_model, load_tokenizer

from nlhf_kernels.integrations import mixture_generate


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--policy", help="a folder or hub name; none: a tiny model of random weights")
    parser.add_argument("--reference", help="likewise; none: another tiny model")
    parser.add_argument("--prompt", action="append", help="several are allowed")
    parser.add_argument("--beta", type=float, nargs="+", default=[0.0, 0.125, 0.5, 1.0])
    parser.add_argument("--max-new-tokens", type=int, default=16)
    arguments = parser.parse_args()
    if (arguments.policy is None) is not (arguments.reference is None):
        parser.error("--policy and --reference: expected both or neither, as they must share a vocabulary")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(arguments.policy)
    policy = load_model(arguments.policy, seed=0).to(device)
    reference = load_model(arguments.reference, seed=1).to(device)
    prompts = arguments.prompt or ["The cat", "A long road to"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(device)
    for beta in arguments.beta:
        output = policy.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            custom_generate=mixture_generate,
            reference_model=reference,
            beta=beta,
            seed=0,
            do_sample=True,
            top_k=0,
            max_new_tokens=arguments.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            return_dict_in_generate=True,
        )
        nats = (output.policy_logprobs - output.reference_logprobs).sum(1).tolist()
        texts = tokenizer.batch_decode(output.sequences[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
        for prompt, text, ratio in zip(prompts, texts, nats, strict=True):
            print(f"beta {beta:5.3f}  log pi / mu {ratio:8.3f} nats  {prompt!r} -> {text!r}")


if __name__ == "__main__":
    main()
