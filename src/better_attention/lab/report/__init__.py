"""Tables, figures and pages of finished comparisons."""
