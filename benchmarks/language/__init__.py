"""The studies of language models: what ``better-attention compare text-lm`` does not measure itself.

``results/text-lm-shakespeare/README.md`` says what is asked, and holds the tables that ``tables.py`` writes.
"""
