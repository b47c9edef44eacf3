"""The GPU kernels, checked and timed in one command, and what they use of a GPU that need not be there.

``python -m benchmarks.gpu`` needs a GPU; ``python -m benchmarks.gpu.resources`` compiles every kernel for an H100
anywhere, and reads registers, spills, shared memory and instructions from the result.
"""
