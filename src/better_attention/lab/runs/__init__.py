"""Run folders: one trained model each."""
