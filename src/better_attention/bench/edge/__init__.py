"""Table 4 of arXiv 2403.01643, the experiments' models timed on this CPU; and trained models against each other."""
