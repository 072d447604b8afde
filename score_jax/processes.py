"""The processes of a run: how they find each other, agree, are asked to end, and end together.

JAX says in three ways that another process is gone.  A collective fails, or waits for ever; the coordination service,
which lives in process 0, misses heartbeats; or the connection to that service breaks.  The last two end a process from
C++, by `abort` and with pages of text.  Here all of them become one line and exit code 1.
"""

import contextlib
import ctypes
import faulthandler
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed  # Its client of the coordination service is nowhere else.
from jax.experimental import multihost_utils

from score_jax.errors import UserError

__all__ = ["end", "initialize", "listen", "resumable", "termination", "together"]

HEARTBEAT = 30  # Seconds without one after which a process counts as dead.
ENDED = "score_jax/ended"
# Asked to end by a scheduler, from the keyboard, or as the terminal closes; Windows lacks the last.
ASKING = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
AGAIN = "start all of them again, they go on from what is saved"

# What JAX's coordination service and its client log, and what errors say that another process's end leads to.
SERVICE = re.compile(r"^[IWEF]\d{4} .*\b(coordination_service\w*|preemption_sync_manager|client)\.(cc|h):")
LOGGED = re.compile(r"^[IWEF]\d{4} ")
COLLECTIVE = re.compile(r"gloo|nccl|barrier|coordination|heartbeat|UNAVAILABLE|DEADLINE_EXCEEDED", re.IGNORECASE)


def initialize(*, enabled: bool = False, coordinator: str = "", num_processes: int = 0, process_id: int = 0) -> None:
    """Make this process one of several of a run, before anything else uses JAX.

    Args:
      enabled: whether there are several.
      coordinator: `host:port` of the first; '' to find this out from SLURM, Open MPI, Kubernetes or a TPU.
      num_processes: how many there are, where a coordinator is given.
      process_id: which of them this is, from 0.

    Raises:
      UserError: if they do not find each other.
    """
    if not enabled or jax.distributed.is_initialized():
        return
    _tell_aborts()
    try:
        where: dict[str, Any] = dict(
            coordinator_address=coordinator, num_processes=num_processes, process_id=process_id
        )
        jax.distributed.initialize(**(where if coordinator else {}), heartbeat_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"config.distributed: {str(error).splitlines()[0]}") from error
    _met.set()
    if jax.default_backend() == "cpu":
        # There the cache's keys differ from process to process: only the first, which writes it, would find its
        # programs, and would wait for the others to compile theirs longer than the 30 s that their collectives allow.
        jax.config.update("jax_enable_compilation_cache", False)


@contextlib.contextmanager
def together(facts: dict[str, Any]) -> Iterator[None]:
    """Make several processes one run: they must agree at the start, and if one fails each says why and ends.

    Args:
      facts: names and values, JSON-like, that must be those of process 0.
    """
    if jax.process_count() == 1:
        yield
        return
    done = threading.Event()
    hearing = threading.Thread(target=_hear, args=(done,), daemon=True)
    hearing.start()
    try:
        _agree(facts)
        yield
        done.set()
        hearing.join()
    except Exception as error:  # Whatever ends this process leaves the others waiting for it.
        line = " ".join(str(error).split())
        own = isinstance(error, UserError) and isinstance(error.__cause__, OSError | None)  # Whatever its words are.
        if COLLECTIVE.search(line) and not own:
            time.sleep(3)  # Who ended may have told why, and then `_hear` or `_aborted` does.
            end(f"error: another process of this run ended, or cannot be reached ({line[:200]}): {AGAIN}")
        if not isinstance(error, UserError):
            traceback.print_exc()
            line = f"{type(error).__name__}: {line[:200]}"
        end(f"error: {line}")


_agreements = itertools.count()


def _agree(facts: dict[str, Any]) -> None:
    """Raise a `UserError` that names the first of `facts` which is another in process 0."""
    key, here, text = f"score_jax/facts/{next(_agreements)}", jax.process_index(), json.dumps(facts)
    client: Any = distributed.global_state.client
    if here == 0:
        client.key_value_set(key, text)
    first = json.loads(client.blocking_key_value_get(key, 300_000))
    own = json.loads(text)
    for name in sorted(own.keys() | first.keys()):
        if own.get(name) != first.get(name):
            raise UserError(
                f"{name} is {first.get(name)!r} in process 0 and {own.get(name)!r} in process {here}: give all "
                "processes of a run the same"
            )


_ending = threading.Lock()
_codes: list[int] = []  # That of the exit, once `_ending` is taken.


def end(line: str, code: int = 1, *, tell: bool = True, meet: bool = True) -> NoReturn:
    """Print a line and leave at once, as exit handlers would wait for processes that are gone; the others end, too.

    Args:
      line: what to say, on stdout if the code is 0.
      code: the exit code.
      tell: whether to tell the other processes.
      meet: whether to wait for them before leaving: were process 0 to leave first, they could not hear.
    """
    if not _ending.acquire(blocking=False):
        time.sleep(30 if meet else 1)  # Another thread is leaving; but where this one aborts, it may wait for this.
        os._exit(_codes[0])
    _codes.append(code)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        print(line, file=sys.stderr if code else sys.stdout, flush=True)
    if (client := distributed.global_state.client) and meet:
        with contextlib.suppress(RuntimeError):  # The service may be gone, or another told first.
            if tell:
                client.key_value_set(ENDED, json.dumps([distributed.global_state.process_id, line, code]))
        with contextlib.suppress(RuntimeError):
            client.wait_at_barrier(ENDED, 10_000)
    os._exit(code)


