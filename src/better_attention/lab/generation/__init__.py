"""Text from a trained language model: which token comes next, step by step with a cache, and what is shown of it."""
