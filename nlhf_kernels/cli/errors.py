"""Exit codes of commands, and the line on stderr that explains a failure.

The library's errors begin with an operation and an argument, "prefer: max_length: expected ..."; here the argument is
replaced by the command's option, "--max-length".
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping

import torch

from ..core.atomic import WriteError
from ..core.stopping import STOPPED, Stopped, stoppable
from ..core.text import first_line

DONE, FAILED, REFUSED, INTERRUPTED, CLOSED = 0, 1, 2, 130, 141  # and STOPPED, 143
CODES = {
    DONE: "done",
    FAILED: "failed at work: memory or disk ran out, or an error that was not foreseen (please report it)",
    REFUSED: "refused: an option, a file, a model or a judge that cannot be used; one line says which and why",
    INTERRUPTED: "Ctrl-C; one line says what is left to go on from",
    CLOSED: "the reader of the output closed it, as `| head` does",
    STOPPED: "SIGTERM: the update is finished or abandoned and a checkpoint written; one line says what is left",
}
LONGEST = 1500  # characters of an error line
_FULL = re.compile(r"No space left|StorageFull|Disk quota|PytorchStreamWriter failed writing", re.I)
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory", re.I)
_DAMAGED = {"EOFError", "UnpicklingError", "SafetensorError", "BadZipFile"}  # by name: packages may be missing
_CALL = re.compile(r"\btrain\((\w+=True)\)")
_ARGUMENT = re.compile(r"(?<![\w.-])(?P<name>[a-z_]+)=(?P<value>'[^' ]*'|True\b|\d+\b)")  # Python's notation
_SUBJECT = re.compile(r"(?P<operation>\w+(?: \w+)?): (?P<name>\w+)(?P<rest>\b.*)", re.S)


class BadInput(Exception):
    """An option, file, model or judge that cannot be used; the message is one line."""


class SaidByFirst(BadInput):
    """An error that every process finds; the first process reports it, the others exit silently."""


def finish(
    work: Callable[[], int],
    arguments: argparse.Namespace,
    resume_hint: Callable[[argparse.Namespace], str],
    names: Mapping[str, str],
) -> int:
    """Run `work`; return its exit code, or that of the exception that ended it, and explain the latter on stderr.

    Args:
        work: the command.
        arguments: its options.
        resume_hint: returns how to resume an interrupted command.
        names: argument of the library -> option of the command.
    """
    try:
        with stoppable():
            code = work()
        sys.stdout.flush()  # so that a closed pipe raises inside this try block
        return code
    except BrokenPipeError:
        _give_up_output()
        return CLOSED
    except KeyboardInterrupt:
        return _end(INTERRUPTED, f"interrupted: {resume_hint(arguments)}")
    except Stopped:
        return _end(STOPPED, f"stopped by SIGTERM: {resume_hint(arguments)}")
    except SaidByFirst:
        return REFUSED
    except SystemExit as stop:  # from a judge's or a model's code; its exit code 0 would report success
        return _end(FAILED, f"error: sys.exit({stop.code!r}) was called during the work, which is not finished")
    except BaseException as error:
        if arguments.traceback:
            traceback.print_exc()
        try:
            sys.stdout.flush()
        except OSError:
            _give_up_output()
        return _end(*describe(error, arguments.command, names, arguments.traceback))


def _give_up_output() -> None:
    """Redirect stdout to /dev/null, so that the interpreter's last flush does not report the closed pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end(code: int, text: str) -> int:
    print(f"nlhf-kernels: {text}", file=sys.stderr)
    return code


def describe(
    error: BaseException, command: str, names: Mapping[str, str], traceback_printed: bool = False
) -> tuple[int, str]:
    """Return exit code and line for an exception; print the traceback of an unexpected one, unless already printed."""
    line = first_line(error)
    if isinstance(error, WriteError):
        return FAILED, f"error: {command}: {line}"
    line = line if len(line) <= LONGEST else f"{line[:LONGEST]}..."
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _FULL.search(line):
        return FAILED, f"error: {command}: the disk is full: {line}: make room there and run the same command again"
    if isinstance(error, MemoryError) and str(error):  # raised by the engine, with the settings to change
        return FAILED, f"error: {command}: out of memory: {' '.join(str(error).split())}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _NO_MEMORY.search(line):
        return FAILED, f"error: {command}: out of memory: {line}: smaller batches or shorter texts need less"
    if type(error).__name__ in _DAMAGED:
        return REFUSED, f"error: {command}: a damaged file: {type(error).__name__}: {line}"
    if isinstance(error, OSError) and error.strerror is not None:
        where = "" if error.filename is None else f": {error.filename}"
        return REFUSED, f"error: {command}: {error.strerror}{where}"
    if isinstance(error, BadInput | ValueError | TypeError | OSError | ImportError | ArithmeticError | RuntimeError):
        return REFUSED, f"error: {with_options(line, command, names)}"
    if not traceback_printed:
        traceback.print_exception(error)
    what = f"unexpected {type(error).__name__}: {line}"
    return FAILED, f"error: {command}: {what} (please report it, with the output of `nlhf-kernels info`)"


def with_options(message: str, command: str, names: Mapping[str, str]) -> str:
    """Return the message with the command's options in place of the library's arguments."""
    subject = _SUBJECT.match(message)
    if subject is not None and subject["name"] in names and subject["rest"].startswith((":", "[")):
        message = f"{command}: {names[subject['name']]}{subject['rest']}"
    if message.startswith("--"):
        message = f"{command}: {message}"
    return _ARGUMENT.sub(lambda match: _as_option(match, names), _CALL.sub(r"\1", message))


def _as_option(match: re.Match[str], names: Mapping[str, str]) -> str:
    """Rewrite name=True as --name and name='value' as --name value; a key of a run file keeps its =."""
    name, value = names.get(match["name"]), match["value"].strip("'")
    if name is None:
        return match[0]
    return f"{name}={value}" if not name.startswith("--") else name if value == "True" else f"{name} {value}"


def option_names(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Map arguments of the library to the options named after them."""
    actions = parser._actions
    return {action.dest: action.option_strings[-1] for action in actions if action.option_strings}
