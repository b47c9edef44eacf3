"""Other people's models: what their attention computes, in neutral terms, and how ours takes its place."""
