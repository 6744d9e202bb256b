"""Starting the ranks of a job: built in (``spawn``), Slurm (``slurm``), or torchrun, which needs no code here."""
