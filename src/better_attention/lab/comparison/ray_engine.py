"""The runs of a comparison as tasks of Ray: on all CPUs or GPUs of this machine, or of many.

Each run is a task of its own. Ray starts it again where its worker was killed or its machine was lost: it continues at
its checkpoint if the folder of the comparison is shared, else from its start, and ends with the same numbers. They are
those of the usual engine, bit for bit on a CPU with as many threads.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from better_attention.lab.comparison.cluster import Cluster, connected, first_line
from better_attention.lab.comparison.compare import report_finished
from better_attention.lab.comparison.plan import Plan
from better_attention.lab.comparison.ray_worker import SENT, Order, event_of, work
from better_attention.lab.files import write_atomic
from better_attention.lab.lock import locked
from better_attention.lab.runs.folder import RunFolder
from better_attention.lab.runs.job import Job
from better_attention.lab.runs.provenance import versions
from better_attention.lab.runs.record import RunRecord
from better_attention.lab.runs.snapshot import Snapshot
from better_attention.lab.tasks.splits import Splits
from better_attention.lab.training.events import Began, Ended, Failed, Notify, ignore
from better_attention.lab.training.interruption import Stop
from better_attention.lab.training.progress import DivergedError, Interrupted
from better_attention.lab.training.step_time import Measure, measure
from better_attention.text import plural

ATTEMPTS = 4
"""How often a run is begun whose worker is killed each time."""
LOOK_SECONDS = 0.2
"""Time between two looks at what the workers tell."""


def inbox_class() -> type:
    """What takes the messages of the workers, in a process of its own; its answer is whether they are to stop.

    Made here, because Ray sends a class of a function as it is; one of a module it would import, and torch with it.
    """

    class Inbox:
        def __init__(self) -> None:
            self.messages: list[str] = []
            self.stopping = False

        def tell(self, message: str) -> bool:
            self.messages.append(message)
            return self.stopping

        def take(self) -> list[str]:
            messages, self.messages = self.messages, []
            return messages

        def stop(self) -> None:
            self.stopping = True

    return Inbox


@dataclass(frozen=True, slots=True)
class RayEngine:
    """Trains the runs of a comparison on a cluster, as :func:`.compare.train` does here one after the other."""

    cluster: Cluster

    @property
    def device(self) -> str:
        """The kind of device that runs are trained on."""
        return self.cluster.device

    def train(
        self,
        plan: Plan,
        stored: Snapshot,
        splits: Splits,
        accelerator: Accelerator,
        notify: Notify = ignore,
        measure: Measure = measure,
    ) -> list[str]:
        """Train the runs that are not finished, as many at once as the cluster can; the names of those that failed.

        Each worker measures the speed of its model itself: that of this machine would say nothing of another.

        Raises:
            ValueError: the cluster cannot be used, or a worker refuses a run.
            Interrupted: a signal arrived; everything is saved.
        """
        jobs = plan.jobs()
        missing = stored.missing(jobs)
        for number, job in enumerate(jobs, start=1):
            if job not in missing:
                report_finished(Began(job.folder_name, number, len(jobs)), stored, notify, tidy=True)
        if not missing:
            return []
        stop = Stop(notify)
        # The cluster first: where it cannot be used, nothing is left behind.
        with connected(self.cluster) as ray, _mark(plan.out) as mark, stop.listening():
            sweep = _Sweep(ray, self.cluster, plan, splits, mark, notify)
            sweep.start(jobs, missing)
            return sweep.watch(stop)


@contextmanager
def _mark(out: Path) -> Iterator[str]:
    """A file in ``out`` with a name that is nowhere else: who sees it shares the folder."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix=".sweep-", dir=out) as file:
        yield Path(file.name).name


