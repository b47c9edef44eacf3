"""The small models in which the experiments compare attention mechanisms."""
