"""The compiled CPU kernels: their C++ (``cpp/``), the shared library, and W_A computed by them."""
