"""Questions to Ray's control service (GCS), each with a deadline.

Ray waits for its answer without an end: a driver that asks a service which hangs, or is cut off,
would hang with it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from actors import ray_watch
from rl_edit.errors import ClusterLost, brief

T = TypeVar("T")

ANSWER_S = ray_watch.GCS_GRACE_S + 15.0
"""Longest wait for an answer: a GCS elsewhere may be restarted meanwhile."""

POLL_S = 0.5


def answered(what: str, query: Callable[[], T], *, limit_s: float = ANSWER_S) -> T:
    """Asks Ray in a thread, and returns its answer.

    Args:
        what: completes "Ray did not say ...", as in "how large its object store is".

    Raises:
        ClusterLost: no answer within ``limit_s``, or an error, or the cluster has ended.
    """
    answer: Future[T] = Future()

    def ask() -> None:
        try:
            answer.set_result(query())
        except BaseException as error:
            answer.set_exception(error)

    # A daemon: a question that is never answered must not keep the process from its end.
    threading.Thread(target=ask, name="ray-query", daemon=True).start()
    deadline = time.monotonic() + limit_s
    # In slices, so that the loss of the cluster is noticed before the deadline.
    while True:
        try:
            return answer.result(max(0.0, min(POLL_S, deadline - time.monotonic())))
        except Exception as error:
            ray_watch.check()
            # The wait and Ray itself raise errors of one type.
            if answer.done():
                raise ClusterLost(_unanswered(what, brief(error))) from error
            if time.monotonic() >= deadline:
                raise ClusterLost(_unanswered(what, f"no answer within {limit_s:g} s")) from None


def _unanswered(what: str, reason: str) -> str:
    return (
        f"Ray did not say {what} ({reason}): its control service (GCS) hangs or cannot be reached. "
        "See `ray status` and gcs_server.out in Ray's logs on the head node, then start again."
    )
