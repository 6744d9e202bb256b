"""``python -m vgglab.plan``."""

import sys

from vgglab.lab.plan import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
