"""Imported last by the server of ``processes``: what it has imported is not cleaned up in each of its children.

Otherwise each collection of garbage in a child, and each run ends with one, would search all objects of torch and copy
their memory pages, and at its exit each child would remove torch's operators one by one: half of a short run.
"""

import atexit
import gc
import weakref

gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)  # otherwise triton would report the frozen objects as leaks
for finalizer in list(weakref.finalize._registry):
    finalizer.atexit = False
