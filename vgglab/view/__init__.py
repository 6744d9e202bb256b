"""Everything that is displayed. Views read run directories; they import neither the trainer nor torch.

``terminal`` and ``scalars`` can also be listeners of a ``RunWriter``, which passes them each event it writes.
"""
