"""Several calls that wait for the same things in turn, one running at a time.

Each call has a thread, only because a call must be able to stop in its middle: whoever runs, all
others stand still, so the calls need no locks and their order is always the same.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any


class _Cancelled(BaseException):
    """Unwinds a call whose pass has failed elsewhere."""


class _Worker(threading.Thread):
    def __init__(self, call: Callable[[], Any], around: Callable[[], AbstractContextManager]):
        super().__init__(daemon=True)
        self._call, self._around = call, around
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self.result: Any = None
        self.error: BaseException | None = None
        self.wants, self.done, self.cancelled = -1, False, False

    def run(self) -> None:
        self._go.acquire()
        try:
            if not self.cancelled:
                with self._around():
                    self.result = self._call()
        except _Cancelled:
            pass
        except BaseException as error:  # handed to the thread that runs the pass
            self.error = error
        self.done = True
        self._back.release()

    def resume(self) -> None:
        """Runs the call until it waits or ends."""
        self._go.release()
        self._back.acquire()
        if self.error:
            raise self.error

    def wait_for(self, index: int) -> None:
        self.wants = index
        self._back.release()
        self._go.acquire()
        if self.cancelled:
            raise _Cancelled

    def cancel(self) -> None:
        self.cancelled = True
        if not self.done:
            self._go.release()
            self._back.acquire()


class Lockstep:
    """Runs `calls` to their ends; each may call wait_for(index) from inside.

    around: a context for each thread, as torch.no_grad, which is a setting of a thread.
    """

    def __init__(
        self, calls: Sequence[Callable[[], Any]], around: Callable[[], AbstractContextManager]
    ):
        self._workers = [_Worker(call, around) for call in calls]

    @property
    def size(self) -> int:
        return len(self._workers)

    def is_mine(self) -> bool:
        """Whether this thread runs one of the calls."""
        return threading.current_thread() in self._workers

    def wait_for(self, index: int) -> None:
        """Of a call: go on when everybody waits and `index` is the least that is waited for."""
        worker = threading.current_thread()
        assert isinstance(worker, _Worker)
        worker.wait_for(index)

    def run(self, bring: Callable[[int], None]) -> list[Any]:
        """Results in order. bring(index) is called in this thread before those waiting go on.

        Raises what a call or `bring` raises; the other calls are unwound first.
        """
        try:
            for worker in self._workers:
                worker.start()
                worker.resume()
            while waiting := [worker for worker in self._workers if not worker.done]:
                index = min(worker.wants for worker in waiting)
                bring(index)
                for worker in waiting:
                    if worker.wants == index:
                        worker.resume()
        finally:
            for worker in self._workers:
                if worker.is_alive():
                    worker.cancel()
        return [worker.result for worker in self._workers]
