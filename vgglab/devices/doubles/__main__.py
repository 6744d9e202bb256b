"""``python -m vgglab.devices.doubles lazy|eager``: print the folder for ``PYTHONPATH``."""

import sys

from vgglab.devices.doubles import EAGER, LAZY

folders = {"lazy": LAZY, "eager": EAGER}
if len(sys.argv) != 2 or sys.argv[1] not in folders:
    print("usage: python -m vgglab.devices.doubles lazy|eager", file=sys.stderr)
    sys.exit(2)
print(folders[sys.argv[1]])
