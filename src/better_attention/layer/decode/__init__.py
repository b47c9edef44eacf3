"""A layer's steps with a cache: the general way, what kernels read as it is stored, and a step as one call."""
