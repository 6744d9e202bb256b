"""List every string that a user may see, for proofreading: ``python tests/user_strings.py``.

Messages, help texts, headings, figure labels, and docstrings of public names, without the contract doubles and the
simulated card. Each line: file, line, text.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Iterator

PACKAGE = Path(__file__).resolve().parent.parent / "vgglab"
EXCLUDED = {"doubles", "sim"}
MIN_WORDS = 2  # a single word is a key or a name


def strings_in(file: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each string of a module; placeholders as in the source."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    private = {id(node.body[0].value) for node in ast.walk(tree) if _has_docstring(node) and not _is_public(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts | private:
            text = node.value
        else:
            continue
        if len(text.split()) >= MIN_WORDS and any(character.isalpha() for character in text):
            yield node.lineno, " ".join(text.split())


def _has_docstring(node: ast.AST) -> bool:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return isinstance(node, kinds) and ast.get_docstring(node) is not None


def _is_public(node: ast.AST) -> bool:
    return not getattr(node, "name", "").startswith("_")


def main() -> int:
    for file in sorted(PACKAGE.rglob("*.py")):
        if not EXCLUDED & {*file.parts}:
            for line, text in strings_in(file):
                print(f"{file.relative_to(PACKAGE.parent)}:{line}: {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
