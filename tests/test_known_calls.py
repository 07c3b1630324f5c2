"""Calls of known signatures: what tells two calls apart, what a known call does, the table in C++ and in Python."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nlhf_kernels.cli import info
from nlhf_kernels.core import calls as calls_module
from nlhf_kernels.core import capabilities, upstream
from nlhf_kernels.core.calls import TENSORS, KnownCalls, native_calls_missing, signature
from nlhf_kernels.core.prepared import PreparedCall, Result, Slot, Source, addresses_of, slots_of, tensors_of
from nlhf_kernels.ops.mixture_sample.layout import MixtureSampleInputs

CPU = torch.device("cpu")


def native_table(limit: int = 4096) -> Any:
    return capabilities.native("_cpu").KnownCalls(upstream.tensor_exchange(), TENSORS, torch.dtype, Slot, limit)


def table(kind: str) -> Any:
    if kind == "python":
        return KnownCalls()
    if reason := native_calls_missing():
        pytest.skip(reason)
    return native_table()


every_table = pytest.mark.parametrize("kind", ["python", "native"])


def is_known(known: Any, *inputs: Any, context: tuple[Any, ...] = (), gradients: bool | None = None) -> bool:
    return known.run(inputs, context, gradients) is not NotImplemented


def nothing(inputs: Any) -> None:
    """Run nothing."""


def test_the_table_is_in_cpp_where_it_can_be() -> None:
    if upstream.tensor_exchange() is not None and not capabilities.native_missing("_cpu"):
        assert native_calls_missing() == ""
        assert type(calls_module.known_calls()) is not KnownCalls


BASE = torch.zeros(8, 16)
DIFFERENT = {
    "dtype": BASE.double(),
    "dtype of the same size": BASE.int(),
    "shape": BASE[:, :15],
    "another shape of as many elements": BASE.view(16, 8),
    "dimensions": BASE[None],
    "strides": BASE.T.contiguous().T,
    "strides of rows": torch.zeros(8, 32)[:, :16],
    "alignment": torch.zeros(8 * 16 + 1)[1:].view(8, 16),
    "absent": None,
    "a list": [BASE],
    "a number": 1,
}


@every_table
@pytest.mark.parametrize("what", DIFFERENT)
def test_another_tensor_is_another_signature(kind, what) -> None:
    known = table(kind)
    known.learn((BASE, 7), (), nothing, None)
    assert is_known(known, BASE.clone(), 7)
    assert is_known(known, torch.zeros(9, 16)[1:], 7), "another storage, or another place in it, is none"
    assert is_known(known, torch.nn.Parameter(BASE), 7)
    assert not is_known(known, DIFFERENT[what], 7)


VALUES = (
    0,
    1,
    True,
    False,
    1.0,
    0.5,
    None,
    "",
    "a",
    "auto",
    "a text of more than eight bytes",
    torch.int32,
    torch.int64,
)


@every_table
@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_another_value_is_another_signature(kind, value) -> None:
    known = table(kind)
    known.learn((BASE, value), ("auto", 3), nothing, None)
    for other in VALUES:
        same = other is value or (type(other) is type(value) and other == value)
        assert is_known(known, BASE, other, context=("auto", 3)) == same, other
    for context in (("triton", 3), ("auto", 4), ()):
        assert not is_known(known, BASE, value, context=context)


@every_table
def test_lists_and_neighbours_are_told_apart(kind) -> None:
    """No two of these calls have the same signature, although their parts laid end to end are alike."""
    known = table(kind)
    different = [([BASE],), ([BASE, BASE],), (BASE,), (BASE, BASE), ([BASE], BASE), ([],), (None, BASE), (BASE, None)]
    different += [("ab", "c"), ("a", "bc"), ("abc",), (0,), (0, 0), (2**62,), (-1,)]
    for number, inputs in enumerate(different):
        known.learn(inputs, (), lambda inputs, number=number: number, None)
    assert [known.run(inputs, (), None) for inputs in different] == list(range(len(different)))


class Wrapped(torch.Tensor):
    """A subclass, which may report anything."""


UNREADABLE = {
    "subclass": lambda: torch.zeros(2).as_subclass(Wrapped),
    "sparse": lambda: torch.zeros(2, 2).to_sparse(),
    "compressed": lambda: torch.eye(2).to_sparse_csr(),
    "other type": object,
    "tuple": lambda: (1, 2),
    "complex number": lambda: 1j,
    "large number": lambda: 2**64,
    "list of numbers": lambda: [1],
    "list with a subclass": lambda: [torch.zeros(2).as_subclass(Wrapped)],
}


@every_table
@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("what", UNREADABLE)
def test_what_cannot_be_read_is_never_known(kind, what) -> None:
    if (kind, what) == ("python", "large number"):
        pytest.skip("Python's table reads it")
    known, unreadable = table(kind), UNREADABLE[what]()
    known.learn((unreadable,), (), nothing, None)
    assert not is_known(known, unreadable) and len(known) == 0


def test_both_tables_know_the_same_calls() -> None:
    python, native = KnownCalls(), table("native")
    parts = [
        BASE,
        BASE[1:],
        BASE[:, 1:],
        BASE.double(),
        None,
        [BASE, BASE[1:]],
        1,
        1.0,
        "x",
        BASE.view(-1)[:0],
        BASE[0, 0],
    ]
    every = list(itertools.product(parts, repeat=2))
    for inputs in every[::3]:
        for known in (python, native):
            known.learn(inputs, (), nothing, None)
    assert [is_known(native, *inputs) for inputs in every] == [is_known(python, *inputs) for inputs in every]
    assert len(native) == len(python) == len({signature(inputs) for inputs in every[::3]})


# ---- what a known call does ------------------------------------------------------------------------------------------


def recorded(kind: str, prepared: PreparedCall, inputs: tuple[Any, ...]) -> Callable[[], Any]:
    """Return the call itself for "python", and for "native" the same call made by a table that knows it."""
    if kind == "python":
        return lambda: prepared(inputs)
    known = table("native")
    known.learn(inputs, (), prepared, prepared)
    return lambda: known.run(inputs, (), None)


@every_table
def test_steps_get_addresses_of_what_the_call_allocates(kind) -> None:
    seen: list[Any] = []
    counted = itertools.count(100)
    x, pair = torch.zeros(4, 8)[1:], [torch.zeros(3), torch.zeros(5)[2:]]
    slots = [Slot(Source.INPUT, index) for index in range(3)]
    scratch, now = Slot(Source.SCRATCH, 48), Slot(Source.NOW, 0)
    results = Slot(Source.RESULT, 0), Slot(Source.RESULT, 1)
    first = lambda *arguments: seen.append(arguments)  # noqa: E731
    second = lambda *arguments: seen.append(arguments)  # noqa: E731
    constant = ("constant", (1, 2))
    call = PreparedCall(
        CPU,
        [Result((2, 3), torch.float32), Result((0,), torch.bool)],
        [(first, (slots[0], 7, (slots[1], (slots[2], "nested")), now)), (second, (*results, scratch, now, constant))],
        scratch=64,
        now=[lambda: next(counted)],
    )
    run = recorded(kind, call, (x, None, pair, 5))
    for number in (100, 101):
        seen.clear()
        floats, empty = run()
        assert (floats.shape, floats.dtype, floats.stride()) == ((2, 3), torch.float32, (3, 1))
        assert (empty.shape, empty.dtype) == ((0,), torch.bool)
        addresses = [x.data_ptr(), *(part.data_ptr() for part in pair)]
        assert seen[0] == (addresses[0], 7, (addresses[1], (addresses[2], "nested")), number)
        assert seen[1][:2] == (floats.data_ptr(), empty.data_ptr()) and seen[1][3:] == (number, constant)
        assert seen[1][2] % 16 == 0


@every_table
def test_a_call_returns_nothing_a_tensor_or_several(kind) -> None:
    result = Result((2,), torch.int64)
    assert recorded(kind, PreparedCall(CPU, [], []), (BASE,))() is None
    assert recorded(kind, PreparedCall(CPU, [result], []), (BASE,))().shape == (2,)
    several = recorded(kind, PreparedCall(CPU, [result] * 3, [], scratch=8), (BASE,))()
    assert type(several) is tuple and len(several) == 3


@every_table
def test_an_error_of_a_step_is_raised_and_the_next_call_works(kind) -> None:
    fail = [True]

    def step(address: int) -> None:
        if fail[0]:
            raise ZeroDivisionError("of the step")

    run = recorded(kind, PreparedCall(CPU, [Result((2,), torch.int64)], [(step, (Slot(Source.RESULT, 0),))]), (BASE,))
    with pytest.raises(ZeroDivisionError, match="of the step"):
        run()
    fail[0] = False
    assert run().shape == (2,)


def test_a_call_that_is_not_ready_runs_in_python() -> None:
    known, ready, ran = table("native"), [True], []
    call = PreparedCall(CPU, [], [(lambda: ran.append("steps"), ())], ready=lambda: ready[0])
    known.learn((BASE,), (), lambda inputs: ran.append(inputs), call)
    known.run((BASE,), (), None)
    ready[0] = False
    known.run((BASE,), (), None)
    assert ran[0] == "steps" and ran[1][0] is BASE


def test_memory_that_is_not_aligned_runs_in_python(monkeypatch) -> None:
    """Kernels were compiled for aligned results; an allocator of the user's may return others."""
    known, ran = table("native"), []
    whole = torch.zeros(9)
    monkeypatch.setattr(upstream, "allocator", lambda device: lambda shape, strides, dtype: whole[1:])
    call = PreparedCall(CPU, [Result((8,), torch.float32)], [(lambda: ran.append("steps"), ())])
    known.learn((BASE,), (), lambda inputs: ran.append("python"), call)
    known.run((BASE,), (), None)
    assert ran == ["python"]


