"""``python -m vgglab.bench data ...`` and ``step ...``: how fast images come, and how fast training steps are."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Sequence

from vgglab.errors import UserError

SUBJECTS = ("data", "step")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 done, 2 bad input."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] not in SUBJECTS:
        print(f"usage: python -m vgglab.bench {{{','.join(SUBJECTS)}}} [--flag value ...]", file=sys.stderr)
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    try:
        importlib.import_module(f"vgglab.lab.bench.{argv[0]}").main(argv[1:])
    except UserError as error:
        print(f"vgglab.bench: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read it has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("vgglab.bench: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
