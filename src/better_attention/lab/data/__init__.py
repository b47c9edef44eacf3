"""Real data: read from the official files, fetched from their publishers, never made up."""
