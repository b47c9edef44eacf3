"""The papers' experiments: tasks, the training loop, run folders, tables and the report."""
