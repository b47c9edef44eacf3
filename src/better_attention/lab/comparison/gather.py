"""The end of a comparison: its finished runs become a study, and the study becomes files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from better_attention.lab.analysis import learning_speed
from better_attention.lab.analysis.study import Study
from better_attention.lab.comparison.plan import Plan
from better_attention.lab.comparison.run_pictures import draw_kernels, draw_maps
from better_attention.lab.report import html, tables
from better_attention.lab.runs import manifest
from better_attention.lab.runs.job import Job
from better_attention.lab.runs.load import load_model
from better_attention.lab.runs.provenance import commit
from better_attention.lab.runs.record import RunRecord
from better_attention.lab.runs.snapshot import Snapshot, StoredRun
from better_attention.lab.tasks.splits import Splits
from better_attention.lab.tasks.variant import Variant

RESULTS = ("results.json", "results.csv", "curves.csv", "report.html")
"""The files of a study; the first is the one by which a folder of results is recognised."""


def gather(plan: Plan, stored: Snapshot, splits: Splits) -> Study:
    """What the finished runs in a folder amount to, and which runs diverged.

    Attention maps and alignment kernels are those of seed 0 at the last number of heads.
    """
    runs = _in_order(plan, stored)
    diverged = [run for run in stored.runs.values() if run.divergence]
    records = [*(record.values for _, record in runs), *(_diverged(run, splits) for run in diverged)]
    curves = {str(record.name): run.folder.curve() for run, record in runs}
    guessing = learning_speed.guessing_accuracy(splits.validation.targets)
    threshold = learning_speed.find_threshold(curves, guessing, plan.threshold, plan.task.threshold)
    pictured = [
        (run, record)
        for run, record in runs
        if record.seed == 0 and record.heads == plan.heads[-1] and run.folder.has_weights
    ]
    # Read once, for maps and kernels alike.
    models = {str(record.name): _model(run, record) for run, record in pictured}
    return Study(
        task={
            "name": plan.task.name,
            "title": plan.task.title,
            "source": plan.task.source,
            "settings": plan.task.settings(),
        },
        records=learning_speed.timed(records, curves, threshold),
        curves=curves,
        maps=[m for name, (job, model) in models.items() for m in draw_maps(name, model, job.task, splits)],
        alignments=[kernel for name, (job, model) in models.items() for kernel in draw_kernels(name, model, job)],
        command=plan.command,
        commit=commit(),
        notes=_notes(splits, [run for run, _ in runs], diverged),
        threshold=threshold,
        folders={str(record.name): run.folder.path.name for run, record in runs},
    )


def write(study: Study, out: Path) -> None:
    """Write :data:`RESULTS` and their digests into the folder ``out``.

    Raises:
        OSError: a file cannot be written.
    """
    manifest.remove(out, RESULTS)  # the digests would be wrong until all files are written
    tables.write_csv(tables.summarise(study.records), out / "results.csv", study.threshold)
    tables.write_json(study.records, out / "results.json")
    tables.write_curves(study.curves, out / "curves.csv")
    html.write_report(study, out / "report.html")
    manifest.add(out, RESULTS)


def is_results(value: object) -> bool:
    """Whether the value in a JSON file is that of a ``results.json``."""
    return (
        isinstance(value, list) and bool(value) and all(isinstance(run, dict) and "mechanism" in run for run in value)
    )


def _in_order(plan: Plan, stored: Snapshot) -> list[tuple[StoredRun, RunRecord]]:
    """The finished runs by seed, heads, and the order of mechanisms in the plan; other mechanisms come last."""
    names = [variant.name for variant in plan.variants]

    def position(item: tuple[StoredRun, RunRecord]) -> tuple[int, int, int, str]:
        mechanism = item[1].mechanism
        rank = names.index(mechanism) if mechanism in names else len(names)
        return item[1].seed, item[1].heads, rank, mechanism

    return sorted(((run, run.record) for run in stored.runs.values() if run.record), key=position)


def _model(run: StoredRun, record: RunRecord) -> tuple[Job, nn.Module]:
    """A finished run and its trained model, after making sure that its files are as they were written.

    Raises:
        ValueError: a file was changed, or the model cannot be built.
    """
    run.folder.check_files(record)
    task, model = load_model(run.folder, run.config)
    return Job(task, Variant.of(record.mechanism), record.heads, record.seed), model


def _diverged(run: StoredRun, splits: Splits) -> Mapping[str, Any]:
    """The entry of ``results.json`` for a run that was given up.

    It has no numbers, but it counts: the runs that got through say nothing of the mechanism as a whole.
    """
    config = run.config
    return {
        "task": config.task,
        "scale": config.settings["scale"],
        "mechanism": config.mechanism,
        "score": Variant.of(config.mechanism).mechanism.score,
        "heads": config.heads,
        "seed": config.seed,
        "settings": config.settings,
        "device": config.description["device"],
        **{key: config.environment.get(key) for key in ("threads", "commit", "command", "versions")},
        "samples": splits.sizes,
        "diverged": run.divergence,
    }


def _notes(splits: Splits, finished: Sequence[StoredRun], diverged: Sequence[StoredRun]) -> list[str]:
    """Sentences for the reader of the report."""
    return [
        *splits.notes,
        *(
            f"{run.folder.path.name} has lost its weights (model.safetensors): no maps of it are shown"
            for run in finished
            if not run.folder.has_weights
        ),
        *(f"a run diverged, and nothing is claimed of its mechanism: {run.divergence}" for run in diverged),
    ]
