"""Who starts the ranks of a job: this kit (``spawn``), Slurm (``slurm``), or torchrun, which needs nothing here."""