@every_table
def test_what_the_dispatcher_has_to_do_is_left_to_it(kind) -> None:
    known = table(kind)
    known.learn((BASE, [BASE]), (), nothing, None)
    wanting, negative = BASE.clone().requires_grad_(), torch._neg_view(BASE)
    for changed in ((wanting, [BASE]), (BASE, [wanting])):
        assert not is_known(known, *changed, gradients=True)
        assert is_known(known, *changed, gradients=False) and is_known(known, *changed)
    for changed in ((negative, [BASE]), (BASE, [negative])):
        assert not is_known(known, *changed, gradients=True) and not is_known(known, *changed, gradients=False)


@pytest.mark.parametrize(
    "slot", [Slot(Source.INPUT, 1), Slot(Source.RESULT, 1), Slot(Source.NOW, 0), Slot(Source.SCRATCH, 0)], ids=str
)
def test_a_slot_that_is_not_there_is_refused(slot) -> None:
    known = table("native")
    call = PreparedCall(CPU, [Result((1,), torch.int64)], [(print, (1, (2, slot)))])
    with pytest.raises(ValueError, match="KnownCalls: expected slots of tensors and values that the call has"):
        known.learn((BASE,), (), call, call)
    assert len(known) == 0


def test_slots_and_addresses_stand_where_the_tensors_do() -> None:
    seed, row_ids = torch.tensor(1), torch.arange(3)
    inputs = MixtureSampleInputs([BASE, BASE[1:]], BASE[2:], False, None, None, seed, row_ids, seed, 0, 7, "")
    tensors = tensors_of(inputs)
    assert [tensor.data_ptr() for tensor in tensors] == [
        x.data_ptr() for x in (BASE, BASE[1:], BASE[2:], seed, row_ids, seed)
    ]
    slots, addresses = slots_of(inputs), addresses_of(inputs)
    assert slots.logits == [Slot(0, 0), Slot(0, 1)] and slots.settings == Slot(0, 2) and slots.bias is None
    assert (slots.seed, slots.row_ids, slots.step) == (Slot(0, 3), Slot(0, 4), Slot(0, 5))
    assert addresses.logits == [BASE.data_ptr(), BASE[1:].data_ptr()] and addresses.logprob_mask == 7


