"""``better-attention bench``: what is measured, against whom, how, and how it is reported.

registry.py     rows, contenders, runs and suites as data; the shapes of the papers
suites/         one suite per file: inputs, contenders and ground truth of its rows
contenders.py   the layers and kernels of others, keras_worker.py among them in a process of its own
machine.py      the machine in words, its limits, memory of a call
runner.py       one row: the correctness gate, then alternating runs
session.py      all rows, each in the files once it is measured, continued where an earlier run stopped
targets.py      what was promised, and whether it is met
report.py       a run as data, in JSON and CSV; terminal.py prints it
edge/           table 4 of the paper: the models of its experiments on this CPU
"""
