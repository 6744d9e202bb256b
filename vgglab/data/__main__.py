"""``python -m vgglab.data``, the older form of ``vgglab data``."""

import sys

from vgglab.commands import call

if __name__ == "__main__":
    sys.exit(call("data"))
