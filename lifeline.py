"""Ranks that end together: when one dies or fails, all of them do, with one line that names it and the reason.

    torchrun --nproc_per_node=2 generate.py --prompt "def fibonacci(n):"     # then kill one of the two

`one_voice` is the frame of a program: only rank 0 prints, and whatever ends one rank ends all. In it, `join` takes the
place of `tp.init_dist`, and ties the ranks to one another. In a process that is alone both are idle.

Sources: Python's documentation of socket (keepalive), select and signal (set_wakeup_fd).
"""

import contextlib
import json
import math
import os
import re
import secrets
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import torch

import tp

_line: "Lifeline | None" = None  # of this process, once it has joined others
_program = "hotloop"  # who speaks in a line on stderr


def join(all_reduce: str = "auto") -> tp.Ranks | None:
    """`tp.init_dist`, which see, with a Lifeline to the other ranks; None where there are none."""
    global _line
    ranks = tp.init_dist(all_reduce)
    if ranks is not None and _line is None:
        _line = Lifeline(ranks)
    return ranks


class Lifeline:
    """A TCP connection from every rank to rank 0: when a process dies, its end tells the others at once.

    A thread watches, so that it does not matter what a rank is doing or waiting for. Messages are lines of JSON:
    "failed" (a rank's reason and exit code) to rank 0, "end" (the exit code of all) from it.
    """

    GRACE = 2.0  # seconds for the other ranks to run into the same error, or for a death to explain a failure

    def __init__(self, ranks: tp.Ranks):
        self.rank, self.world, self.barrier, self.closing = ranks.rank, ranks.world, ranks.barrier, False
        self.stderr = sys.__stderr__
        self.failed: dict[int, tuple[int, str]] = {}  # rank -> (exit code, reason)
        self.lock, self.parent = threading.Lock(), os.getppid()
        self.peers: dict[socket.socket, int] = {}
        if self.rank == 0:
            self._accept(ranks)
        else:
            port, token = ranks.broadcast()
            peer = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=60)
            peer.sendall(f"{token} {self.rank}\n".encode())
            self.peers[peer] = 0
        for peer in self.peers:
            peer.settimeout(None)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a machine that lost its power, within 40 s
            for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
                if hasattr(socket, option):
                    peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self.wake, self.waker = socket.socketpair()
        if threading.current_thread() is threading.main_thread():
            # Python runs signal handlers between bytecodes, which a rank inside a collective does not reach; the
            # number of a signal is written here at once.
            self.waker.setblocking(False)
            self.before = signal.set_wakeup_fd(self.waker.fileno()), signal.signal(signal.SIGTERM, lambda *_: None)
        self.thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self.thread.start()

    def _accept(self, ranks: tp.Ranks) -> None:
        both = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
        with socket.create_server(("", 0), **both) as server:
            server.settimeout(60)
            token = secrets.token_hex(16)  # whoever else finds the port is not let in
            ranks.broadcast((server.getsockname()[1], token))
            while len(self.peers) < self.world - 1:
                peer, _ = server.accept()
                peer.settimeout(60)
                # Unbuffered: a rank that has failed already has sent more, which is the watching thread's.
                word, _, rank = peer.makefile("rb", buffering=0).readline(100).partition(b" ")
                if word == token.encode():
                    self.peers[peer] = int(rank)
                else:
                    peer.close()

    def _watch(self) -> None:
        """The thread: wait for a death, a message, a signal or the launcher's end."""
        buffers, deadline, code = dict.fromkeys(self.peers, b""), math.inf, 1
        while True:
            wait = min(1.0, max(0.0, deadline - time.monotonic()))
            ready, _, _ = select.select([*buffers, self.wake], [], [], wait)
            for peer in ready:
                try:
                    data = peer.recv(4096)
                except OSError:  # reset: it died with something unread
                    data = b""
                if peer is self.wake:
                    if not data or self.closing:
                        return
                    if data[-1] in (signal.SIGTERM, signal.SIGINT):  # the main thread may be stuck: end it from here
                        deadline, code = min(deadline, time.monotonic() + 1.0), 128 + data[-1]
                elif data:
                    *lines, buffers[peer] = (buffers[peer] + data).split(b"\n")
                    for message in map(json.loads, lines):
                        if message["kind"] == "end":
                            self._exit(message["code"])
                        self.failed[self.peers[peer]] = message["code"], message["reason"]
                        deadline = min(deadline, time.monotonic() + self.GRACE)
                else:
                    rank = self.peers[peer]
                    del buffers[peer]
                    if not self.closing and rank not in self.failed:
                        self.end(1, f"rank {rank} died (killed, or out of memory); all ranks end")
            if not self.closing and os.getppid() != self.parent:  # the launcher was killed
                os._exit(1)
            if time.monotonic() >= deadline and not self.closing:
                rank = min(self.failed, default=None)
                code, reason = self.failed.get(rank, (code, ""))
                self.end(code, reason and f"rank {rank}: {reason}")

    def fail(self, code: int, reason: str, detail: str = "") -> None:
        """The main thread cannot go on: end all ranks with this exit code. Does not return.

        reason: one line; empty where there is nothing to say (Ctrl-C). detail: a traceback, for rank 0's own errors.
        """
        if self.rank != 0:
            with contextlib.suppress(OSError):
                self._send({"kind": "failed", "code": code, "reason": reason})
            time.sleep(20)  # the thread ends this process, when rank 0 says so
            self._exit(code)
        until = time.monotonic() + (self.GRACE if reason else 0)
        while time.monotonic() < until and len(self.failed) < self.world - 1:
            time.sleep(0.01)  # if another rank has died, that is the reason, and the thread ends this process with it
        for their_code, their_reason in self.failed.values():
            if not their_reason:  # Ctrl-C has ended another rank, and what failed here followed from it
                self.end(their_code, "")
        everywhere = len(self.failed) == self.world - 1
        self.end(code, reason and (reason if everywhere else f"rank 0: {reason}") + detail)

    def end(self, code: int, line: str) -> None:
        """Print one line, if any, and end all ranks. Does not return."""
        with self.lock:
            if line and self.rank in (0, 1):  # rank 1 tells of rank 0's death
                with contextlib.suppress(OSError, ValueError):
                    print(f"{_program}: {line}", file=self.stderr, flush=True)
            if self.rank == 0:
                with contextlib.suppress(OSError):
                    self._send({"kind": "end", "code": code})
            self._exit(code)

    def _send(self, message: dict) -> None:
        for peer in self.peers:
            peer.sendall(json.dumps(message).encode() + b"\n")

    def _exit(self, code: int) -> None:
        """At once: destructors of process groups wait for ranks that are gone."""
        if threading.current_thread() is threading.main_thread():  # another thread may hold the stream, and be stuck
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
        os._exit(code)

    def close(self) -> None:
        """Stop watching, once every rank has come as far; the signals are as they were."""
        global _line
        self.barrier()
        self.closing = True
        self.barrier()  # from here on a connection that ends is no death
        _line = None
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self.before[0])
            signal.signal(signal.SIGTERM, self.before[1])
        self.waker.setblocking(True)
        self.waker.sendall(b"\0")
        self.thread.join(5)
        for s in (*self.peers, self.wake, self.waker):
            s.close()


