"""From anybody's arguments to one validated call."""
