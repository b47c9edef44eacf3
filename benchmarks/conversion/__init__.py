"""What conversion costs on trained models: the measurements behind ``results/conversion``."""