# ---- bounds ----------------------------------------------------------------------------------------------------------


def test_a_table_forgets_before_it_grows_too_large(monkeypatch) -> None:
    monkeypatch.setattr(calls_module, "MAX_SIGNATURES", 3)
    for known in (KnownCalls(), native_table(3) if not native_calls_missing() else KnownCalls()):
        for number in range(8):
            known.learn((BASE, number), (), nothing, None)
            known.learn((BASE, number), (), nothing, None)
            assert is_known(known, BASE, number) and len(known) <= 3


@every_table
def test_a_table_keeps_no_tensor(kind) -> None:
    known = table(kind)
    x = torch.zeros(4)
    call = PreparedCall(CPU, [Result((4,), torch.float32)], [(max, (Slot(Source.INPUT, 0), Slot(Source.RESULT, 0)))])
    known.learn((x,), (), call, call)
    result = known.run((x,), (), None)
    tensors, calls = [weakref.ref(x), weakref.ref(result)], [weakref.ref(known), weakref.ref(call)]
    del x, result
    gc.collect()
    assert [reference() for reference in tensors] == [None, None]
    del known, call
    gc.collect()
    assert calls[1]() is None


def test_a_step_may_use_the_table() -> None:
    """A call of a call, and one that makes the table forget the call that runs."""
    known = native_table(2) if not native_calls_missing() else pytest.skip(native_calls_missing())

    def step(address: int) -> None:
        for number in range(9):
            known.learn((number,), (), nothing, None)
        assert not is_known(known, BASE)

    call = PreparedCall(CPU, [Result((2,), torch.int64)], [(step, (Slot(Source.RESULT, 0),)), (max, (1, 2))])
    known.learn((BASE,), (), call, call)
    del call
    assert known.run((BASE,), (), None).shape == (2,)


