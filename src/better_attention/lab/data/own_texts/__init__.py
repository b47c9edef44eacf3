"""The user's own labelled texts."""
