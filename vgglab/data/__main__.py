"""``python -m vgglab.data check PATH``."""

from __future__ import annotations

import sys
from typing import Sequence

from vgglab.errors import UserError


def main(argv: Sequence[str]) -> int:
    """The exit code: 0 all can be read, 1 some images cannot, 2 bad input."""
    if not argv or argv[0] != "check":
        print("usage: python -m vgglab.data check PATH [--flag value ...]", file=sys.stderr)
        return 0 if list(argv[:1]) in (["-h"], ["--help"]) else 2
    try:
        from vgglab.data import check

        return check.main(argv[1:])
    except UserError as error:
        print(f"vgglab.data: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vgglab.data: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
