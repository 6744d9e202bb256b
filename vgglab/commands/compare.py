"""``python -m vgglab.compare``."""

import sys

from vgglab.runs.compare import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
