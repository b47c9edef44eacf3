"""The tables and figures of the papers beside our own."""
