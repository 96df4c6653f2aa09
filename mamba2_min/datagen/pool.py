"""One or more servers that work in parallel: which attempt goes where, and what comes back.

Each server has its own worker threads, which ask, clean and judge. The functions here are called by the one thread that
writes into the folder. A server that is dropped returns its attempt, and the others continue.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from mamba2_min.datagen.client import OllamaClient
from mamba2_min.errors import UserError

TICK_SECONDS = 0.25

T = TypeVar("T")


def usable(clients: Iterable[OllamaClient], note: Callable[[str], None]) -> list[OllamaClient]:
    """One client for each server that has the model; `note` is called with a line about each other one.

    Raises UserError where none has it.
    """
    found: list[OllamaClient] = []
    faults: list[UserError] = []
    for client in {client.url: client for client in clients}.values():
        try:
            client.check_model()
            found.append(client)
        except UserError as error:
            faults.append(error)
    for fault in faults if found else faults[:-1]:
        note(f"{fault}; the other servers go on" if found else str(fault))
    if not found:
        raise faults[-1]
    return found


@dataclass(eq=False)
class Server:
    """A server: its client, the number of attempts that it works on, and why it did not answer the last of them."""

    client: OllamaClient
    todo: queue.SimpleQueue[int | None] = field(default_factory=queue.SimpleQueue)
    under_way: int = 0
    unanswered: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Result(Generic[T]):
    """What became of attempt `index`: what the work returned or raised."""

    server: Server
    index: int
    outcome: T | Exception


class Pool(Generic[T]):
    """`servers`: those that have not been given up, with `workers` threads each."""

    def __init__(
        self,
        clients: Sequence[OllamaClient],
        workers: int,
        work: Callable[[OllamaClient, int], T],
        attempts: Iterator[int],
    ):
        """work: what a thread does for an attempt. attempts: the indexes to work on, in order, without end."""
        self.servers = [Server(client) for client in clients]
        self._all, self._workers, self._work = tuple(self.servers), workers, work
        self._attempts, self._returned = attempts, list[int]()
        self._done: queue.SimpleQueue[Result[T]] = queue.SimpleQueue()
        for server in self.servers:
            for _ in range(workers):
                threading.Thread(target=self._run, args=(server,), daemon=True).start()

    def hand_out(self, wanted: int) -> None:
        """Gives attempts to free workers until `wanted` are under way.

        An attempt that failed before and is being repeated does not count: its server may be about to fail, and at the
        end of a run all others would wait for it.
        """
        while sum(max(server.under_way - server.client.retrying, 0) for server in self.servers) < wanted:
            free = [server for server in self.servers if server.under_way < self._workers]
            if not free:
                return
            server = min(free, key=lambda server: server.under_way)
            server.under_way += 1
            server.todo.put(self._returned.pop(0) if self._returned else next(self._attempts))

    def next_result(self) -> Result[T] | None:
        """The next attempt that ended, or None after a short while without one."""
        try:
            result = self._done.get(timeout=TICK_SECONDS)
        except queue.Empty:
            return None
        result.server.under_way -= 1
        return result

    def take_back(self, index: int) -> None:
        """Attempt `index` is to be handed out again."""
        self._returned.append(index)
        self._returned.sort()

    def give_up(self, server: Server) -> None:
        """Gives no more attempts to `server`. Results of those that it works on still come back."""
        if server in self.servers:
            self.servers.remove(server)

    def close(self) -> None:
        """Lets every worker end after what it works on."""
        for server in self._all:
            for _ in range(self._workers):
                server.todo.put(None)

    def _run(self, server: Server) -> None:
        while (index := server.todo.get()) is not None:
            try:
                outcome: T | Exception = self._work(server.client, index)
            except Exception as error:  # whatever it is, the main thread is the one to raise it
                outcome = error
            self._done.put(Result(server, index, outcome))
