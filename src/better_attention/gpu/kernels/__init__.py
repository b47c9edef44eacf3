"""The kernels. These modules import Triton, so that only :mod:`better_attention.gpu.launches` imports them, and late.

Letters as everywhere: B batch, N query heads, G heads of keys, L queries, S keys, H width of q and k, W width of v.
``X_P`` is a width rounded up to a power of two, and BM, BN are the queries and keys of one tile. Sums are kept in
float32.
"""
