"""Clean exit of a program that is one of several processes."""

from __future__ import annotations

import gc

import torch.distributed


def leave_process_group() -> None:
    """Join the threads of the process group. The caller must not hold the group, through a trainer or DDP.

    `destroy_process_group` drops PyTorch's own references only, and a trainer is full of reference cycles. A gloo
    thread that frees a tensor while the interpreter shuts down is ended by Python inside C++ code, which aborts the
    process ("terminate called without an active exception").
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()
