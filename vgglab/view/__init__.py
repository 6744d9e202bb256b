"""Everything that is displayed. Views read run directories; importing them loads neither the
trainer nor torch.

``terminal`` and ``scalars`` can also be listeners of a ``RunWriter``, which passes them each event it writes.
"""
