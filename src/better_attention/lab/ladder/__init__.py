"""The recurrence ladder."""
