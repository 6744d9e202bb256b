"""How ranks are started: by vgglab (``spawn``), Slurm (``slurm``) or torchrun, which needs no code here."""
