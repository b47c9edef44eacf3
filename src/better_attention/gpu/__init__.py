"""Kernels for GPUs, written in Triton: what is there, how a call becomes launches, and the kernels themselves.

Nothing here imports Triton when the package is imported: :mod:`.toolchain` says whether it is there, and
:mod:`.launches` imports ``kernels/`` when the first call needs it.
"""
