"""The trial of expressive attention's claim, per kind of positions."""
