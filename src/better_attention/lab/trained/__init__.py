"""Trained models on disk (runs, converted models, models of transformers): opened, converted, distilled, exported."""
