"""What the mechanisms cost on many GPUs, on paper: time, memory and network, written to docs/scale.md.

python -m benchmarks.scale              write the tables between the marks of docs/scale.md
python -m benchmarks.scale --measure    first measure sequence parallel attention over gloo, 2 and 4 processes
"""
