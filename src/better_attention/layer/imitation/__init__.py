"""What of torch's own layer is more than arithmetic: its attributes, initial draws, state dicts and nested input."""
