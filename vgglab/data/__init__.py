"""Images and labels: from a name or a folder to batches.

``sets.py`` finds the images, ``digits.py`` writes the bundled set, ``loader.py`` makes batches of them.
"""
