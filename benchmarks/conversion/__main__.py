"""``python -m benchmarks.conversion``: convert trained models to other mechanisms, and measure what that costs.

Everything is resumed: models that were trained, and conversions that were measured, are not done again.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from better_attention.lab.runs.provenance import commit

from . import lab_models, minilm, records, tables
from .records import Stage
from .study import Setting, Subject, judged, study

MECHANISMS = ("optimised", "efficient", "super", "expressive")
TASKS = ("mnist", "imdb", "minilm")
SIZES = {"mnist": (512, 2048), "imdb": (1024, 22_500), "minilm": (1024, 2048)}
"""Samples of the calibration and of the distillation."""
QUICK_SIZES = {"mnist": (256, 256), "imdb": (512, 512), "minilm": (512, 256)}
SETTINGS = {
    "mnist": Setting(hidden_epochs=1, output_epochs=2, lr=1e-3),
    "imdb": Setting(hidden_epochs=1, output_epochs=2, lr=1e-3),
    "minilm": Setting(hidden_epochs=1, output_epochs=2, lr=5e-4),
}
SENTENCES_IN_A_BATCH = 32


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conversion", description=__doc__)
    parser.add_argument("--tasks", default=",".join(TASKS), help="of " + ", ".join(TASKS))
    parser.add_argument("--mechanisms", default=",".join(MECHANISMS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--data", type=Path, default=os.environ.get("BETTER_ATTENTION_DATA"), help="with sts/ in it")
    parser.add_argument("--work", type=Path, default=Path("runs/conversion"), help="trained models and measurements")
    parser.add_argument("--out", type=Path, default=Path("results/conversion"))
    parser.add_argument("--quick", action="store_true", help="a few samples, to see that everything works")
    parser.add_argument("--gather", action="store_true", help="only write the results of what was measured")
    args = parser.parse_args()
    if args.data is None:
        parser.error("--data DIR is missing: where mnist/, imdb/ and sts/ are")
    if args.quick:
        args.work, args.out = args.work.with_name("conversion-quick"), args.work.with_name("conversion-quick") / "out"
    return args


def main() -> None:
    """Measure what is missing, seeds outermost, and write the results."""
    args = parse()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    commit()  # kept for the records: later commits do not change what runs
    seeds = [int(seed) for seed in args.seeds.split(",")]
    for seed in [] if args.gather else seeds:
        for task in args.tasks.split(","):
            for mechanism in args.mechanisms.split(","):
                for heads in lab_models.HEADS.get(task, (12,)):
                    measure(args, task, mechanism, heads, seed)
    found = records.read(args.work / "records")
    records.write(found, args.out)
    tables.write(found, args.out)


def measure(args: argparse.Namespace, task: str, mechanism: str, heads: int, seed: int) -> None:
    """One conversion, unless it was measured before."""
    folder = args.work / "records"
    name = f"{task}-{mechanism}-h{heads}-s{seed}"
    if (folder / f"{name}.json").exists():
        return
    subject = make_subject(args, task, heads, seed)
    setting = Setting(1, 1, 1e-3) if args.quick else SETTINGS[task]
    record = study(subject, mechanism, setting, original(subject, args.work))
    record.save(folder)
    print(name, *(f"{stage.stage} {stage.test:.2f}" for stage in record.stages), flush=True)


def make_subject(args: argparse.Namespace, task: str, heads: int, seed: int) -> Subject:
    """The trained model; the lab's are trained first where that was not done."""
    sizes = (QUICK_SIZES if args.quick else SIZES)[task]
    if task == "minilm":
        return minilm.subject(args.data, seed, sizes, SENTENCES_IN_A_BATCH, limit=100 if args.quick else None)
    if not (args.work / task / f"standard-h{heads}-s{seed}" / "result.json").exists():
        lab_models.train(task, 1 + max(map(int, args.seeds.split(","))), args.work, args.data, quick=args.quick)
    return lab_models.subject(task, heads, seed, args.work, args.data, sizes)


def original(subject: Subject, work: Path) -> Stage:
    """The model before its conversion: judged once for all mechanisms."""
    seed = 0 if subject.task == "minilm" else subject.seed  # there is one MiniLM
    return records.kept(
        work / "before" / f"{subject.task}-h{subject.heads}-s{seed}.json",
        lambda: judged(subject, subject.model, "before", 0.0),
    )


if __name__ == "__main__":
    main()