class _Sweep:
    """The runs that are being trained."""

    def __init__(self, ray: Any, cluster: Cluster, plan: Plan, splits: Splits, mark: str, notify: Notify) -> None:
        self.ray, self.cluster, self.plan, self.splits, self.mark = ray, cluster, plan, splits, mark
        self.notify = notify
        self.numbers: dict[str, int] = {}
        self.tasks: dict[Any, str] = {}
        self.begun: set[str] = set()
        self.failed: list[str] = []
        self.inbox = ray.remote(inbox_class()).options(num_cpus=0).remote()

    def start(self, jobs: Sequence[Job], missing: Sequence[Job]) -> None:
        """Hand every missing run to Ray."""
        names = [job.folder_name for job in jobs]
        self.numbers = {name: number for number, name in enumerate(names, start=1)}
        parts = {name: getattr(self.splits, name) for name in ("train", "validation", "test")}
        # Once for all runs: the workers of a machine read one copy.
        arrays = self.ray.put({name: (s.inputs.cpu().numpy(), s.targets.cpu().numpy()) for name, s in parts.items()})
        task = self.ray.remote(
            num_cpus=self.cluster.cpus_per_run,
            num_gpus=self.cluster.gpus_per_run,
            max_retries=ATTEMPTS - 1,
            retry_exceptions=False,  # a worker that dies is tried again, an error of ours is not
        )(run)
        for job in missing:
            name = job.folder_name
            self.tasks[task.options(name=name).remote(name, self.order(job), arrays, self.inbox)] = name

    def order(self, job: Job) -> str:
        """What a worker needs to know of a run."""
        return json.dumps(
            asdict(
                Order(
                    task=job.task.name,
                    scale=job.task.scale,
                    settings=job.task.settings(),
                    variant=job.variant.name,
                    heads=job.heads,
                    seed=job.seed,
                    number=self.numbers[job.folder_name],
                    runs=len(self.numbers),
                    data_sha256=self.splits.digest,
                    assets=self.splits.assets,
                    departures=self.splits.departures,
                    out=str(self.plan.out.resolve()),
                    mark=self.mark,
                    command=self.plan.command,
                    device=self.cluster.device,
                    threads=self.cluster.cpus_per_run,
                    versions=versions(),
                )
            )
        )

    def watch(self, stop: Stop) -> list[str]:
        """Report what happens until every run has ended; the names of those that failed.

        Raises:
            ValueError: a worker refused a run.
            Interrupted: ``stop`` said so.
        """
        stopping, interrupted = False, 0
        while self.tasks:
            if stop() and not stopping:
                stopping = True
                self.stop()
            done, _ = self.ray.wait(list(self.tasks), num_returns=1, timeout=LOOK_SECONDS)
            self.report()
            for task in done:
                interrupted += self.end(task, self.tasks.pop(task))
        if stopping:
            raise _with_signal(Interrupted(f"{plural(interrupted, 'run')} stopped, each after an update."), stop.signal)
        return self.failed

    def stop(self) -> None:
        """Let the runs in progress save and end, and begin no other."""
        self.ray.get(self.inbox.stop.remote())
        self.report()
        for task, name in self.tasks.items():
            if name not in self.begun:
                self.ray.cancel(task)

    def report(self) -> None:
        """Notify of what the workers have told."""
        for text in self.ray.get(self.inbox.take.remote()):
            message = json.loads(text)
            name = message["name"]
            self.begun.add(name)
            if message["kind"] == "warning":
                warnings.warn(message["text"], stacklevel=2)
            elif event := event_of(message, name, self.numbers[name], len(self.numbers)):
                self.notify(event)

    def end(self, task: Any, name: str) -> bool:
        """Take what came of a run; whether it was interrupted."""
        try:
            text, files = self.ray.get(task)
        except self.ray.exceptions.TaskCancelledError:
            return True
        except self.ray.exceptions.RayTaskError:  # an error in our own program
            raise
        except self.ray.exceptions.RayError as error:
            self.fail(name, f"its worker was lost {plural(ATTEMPTS, 'time')}, the last time: {first_line(error)}")
            return False
        outcome = json.loads(text)
        match outcome["state"]:
            case "finished":
                self.notify(Ended(name, self.received(name, files)))
            case "failed":
                self.fail(name, outcome["text"])
            case "refused":
                raise ValueError(outcome["text"])
        return bool(outcome["state"] == "interrupted")

    def fail(self, name: str, why: str) -> None:
        """Leave a run out."""
        self.failed.append(name)
        self.notify(Failed(name, DivergedError(why)))

    def received(self, name: str, files: Mapping[str, bytes]) -> RunRecord:
        """The record of a finished run, whose files were written here by the worker or came from it."""
        folder = RunFolder(self.plan.out / name)
        if files:
            with locked(folder.path):
                for each in sorted(SENT, key=lambda file: file == "result.json"):  # last: with it the run is finished
                    write_atomic(folder.path / each, files[each])
        record = folder.record()
        if record is None:
            raise ValueError(f"{folder.path} was removed while the comparison ran: run the same command again.")
        folder.check_files(record)
        return record


def run(name: str, order: str, arrays: Mapping[str, Any], inbox: Any) -> tuple[str, dict[str, bytes]]:
    """The task of Ray: :func:`.ray_worker.work`, which tells the inbox."""
    import ray

    def tell(message: Mapping[str, Any]) -> bool:
        with suppress(ray.exceptions.RayError):  # the comparison has ended, and with it this task will
            return bool(ray.get(inbox.tell.remote(json.dumps({"name": name, **message}))))
        return True

    return work(order, arrays, tell)


def _with_signal(error: Interrupted, number: int | None) -> Interrupted:
    error.signal = number or error.signal
    return error
