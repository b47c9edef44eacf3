"""Statistics over finished runs, and what they amount to in words."""
