"""Comparisons: every mechanism, head count and seed of a task, trained alike."""
