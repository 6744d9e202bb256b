"""Write docs/api.md from the docstrings of the public names: ``python tests/api_page.py``.

griffe parses the package without importing it; ``tests/test_public.py`` checks that the page is up to date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import griffe

PROJECT = Path(__file__).resolve().parent.parent
PAGE = PROJECT / "docs" / "api.md"
HEADER = """# The API · 公开接口

These names are the public API; `import vgglab as vl` gives access to all of them. Everything else is internal and may
change. This page is generated from the docstrings by `python tests/api_page.py`.

本页列出 notebook 和脚本可以从 `vgglab` 导入的名称，由 `python tests/api_page.py` 根据 docstring 生成。
"""


def render_page() -> str:
    package = griffe.load("vgglab", search_paths=[str(PROJECT)])
    names = _public_names()
    contents = ", ".join(f"[`{name}`](#{name.lower()})" for name in names)
    sections = [f"## {name}\n\n{_describe(_resolve(package, location), name)}" for name, location in names.items()]
    return "\n".join([HEADER, f"{contents}\n", *sections])


# An entry in the table of lazily loaded names of an __init__ file.
LAZY = re.compile(r'^    "(\w+)": "([\w.:]+)",$', re.MULTILINE)


def _public_names() -> dict[str, str]:
    """Each public name, and where it is defined, as ``module:name`` or as a module."""
    source = (PROJECT / "vgglab" / "__init__.py").read_text(encoding="utf-8")
    locations = dict(LAZY.findall(source))
    for module, imported in re.findall(r"^from (vgglab[\w.]*) import (.+?)(?:  #.*)?$", source, re.MULTILINE):
        for item in imported.split(", "):
            name, _, public = item.partition(" as ")
            if not name.startswith("_"):
                locations[public or name] = f"{module}:{name}"
    return dict(sorted(locations.items(), key=lambda item: item[0].lower()))


def _resolve(package: griffe.Module, location: str) -> griffe.Object:
    path = location.replace(":", ".").partition(".")[2]
    found = package[path]
    return found.final_target if found.is_alias else found


def _describe(obj: griffe.Object, name: str) -> str:
    if obj.is_module:
        parts = [_text(obj)]
        lazy = LAZY.findall(obj.filepath.read_text(encoding="utf-8"))
        exported = [_resolve(obj.package, f"{obj.path}.{module}:{name}") for name, module in lazy] or _public_members(
            obj
        )
        for member in exported:
            parts.append(f"- `{_signature(member, f'{name}.{member.name}')}`: {_summary(member)}".rstrip(": ") + "\n")
        return "\n".join(parts)
    parts = [f"```python\n{_signature(obj, name)}\n```\n", _text(obj)]
    if obj.is_class:
        parts.append("")
        inherited = [member for name, member in obj.inherited_members.items() if name not in obj.members]
        for member in [*obj.members.values(), *(member.final_target for member in inherited)]:
            if member.is_alias or member.name.startswith("_") or not member.docstring:
                continue
            label = _signature(member, member.name) if member.is_function else member.name
            parts.append(f"- `.{label}`: {_summary(member)}\n")
    return "\n".join(parts)


def _public_members(module: griffe.Object) -> list[griffe.Object]:
    """Public functions and classes that a module defines or, if it is a package, re-exports."""
    found = []
    for member in module.members.values():
        if member.name.startswith("_"):
            continue
        if member.is_alias:
            if not (module.is_package or module.is_subpackage) or "vgglab" not in member.target_path:
                continue
            try:
                member = member.final_target
            except griffe.AliasResolutionError:  # a name assigned by tuple unpacking
                continue
        if member.docstring and (member.is_function or member.is_class):
            found.append(member)
    return found


def _signature(obj: griffe.Object, name: str) -> str:
    function = obj.all_members.get("__init__") if obj.is_class else obj
    function = function.final_target if function is not None and function.is_alias else function
    if function is None or not function.is_function:  # a constant, or a named tuple
        return name
    parameters = []
    for parameter in function.parameters:
        if parameter.name == "self":
            continue
        star = {"variadic positional": "*", "variadic keyword": "**"}.get(
            str(parameter.kind and parameter.kind.value), ""
        )
        default = "" if star or parameter.default is None else f"={parameter.default}".replace("'", '"')
        parameters.append(f"{star}{parameter.name}{default}")
    return f"{name}({', '.join(parameters)})"


def _text(obj: griffe.Object) -> str:
    """The docstring as Markdown: its sections as lists, code in single backticks."""
    if not obj.docstring:
        return ""
    lines = []
    for line in obj.docstring.value.splitlines():
        section = re.fullmatch(r"(Args|Returns|Raises|Attributes):", line)
        item = re.fullmatch(r" {4}(\S[^:]*): (.*)", line)
        if section:
            lines += ["", f"*{section.group(1)}*", ""]
        elif item and lines and not line.startswith(" " * 5):
            lines.append(f"- `{item.group(1).strip('`')}`: {item.group(2)}")
        else:
            lines.append(line)
    return re.sub(r"``([^`]+)``", r"`\1`", "\n".join(lines)).strip() + "\n"


def _summary(obj: griffe.Object) -> str:
    first = " ".join(obj.docstring.value.split("\n\n")[0].split()) if obj.docstring else ""
    return re.sub(r"``([^`]+)``", r"`\1`", first)


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")
    sys.exit(0)
