"""``better-attention bench``: what is measured (registry and suites), against whom, how, and how it is told.

registry.py     rows, contenders and runs as data; the shapes
kernel.py layer.py decode.py align.py   the suites: inputs, contenders, ground truth of each
baselines.py    the layers and kernels of others, keras_worker.py among them in a process of its own
machine.py      the machine in words, its limits, memory of a call
runner.py       correctness gate, then alternating runs
targets.py      what was promised, and whether it is met
tables.py       the screen, JSON and CSV
"""
