"""Write docs/api.md from the docstrings of the public names: ``python tests/api_page.py``.

The package is read, not imported (griffe); ``tests/test_public.py`` sees whether the page is up to date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import griffe

PROJECT = Path(__file__).resolve().parent.parent
PAGE = PROJECT / "docs" / "api.md"
OPENING = """# The API · 公开接口

The names that notebooks and scripts import from `vgglab`; `import vgglab as vl` is enough. Anything else is
internal and may change. This page is made from the docstrings by `python tests/api_page.py`.

本页列出 notebook 和脚本可以从 `vgglab` 导入的名称，由 `python tests/api_page.py` 根据 docstring 生成。
"""


def page() -> str:
    package = griffe.load("vgglab", search_paths=[str(PROJECT)])
    names = _public_names()
    contents = ", ".join(f"[`{name}`](#{name.lower()})" for name in names)
    sections = [f"## {name}\n\n{_described(_found(package, place), name)}" for name, place in names.items()]
    return "\n".join([OPENING, f"{contents}\n", *sections])


LAZY = re.compile(
    r'^    "(\w+)": "([\w.:]+)",$', re.MULTILINE
)  # as __init__ files list names that are loaded when used


def _public_names() -> dict[str, str]:
    """Each public name, and where it is defined, as ``module:name`` or as a module."""
    source = (PROJECT / "vgglab" / "__init__.py").read_text(encoding="utf-8")
    places = dict(LAZY.findall(source))
    for module, imported in re.findall(r"^from (vgglab[\w.]*) import (.+?)(?:  #.*)?$", source, re.MULTILINE):
        for item in imported.split(", "):
            name, _, public = item.partition(" as ")
            if not name.startswith("_"):
                places[public or name] = f"{module}:{name}"
    return dict(sorted(places.items(), key=lambda item: item[0].lower()))


def _found(package: griffe.Module, place: str) -> griffe.Object:
    path = place.replace(":", ".").partition(".")[2]
    found = package[path]
    return found.final_target if found.is_alias else found


def _described(thing: griffe.Object, name: str) -> str:
    if thing.is_module:
        parts = [_text(thing)]
        lazy = LAZY.findall(thing.filepath.read_text(encoding="utf-8"))
        exported = [_found(thing.package, f"{thing.path}.{module}:{name}") for name, module in lazy] or _members_of(
            thing
        )
        for member in exported:
            parts.append(f"- `{_signature(member, f'{name}.{member.name}')}`: {_summary(member)}".rstrip(": ") + "\n")
        return "\n".join(parts)
    parts = [f"```python\n{_signature(thing, name)}\n```\n", _text(thing)]
    if thing.is_class:
        parts.append("")
        inherited = [member for name, member in thing.inherited_members.items() if name not in thing.members]
        for member in [*thing.members.values(), *(member.final_target for member in inherited)]:
            if member.is_alias or member.name.startswith("_") or not member.docstring:
                continue
            what = _signature(member, member.name) if member.is_function else member.name
            parts.append(f"- `.{what}`: {_summary(member)}\n")
    return "\n".join(parts)


def _members_of(module: griffe.Object) -> list[griffe.Object]:
    """Public functions and classes that a module defines or, as a package, passes on."""
    found = []
    for member in module.members.values():
        if member.name.startswith("_"):
            continue
        if member.is_alias:
            if not (module.is_package or module.is_subpackage) or "vgglab" not in member.target_path:
                continue
            try:
                member = member.final_target
            except griffe.AliasResolutionError:  # one of several names that are assigned at once
                continue
        if member.docstring and (member.is_function or member.is_class):
            found.append(member)
    return found


def _signature(thing: griffe.Object, name: str) -> str:
    function = thing.all_members.get("__init__") if thing.is_class else thing
    function = function.final_target if function is not None and function.is_alias else function
    if function is None or not function.is_function:  # a constant, or a named tuple
        return name
    shown = []
    for parameter in function.parameters:
        if parameter.name == "self":
            continue
        star = {"variadic positional": "*", "variadic keyword": "**"}.get(
            str(parameter.kind and parameter.kind.value), ""
        )
        default = "" if star or parameter.default is None else f"={parameter.default}".replace("'", '"')
        shown.append(f"{star}{parameter.name}{default}")
    return f"{name}({', '.join(shown)})"


def _text(thing: griffe.Object) -> str:
    """The docstring; its sections as lists, code with one backtick, as Markdown has it."""
    if not thing.docstring:
        return ""
    lines = []
    for line in thing.docstring.value.splitlines():
        section = re.fullmatch(r"(Args|Returns|Raises|Attributes):", line)
        item = re.fullmatch(r" {4}(\S[^:]*): (.*)", line)
        if section:
            lines += ["", f"*{section.group(1)}*", ""]
        elif item and lines and not line.startswith(" " * 5):
            lines.append(f"- `{item.group(1).strip('`')}`: {item.group(2)}")
        else:
            lines.append(line)
    return re.sub(r"``([^`]+)``", r"`\1`", "\n".join(lines)).strip() + "\n"


def _summary(thing: griffe.Object) -> str:
    first = " ".join(thing.docstring.value.split("\n\n")[0].split()) if thing.docstring else ""
    return re.sub(r"``([^`]+)``", r"`\1`", first)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.exit(0)
