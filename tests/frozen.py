"""Imported last by the server of ``processes``: exclude what it has imported from garbage collection.

Otherwise each collection in a child, and each run ends with one, would search all objects of torch and copy their
memory pages, which takes a third of a short run.
"""

import gc

gc.collect()
gc.freeze()
