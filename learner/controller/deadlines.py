"""Deadlines of calls: learnt from the usual durations, within what was configured."""

from __future__ import annotations

from rl_edit.config import ActorsConfig

SHORTEST_DEADLINE_S = 60.0
DEADLINE_FACTOR = 5.0
LONGEST_BACKOFF_S = 30.0
NEWEST_SHARE = 0.2
"""Weight of the newest duration in the running mean."""


class Deadlines:
    """Keeps a running mean of durations by kind of call.

    Args:
        judge_timeout_s: how long scoring may wait for another machine by its own timeouts and
            retries; it is not ended before.
    """

    def __init__(self, config: ActorsConfig, *, judge_timeout_s: float) -> None:
        self._config, self._judge_timeout_s = config, judge_timeout_s
        # By kind, not by method: probes of one candidate must not shorten the limit of groups.
        self._usual_s: dict[str, float] = {}

    def record(self, kind: str, seconds: float) -> None:
        """Takes a finished call into the mean of its kind."""
        usual_s = self._usual_s.get(kind, seconds)
        self._usual_s[kind] = (1 - NEWEST_SHARE) * usual_s + NEWEST_SHARE * seconds

    def limit_s(self, kind: str) -> float:
        """Returns the longest wait for a call of this kind.

        It is the configured one until such calls have been timed, then five times the usual.
        """
        if kind == "start":
            return self._config.start_timeout_s
        # A call that may queue behind another on the same worker has no usual duration.
        queues = kind not in ("run", "score", "learn") or self._config.placement == "colocated"
        if queues or kind not in self._usual_s:
            return self._config.deadline_s
        # A judge that hangs now and then has a usual duration that excludes its timeouts.
        waits_s = self._judge_timeout_s if kind == "score" else 0.0
        usual_s = DEADLINE_FACTOR * self._usual_s[kind]
        return min(self._config.deadline_s, max(SHORTEST_DEADLINE_S + waits_s, usual_s))

    def backoff_s(self, failures: int) -> float:
        """Returns the pause after so many failures: none after the first, then it doubles."""
        if failures <= 1:
            return 0.0
        return min(LONGEST_BACKOFF_S, self._config.backoff_s * 2.0 ** (failures - 2))
