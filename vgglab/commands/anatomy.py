"""``python -m vgglab.anatomy``."""

import sys

from vgglab.lab.anatomy import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
