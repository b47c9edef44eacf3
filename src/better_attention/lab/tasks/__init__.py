"""What is trained: tasks by kind, and the catalogue of those that the command knows."""
