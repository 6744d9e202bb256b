"""``python -m vgglab.report``."""

from vgglab.runs.report import main

if __name__ == "__main__":
    raise SystemExit(main())
