"""Recurrence: x_t = (x_{t-1} + x_{t-τ}) mod N, every next symbol to be predicted; our own task, to test a claim.

arXiv 2407.18601 claims for expressive attention a lead on autoregressive prediction that grows with difficulty; its own
tasks are not published. `better-attention ladder` climbs this one over many N and τ; `--set delay=8` sets them here.
"""

from __future__ import annotations

from dataclasses import replace

from better_attention.lab.tasks.recurrence import RecurrenceTask


def recurrence(scale: str = "small") -> RecurrenceTask:
    """The task at a scale; "paper", though no paper has it, is harder and has more seeds and updates than "small".

    An epoch is 50 updates, so that the updates to 99 % are known to within 50; it is always the same 6,400 sequences.
    The learning rate is constant: what a run has learned after n updates does not depend on the limit.
    """
    small = RecurrenceTask(
        name="recurrence",
        title="delayed recurrences x_t = (x_{t-1} + x_{t-τ}) mod N",
        source="our own definition, not a paper's; for the claims of arXiv 2407.18601",
        scale="small",
        dataset="recurrence",
        modulus=4,
        delay=4,
        steps=16,
        width=32,
        length=1,  # follows from delay, steps and rules
        layers=1,
        heads=(1, 2, 4),
        default_heads=2,
        seeds=3,
        epochs=40,
        patience=0,
        batch_size=128,
        optimiser="adamw",
        lr=3e-3,
        dropout=0.0,
        train_samples=6_400,
        test_samples=512,
        threads=1,
    )
    variants = {
        "smoke": replace(small, scale="smoke", seeds=1, epochs=6),
        "small": small,
        "paper": replace(small, scale="paper", seeds=5, modulus=16, delay=8, epochs=200, layers=2),
    }
    return variants[scale]
