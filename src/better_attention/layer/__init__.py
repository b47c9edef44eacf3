"""The layer that replaces ``torch.nn.MultiheadAttention``, one file for each of its parts."""