@contextlib.contextmanager
def _memory_told() -> Iterator[None]:
    """The CPU's allocator has no error of its own for memory that does not suffice: make it the GPU's."""
    try:
        yield
    except RuntimeError as error:
        if wanted := re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", str(error)):
            raise torch.OutOfMemoryError(
                f"not enough memory: {int(wanted[1]) / 1e9:.1f} GB more were wanted; give a shorter context, a smaller "
                "model or --quant"
            ) from None
        raise


@contextlib.contextmanager
def one_voice(program: str) -> Iterator[None]:
    """The frame of a program under torchrun: only rank 0 prints; whatever ends one rank ends all, with one line.

    Exit codes are those of one process: 2 for bad input (ValueError) and memory that does not suffice, 130 for Ctrl-C,
    1 for what nobody foresaw. Under one process it only tells of memory as a GPU does.
    """
    global _program
    if not tp.under_torchrun():
        with _memory_told():
            yield
        return
    _program, loud = program, os.environ["RANK"] == "0"
    if not loud:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        with _memory_told():
            yield
        if _line is not None:
            _line.close()
        if tp.current() is not None:
            tp.current().close()
        return
    except SystemExit as error:  # argparse has printed already, on rank 0 alone
        code, reason, detail = error.code if isinstance(error.code, int) else int(error.code is not None), "", ""
    except KeyboardInterrupt:
        code, reason, detail = 130, "", ""
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code, reason, detail = 141, "", ""
    except (ValueError, torch.OutOfMemoryError, MemoryError) as error:
        code, reason, detail = 2, (str(error) or "out of memory").splitlines()[0], ""
    except Exception as error:  # a defect, or a collective whose partner is gone
        code, detail = 1, "\n" + traceback.format_exc()
        reason = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
    if _line is not None:
        _line.fail(code, reason, detail)
    if not loud and code:
        time.sleep(5)  # rank 0 is about to say the same, and the launcher ends all when the first is gone
    if reason:
        print(f"{program}: {reason}{detail}", file=sys.stderr if loud else sys.__stderr__, flush=True)
    if tp.current() is not None:  # it failed while it joined or left the others: destructors would wait for them
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
