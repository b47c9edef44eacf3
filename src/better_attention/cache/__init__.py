"""What a decoder remembers of the tokens before: caches of keys and values."""
