"""The inside of one model on a few samples: what its heads look at, as one page."""