def _hear(done: threading.Event) -> None:
    """Ask every second whether another process ended, and end with it."""
    client: Any = distributed.global_state.client
    while not done.wait(1):
        with contextlib.suppress(RuntimeError):  # None did; or the service is gone, which an abort tells.
            who, line, code = json.loads(client.key_value_try_get(ENDED))
            reason = line.removeprefix("error: ")
            end(f"error: process {who} of this run ended: {reason}" if code else line, min(code, 1), tell=False)


def _tell_aborts() -> None:
    """Have an abort that another process's end leads to tell that in one line, and what the service logs withheld."""
    terminal = os.fdopen(os.dup(2), "w", buffering=1, errors="replace")
    read, write = os.pipe()
    os.dup2(write, 2)
    os.close(write)
    sys.stderr, said = terminal, []  # type: ignore[var-annotated]

    def pass_on() -> None:
        withheld = False
        with os.fdopen(read, errors="replace") as lines:
            for line in lines:
                if LOGGED.match(line):
                    withheld = bool(SERVICE.match(line))
                said.append(line) if withheld else terminal.write(line)

    def aborted(signum: int) -> None:
        time.sleep(0.2)  # For what is on its way to `pass_on`.
        text = "".join(said)
        if not (cause := _cause(text)):
            terminal.write(text)
            return  # And the process ends as it would have.
        end(f"error: {cause}: {AGAIN}", meet=False)

    threading.Thread(target=pass_on, daemon=True).start()
    faulthandler.enable(terminal)
    # Not by `signal.signal`, whose handlers wait for the main thread: `abort` does not wait for them.
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
    _tell_aborts.handler = handler(aborted)  # type: ignore[attr-defined]  # As long as the process.
    ctypes.CDLL(None).signal(signal.SIGABRT, _tell_aborts.handler)  # type: ignore[attr-defined]


_met = threading.Event()


def _cause(text: str) -> str:
    """What the coordination service's last words mean; '' if they are of something else."""
    if found := re.search(r"stopped sending heartbeats\):\s*([\d, ]*\d)", text):
        return f"process {found[1]} of this run was killed, or cannot be reached"
    if "detected fatal errors" not in text:
        return ""
    if not _met.is_set():
        return "the processes of this run did not find each other in time (config.distributed)"
    if "Shutdown barrier" in text:
        return "not all processes of this run came to their end"
    return "process 0 of this run was killed, or cannot be reached"


# What the signals of a process that `listen` was called in do at once, innermost last.
_acts: list[Callable[[int], object]] = []


def listen() -> None:
    """Let Ctrl-C end this process in one line, and signals act while the main thread waits for a compiler or a device.

    It is for a process of its own, `run.py`; what signals mean while it trains or samples say `termination` and
    `resumable`.
    """
    read, write = socket.socketpair()
    write.setblocking(False)
    signal.set_wakeup_fd(write.detach(), warn_on_full_buffer=False)
    _acts.append(lambda signum: end("interrupted", 130))

    def act() -> None:
        while byte := read.recv(1):
            _acts[-1](byte[0])

    threading.Thread(target=act, daemon=True).start()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: None)


@contextlib.contextmanager
def _handling(signals: list[int], handler: Callable[..., Any], act: Callable[[int], object]) -> Iterator[None]:
    """Give signals that are not ignored a handler, and those of `listen` an act, while it lasts."""
    # Ignored is what `nohup` does with a terminal's end.
    before = {s: signal.signal(s, handler) for s in signals if signal.getsignal(s) is not signal.SIG_IGN}
    _acts.append(act)
    try:
        yield
    finally:
        _acts.pop()
        for signum, old in before.items():
            signal.signal(signum, signal.SIG_DFL if old is None else old)  # None: it was C++'s.


@contextlib.contextmanager
def termination() -> Iterator[Callable[[int], bool]]:
    """Tells whether the run was asked to end (SIGTERM, SIGINT or SIGHUP), which does not end it meanwhile.

    A second SIGINT does.  Of several processes one may be asked; all are told, at the same step.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # Signals are the main thread's.
        return
    told, interrupts, several = threading.Event(), itertools.count(), jax.process_count() > 1
    listening = bool(_acts)  # Then `act` ends the process, and an exception here would only be a traceback beside it.

    def ask(signum: int, frame: object) -> None:
        if signum == signal.SIGINT and told.is_set() and not listening:
            raise KeyboardInterrupt
        told.set()
        if several:
            signal.raise_signal(signal.SIGTERM)  # JAX handles that, and tells the others.

    def act(signum: int) -> None:
        if signum == signal.SIGINT and next(interrupts):
            end("interrupted", 130)

    signals = [s for s in ASKING if not (several and s == signal.SIGTERM)]
    with _handling(signals, ask, act):
        yield multihost_utils.reached_preemption_sync_point if several else lambda step: told.is_set()


@contextlib.contextmanager
def resumable(line: str) -> Iterator[None]:
    """While it lasts the signals of `termination` end a process that `listen` was called in at once, and well.

    Args:
      line: what to say of it.
    """
    if not _acts or threading.current_thread() is not threading.main_thread():
        yield
        return
    with _handling(ASKING, lambda *_: None, lambda signum: end(line, 0)):
        yield
