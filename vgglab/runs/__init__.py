"""The run directory: written by training, read by everything else."""
