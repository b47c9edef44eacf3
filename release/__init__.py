"""The files of a release: how they are built, checked and described. See ``docs/wheels.md``."""
