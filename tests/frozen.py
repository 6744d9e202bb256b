"""Imported last by the server of ``processes``: what it has imported is not cleaned up in each of its children.

Otherwise each collection of garbage in a child, and each run ends with one, would search all objects of torch and copy
their memory pages, and at its exit each child would remove torch's operators one by one: half of a short run.
"""

import atexit
import gc
import os
import weakref

SERVER = os.getpid()


@atexit.register
def exit_without_cleanup():
    """End the server, but not its children, before triton reports the objects that exist at its exit as leaks."""
    if os.getpid() == SERVER:
        os._exit(0)


gc.collect()
gc.freeze()
for finalizer in list(weakref.finalize._registry):
    finalizer.atexit = False
