"""The public names of ``import vgglab as vl``; the notebooks use no others."""

import inspect
import json
import re
import subprocess
import sys

import pytest
from api_page import PAGE, render_page
from processes import PROJECT

import vgglab

NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
INTERNAL = re.compile(r"from vgglab|import vgglab(?! as vl\b)|(?<!`)\bvgglab\.\w+\(")
PUBLIC_ACCESS = re.compile(r"\bvl\.(\w+)(?:\.(\w+))?")


def test_number_of_public_names_is_limited():
    assert len(vgglab.__all__) <= 30
    assert dir(vgglab) == sorted(vgglab.__all__)


@pytest.mark.parametrize("name", sorted({*vgglab.__all__} - {"__version__"}))
def test_public_name_exists_and_has_a_docstring(name):
    assert name in dir(vgglab)
    assert inspect.getdoc(getattr(vgglab, name))


def test_api_page_is_complete_and_up_to_date():
    text = PAGE.read_text(encoding="utf-8")
    assert text == render_page(), "regenerate it: python tests/api_page.py"
    assert set(re.findall(r"^## (\w+)$", text, re.MULTILINE)) == {*vgglab.__all__} - {"__version__"}


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem[:2])
def test_notebook_uses_only_public_names(file):
    for cell in json.loads(file.read_text())["cells"]:
        text = "".join(cell["source"])
        assert not INTERNAL.search(text), text
        for name, inner in PUBLIC_ACCESS.findall(text) if cell["cell_type"] == "code" else ():
            assert name in vgglab.__all__, text
            found = getattr(vgglab, name)
            if inspect.ismodule(found) and inner:
                assert hasattr(found, inner), text
                assert inner in getattr(found, "__all__", [inner]), text


def test_unknown_name_raises_attribute_error():
    for module in (vgglab, vgglab.data):
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = module.nothing


def test_names_do_not_depend_on_import_order():
    code = (
        "import vgglab.plan, vgglab.compare, vgglab.anatomy, vgglab.data, vgglab.doctor, vgglab.launch\n"
        "import vgglab as vl\n"
        "print(*(callable(getattr(vl, n)) for n in ('plan_training', 'compare_runs', 'launch')), vl.anatomy.__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert result.stdout.split() == ["True", "True", "True", "vgglab.lab.anatomy"]
