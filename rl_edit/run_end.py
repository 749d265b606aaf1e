"""The end of an attempt to train a run: every way in which one can end leads through here.

Whatever happened, in this order: the newest update is committed if it can be; a newer attempt in
the directory is left alone; ``run.json`` says how it ended; the workers end; the lease is released;
and one error, with one exit code, goes on to the command line. Nothing is removed but what this
attempt has made. docs/reliability.md has the table of ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from learner.controller import heldout
from learner.controller.lease import Lease
from learner.controller.loop import TrainingLoop
from learner.controller.run import Observer, Outcome, Run
from learner.controller.run_log import Events
from learner.controller.stop import Signals
from rl_edit.config import RunConfig
from rl_edit.editors import lora
from rl_edit.errors import (
    FAILED,
    Fenced,
    InputError,
    Interrupted,
    ResourcesInfeasible,
    brief,
    lacks_space,
)
from rl_edit.files import EVENTS, HELDOUT, METRICS, replace_file
from rl_edit.last_resort import LastResort
from rl_edit.method.update import TrainingFailed
from rl_edit.report.overlays import MASK_FILES
from rl_edit.run_directory import CONFIG_FILE
from rl_edit.run_record import RUN_FILE, RunRecord, read_run_record
from rl_edit.types import AdapterWeights

_BEFORE_TRAINING = (CONFIG_FILE, RUN_FILE, EVENTS, METRICS, HELDOUT, *MASK_FILES)
"""Files that an attempt may write before its first update."""


class Attempt:
    """One attempt to train a run in its directory, from the lease to its end.

    Attributes:
        record: content of ``run.json`` while the run goes on.
        had_begun: True when there was a run in the directory before.
        made: True when this attempt made the directory.
        before: files that describe the run, as they were before this attempt.
        executor, loop, outcome, last_resort: None until they have come to be.
        saved: True once the record of a good end is written.
        failure: the error whose record is written; None before.
    """

    def __init__(
        self, run: Run, record: RunRecord, observer: Observer, signals: Signals, *, had_begun: bool
    ) -> None:
        self.run, self.record, self.observer, self.signals = run, record, observer, signals
        directory = run.directory
        self.had_begun, self.made = had_begun, not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        self.before = _description_files(directory)
        try:
            self.lease = Lease.take(directory)
            self.events = Events(directory / EVENTS, lease=self.lease, note=observer.note)
        except OSError:
            self._remove_directory()
            raise
        self.executor: Any = None
        self.loop: TrainingLoop | None = None
        self.outcome: Outcome | None = None
        self.saved = False
        self.failure: BaseException | None = None
        self.last_resort: LastResort | None = None

    def check(self) -> None:
        """Ends a wait that comes before the first update.

        Raises:
            Fenced: a newer attempt owns the directory; said first, for nothing may be written then.
            Interrupted: a signal has come.
        """
        self.lease.check()
        self.signals.check()

    def stopped_line(self) -> str:
        """Says what a run that was stopped has saved, and how it goes on."""
        assert self.loop is not None and self.outcome is not None
        done, saved = self.outcome.updates_done, self.loop.commits.updates_done
        extent = "everything is saved" if saved == done else f"saved up to update {saved}"
        return (
            f"stopped after update {done}; {extent}. Continue with: "
            f"rl-edit train --run-dir {self.run.directory} --resume"
        )

    def recorded_end(self) -> tuple[str, int] | None:
        """Returns line and exit code of the end in ``run.json``; None before it."""
        if self.failure is not None:
            code: int = getattr(self.failure, "exit_code", FAILED)
            return " ".join(str(self.failure).split()), code
        if not self.saved:
            return None
        assert self.outcome is not None
        if status_of(self.outcome, self.run.config) == "stopped":
            return self.stopped_line(), Interrupted(self.signals.received).exit_code
        return "the run is done, and everything is saved", 0

    def save(self) -> None:
        """Writes the adapters, the last event and the final ``run.json`` of a run that ended well.

        Raises:
            Fenced: a newer attempt owns the directory.
        """
        assert self.outcome is not None
        run, outcome, name = self.run, self.outcome, None
        self.lease.check()
        if outcome.adapter is not None:
            name = str(outcome.adapter.id)
            # Weights before the record: `done` in run.json means that the adapter is there.
            lora.save(run.directory / "adapter", outcome.adapter, run.config.lora)
            _save_best(run, outcome.adapter, self.observer)
        status = status_of(outcome, run.config)
        self.lease.check()
        self.events("finished", status=status, updates_done=outcome.updates_done, adapter=name)
        self._write_record(status=status, adapter=name)
        self.saved = True

    def fail(self, error: BaseException) -> BaseException:
        """Commits the newest update and writes why the run failed; returns the error to raise."""
        problem = self._keep()
        try:
            self.lease.check()
        except Fenced as fenced:
            # The directory belongs to another attempt now. Nothing more is written there.
            return fenced
        except OSError:
            # Its owner cannot be found out, so it is left as it is.
            return self._explained(error)
        explained = self._explained(problem if isinstance(problem, Fenced) else error)
        try:
            self.record_failure(explained)
        except Fenced as fenced:
            return fenced
        except OSError as unwritten:
            self._note_unrecorded(explained, unwritten)
        self.failure = explained
        return explained

    def _note_unrecorded(self, explained: BaseException, unwritten: OSError) -> None:
        """Adds to the error that ``run.json`` says "running" and cannot be changed."""
        record = None
        with contextlib.suppress(OSError, ValueError):
            record = read_run_record(self.run.directory)
        if record is not None and record.status == "running":
            explained.add_note(
                f"{RUN_FILE} cannot be written ({unwritten.strerror or unwritten}), so it still "
                'says "running".'
            )

    def _keep(self) -> BaseException | None:
        """Commits the newest update, where the loop itself has not; returns what prevents it."""
        if self.loop is None:
            return None
        try:
            asyncio.run(self.loop.keep())
        # What ended the run is the error to report.
        except Exception as error:
            return error
        return None

    def _explained(self, error: BaseException) -> BaseException:
        """Returns an error of the disk as one that says how the run goes on."""
        if not isinstance(error, OSError) or self.loop is None or error.filename is None:
            return error
        done = self.loop.commits.updates_done
        problem = (
            f"{error.filename}: {error.strerror}, so the run ends here; its newest checkpoint is "
            f"that of update {done}. "
        )
        if lacks_space(error):
            explained: Exception = ResourcesInfeasible(
                f"{problem}Free space, then continue with --resume"
            )
        else:
            explained = TrainingFailed(
                f"{problem}Make {self.run.directory} writable, then continue with --resume"
            )
        explained.__cause__ = error
        return explained

    def record_failure(self, error: BaseException) -> None:
        """Writes why the run failed. An attempt that added nothing leaves the run as it was.

        Raises:
            Fenced: a newer attempt owns the directory.
            OSError: the record cannot be written.
        """
        # A wrapper that carries its cause would hide the message that says what to do.
        cause = getattr(error, "cause", None) or error
        status, reason = "failed", brief(cause)
        if isinstance(error, Interrupted):
            status = "stopped"
            self.events("finished", status=status, updates_done=0, adapter=None)
        else:
            self.events("failed", reason=reason)
        try:
            self._write_record(status=status, reason=reason)
        finally:
            # Settings that never trained must not replace those of the updates that did.
            if self.loop is None or not self.loop.log.updates_reported:
                for path, content in self.before.items():
                    self.lease.check()
                    replace_file(path, content)
            # A new directory in which nothing began is emptied, so that a second try needs no
            # --resume.
            refused = isinstance(error, InputError | ResourcesInfeasible)
            if self._is_unused() and (refused or self.executor is None):
                self.lease.remove(_BEFORE_TRAINING)
                self._remove_directory()

    def _is_unused(self) -> bool:
        """Tests whether the directory holds nothing of a run: no update was ever done in it."""
        snapshot = self.loop.snapshot if self.loop is not None else None
        trained = snapshot is not None and snapshot.updates_done > 0
        return not (self.had_begun or trained or (self.run.directory / "checkpoints").exists())

    def _remove_directory(self) -> None:
        """Removes the directory when this attempt made it and it is empty."""
        if self.made:
            with contextlib.suppress(OSError):
                self.run.directory.rmdir()

    def _write_record(self, **end: Any) -> None:
        ended = time.time()
        more = {**end, "finished": ended, "seconds": ended - (self.record.started or ended)}
        self.lease.check()
        self.record.model_copy(update=more).write(self.run.directory, check=self.lease.check)

    def close(self) -> None:
        """Ends the workers and then the lease: the next attempt must not meet them."""
        try:
            _close(self.run.config, self.executor)
        # How the run ended is written already; what is left of its workers cannot change that.
        except Exception as error:
            with contextlib.suppress(Exception):
                self.observer.note(f"the workers did not end as they should ({brief(error)})")
        finally:
            self.lease.release()
            if self.last_resort is not None:
                self.last_resort.close()


@contextlib.contextmanager
def one_end(attempt: Attempt) -> Iterator[None]:
    """Leads every end of the block, good or bad, through :class:`Attempt`."""
    try:
        yield
        attempt.observer.ended()
        attempt.save()
    # Also KeyboardInterrupt and SystemExit: a record must not say "running" for ever.
    except BaseException as error:
        # What ended the run is the error to report, not what a display says of it.
        with contextlib.suppress(Exception):
            attempt.observer.ended()
        explained = attempt.fail(error)
        if explained is error:
            raise
        raise explained from error
    finally:
        attempt.close()


def status_of(outcome: Outcome, config: RunConfig) -> str:
    """Returns the status of a run that ended without an error: done, done early or stopped."""
    if outcome.updates_done == config.train.updates:
        return "done"
    return "done early" if outcome.early else "stopped"


def _save_best(run: Run, last: AdapterWeights, observer: Observer) -> None:
    """Saves ``adapter_best/`` when the best adapter on held-out tasks is not the last one."""
    directory = run.directory
    shutil.rmtree(directory / "adapter_best", ignore_errors=True)
    try:
        stored = heldout.read_best(directory / heldout.BEST)
    except ValueError as error:  # damaged, or of another version: the last adapter is saved already
        observer.note(str(error))
        return
    if stored is None or stored[1].id.sha256 == last.id.sha256:
        return
    best, weights = stored
    lora.save(directory / "adapter_best", weights, run.config.lora)
    observer.say(
        f"the best adapter by held-out {best.protocol} is {weights.id} with {best.gold:.4g}: "
        f"{directory / 'adapter_best'}"
    )


def _description_files(directory: Path) -> dict[Path, bytes]:
    """Reads the files that describe a run, by path.

    A record that says "running" is left out: a killed attempt leaves it, and it is no longer true.
    """
    paths = (directory / CONFIG_FILE, directory / RUN_FILE)
    contents = {path: path.read_bytes() for path in paths if path.is_file()}
    return {
        path: content
        for path, content in contents.items()
        if path.name != RUN_FILE or b'"status": "running"' not in content
    }


def _close(config: RunConfig, executor: Any) -> None:
    if executor is not None:
        # In a loop of its own: that of the run has ended, maybe by an exception.
        asyncio.run(executor.close())
    if config.actors.runtime == "ray":
        from actors import ray_cluster

        ray_cluster.disconnect()