@every_table
def test_threads_share_a_table(kind) -> None:
    known, failures = table(kind), []

    def add(source: int, target: int, value: int) -> None:
        torch.zeros(64).sum()  # leaves Python's lock
        seen[threading.get_ident()].append((source, target, value))

    seen: dict[int, list[Any]] = {}

    def work(size: int) -> None:
        mine = seen[threading.get_ident()] = []
        x = torch.zeros(size)
        arguments = Slot(Source.INPUT, 0), Slot(Source.RESULT, 0), size
        call = PreparedCall(CPU, [Result((size,), torch.float32)], [(add, arguments)])
        for number in range(200):
            result = known.run((x, size), (), None)
            if result is NotImplemented:
                known.learn((x, size), (), call, call)
                result = call((x, size))
            if mine[-1] != (x.data_ptr(), result.data_ptr(), size) or len(mine) != number + 1:
                failures.append(size)

    threads = [threading.Thread(target=work, args=(size,)) for size in (3, 5, 8, 13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(known) == 4


def test_info_says_where_the_table_is(monkeypatch) -> None:
    if capabilities.native_missing("_cpu"):
        pytest.skip("info says why there is no module")
    for reason, expected in (("", "in C++"), ("a reason", "in Python: a reason")):
        monkeypatch.setattr(calls_module, "native_calls_missing", lambda reason=reason: reason)
        cells = [str(cell) for column in info._build().columns for cell in column.cells]
        assert any(f"calls of known signatures: {expected}" in cell for cell in cells)
