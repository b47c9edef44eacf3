"""The user's own pictures."""
