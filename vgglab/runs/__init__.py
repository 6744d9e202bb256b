"""The run directory: written by a training, read by everything else."""
