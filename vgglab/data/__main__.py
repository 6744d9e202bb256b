"""``python -m vgglab.data``, as it was called before there was ``vgglab data``."""

import sys

from vgglab.commands import call

if __name__ == "__main__":
    sys.exit(call("data"))
