"""What may know of what: the rules that keep the house small, watched."""

import ast
import re
import sys
import tokenize
from pathlib import Path

import pytest
from conftest import PROJECT, shell

from vgglab.devices import KINDS

PACKAGE = PROJECT / "vgglab"
MODULES = sorted(PACKAGE.rglob("*.py"))
WORDS = "|".join(sorted({"xla", *KINDS} - {"cpu"}))  # any computer has one
HARDWARE = re.compile(rf"(?<![a-z])({WORDS})(?![a-z])", re.IGNORECASE)


def name_of(file):
    parts = file.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_by(file, only_at_start=False):
    tree = ast.parse(file.read_text())
    typing_only = {
        id(n)
        for b in ast.walk(tree)
        if isinstance(b, ast.If) and re.search("TYPE_CHECKING|__main__", ast.dump(b.test))
        for n in ast.walk(b)
    }
    found = set()
    for node in tree.body if only_at_start else ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def code_without_prose(file):
    """The source with docstrings, comments and help texts blanked out."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value = ""
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("flag", "switch"):
            node.args = node.args[1:]
    return ast.unparse(tree)


def test_the_package_is_where_the_tests_look():
    assert {"vgglab.trainer", "vgglab.devices.native", "vgglab.view.live"} <= {name_of(file) for file in MODULES}


@pytest.mark.parametrize("file", [f for f in MODULES if "devices" not in f.parts], ids=name_of)
def test_no_hardware_is_named_outside_devices(file):
    assert HARDWARE.findall(code_without_prose(file)) == []


def test_the_guard_would_see_a_name(tmp_path):
    (tmp_path / "bad.py").write_text(
        '"""About cuda."""\nif device.kind == "cuda":  # cuda\n    torch.xla.step(is_cuda, transfer_to_gcu)\n'
    )
    assert HARDWARE.findall(code_without_prose(tmp_path / "bad.py")) == ["cuda", "xla", "cuda", "gcu"]


@pytest.mark.parametrize("file", sorted((PACKAGE / "view").glob("*.py")), ids=name_of)
def test_views_know_neither_the_trainer_nor_torch(file):
    inside = {name for name in imported_by(file) if name.startswith("vgglab.")}
    allowed = ("vgglab.view", "vgglab.runs", "vgglab.storage", "vgglab.errors", "vgglab.settings")
    assert [name for name in inside if not name.startswith(allowed)] == []
    assert not [name for name in imported_by(file, only_at_start=True) if name.startswith("torch")]


def test_looking_at_a_run_works_without_torch(train):
    run = train("--print-freq=1").run
    code = (
        "import sys; sys.modules['torch'] = sys.modules['torchvision'] = None\n"
        "import vgglab; run = vgglab.Run(sys.argv[1])\n"
        "from vgglab.view.figures import curves; from vgglab.view.live import summary, progress_of\n"
        "print(summary(run, progress_of(run)), len(curves(run).png()) > 1000, run.report()['acc1'])\n"
    )
    result = shell("python", "-c", code, run.path)
    assert result.returncode == 0, result.stderr
    assert "done" in result.stdout
    assert " True " in result.stdout


@pytest.mark.parametrize(
    "name", ["trainer", "model", "runs/checkpoint", "settings/schedule", "settings/config", "runs/report"]
)
def test_the_core_draws_no_pictures(name):
    assert not [
        m for m in imported_by(PACKAGE / f"{name}.py") if m.startswith(("vgglab.view", "matplotlib", "IPython"))
    ]


def test_the_core_stays_on_torch_torchvision_and_the_standard_library():
    outside = set()
    for file in MODULES:
        # What people look at may use more; so may what executes notebooks, and what only IPython ever imports. The
        # doubles are packages of their own.
        if {"view", "commands"} & {*file.parts} or file.name == "__main__.py" or "doubles" in file.parts:
            continue
        outside |= {name.split(".")[0] for name in imported_by(file)} - set(sys.stdlib_module_names)
    # Pillow comes with torchvision; scikit-learn, simplejpeg and tqdm are asked for where they are used.
    assert outside <= {"vgglab", "torch", "torchvision", "PIL", "sklearn", "simplejpeg", "tqdm"}


def imported_in_functions(file):
    """Names from this package that a module imports only when a function runs."""
    functions = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
    inside = [node for function in functions for node in ast.walk(function) if isinstance(node, ast.ImportFrom)]
    return {node.module for node in inside if node.module and node.module.startswith("vgglab")}


def test_imports_inside_functions_are_for_entry_points_and_what_may_be_missing():
    late = {name_of(file): imported_in_functions(file) for file in MODULES if "doubles" not in file.parts}
    entries = {name for name in late if name.startswith(("vgglab.__main__", "vgglab.train", "vgglab.commands"))}
    assert "vgglab.trainer" in late["vgglab.train"]
    assert {name: modules for name, modules in late.items() if modules and name not in entries} == {
        "vgglab.devices.gcu": {"vgglab.devices.gcu_eager", "vgglab.devices.gcu_lazy"},  # the one that is installed
        "vgglab.devices.sim": {"vgglab.devices.sim", "vgglab.devices.sim.card"},  # puts torch.gcu in its place
        "vgglab.lab.machine_speed": {"vgglab.devices.compat", "vgglab.model"},  # torch may be missing
        "vgglab.view.display": {"vgglab.view.figures"},  # matplotlib may be missing
        "vgglab.view.live": {"vgglab.view.figures"},
    }


def test_devices_have_about_ten_verbs():
    from vgglab.devices.base import Device

    assert len(Device.__abstractmethods__) <= 15


def test_files_stay_small():
    lengths = {name_of(file): len(file.read_text().splitlines()) for file in MODULES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_the_core_is_written_in_python_3_8():
    for file in MODULES:
        ast.parse(file.read_text(), feature_version=(3, 8))


def test_nobody_names_a_registry():
    tracked = shell("git", "ls-files").stdout.split()
    assert tracked
    hosts = re.compile(r"(pypi|pythonhosted|deb\.debian|registry\.npmjs|download\.pytorch)\.org")
    files = [Path(PROJECT, name) for name in tracked if Path(PROJECT, name).suffix != ".png"]
    assert [
        f.name for f in files if f.is_file() and f.name != Path(__file__).name and hosts.search(f.read_text())
    ] == []


def test_nobody_imports_what_rewrites_torch():
    """The vendor's migration helper changes torch.cuda, torch.jit.script and the warning filters for everybody."""
    ours = [file for file in MODULES if "doubles" not in file.parts]
    assert [name_of(file) for file in ours if "transfer_to_gcu" in code_without_prose(file)] == []


def test_text_becomes_html_in_one_place():
    assert [name_of(file) for file in MODULES if "html.escape" in file.read_text()] == ["vgglab.view.tables"]


def test_no_module_is_ignored_by_git():
    """A wheel leaves out what git ignores: an installation once had no vgglab/runs."""
    ignored = shell("git", "check-ignore", "--no-index", *(str(file.relative_to(PROJECT)) for file in MODULES))
    assert ignored.stdout == ""


def lines_of_code(file):
    """Without blank lines, comments and docstrings."""
    docstrings = {
        line
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    nothing = {getattr(tokenize, name) for name in "COMMENT NL NEWLINE INDENT DEDENT ENCODING ENDMARKER".split()}
    with file.open("rb") as source:
        tokens = [token for token in tokenize.tokenize(source.readline) if token.type not in nothing]
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - docstrings)


def test_the_training_is_read_in_an_evening():
    """All that the trainer imports, devices left out, and the settings: ten files, listed for the reader."""
    files = {name_of(file): file for file in MODULES}
    path, to_do = {"vgglab.settings.config"}, ["vgglab.trainer"]
    while to_do:
        name = to_do.pop()
        if name in files and name not in path and not name.startswith("vgglab.devices") and files[name].stem[0] != "_":
            path.add(name)
            to_do += imported_by(files[name])
    rows = re.findall(r"^\| `(vgglab/[\w/]+\.py)` \| (\d+) \|", (PROJECT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    listed = {name: int(lines) for name, lines in rows}
    counted = {str(files[name].relative_to(PROJECT)): lines_of_code(files[name]) for name in path}
    assert listed.keys() == counted.keys()
    assert {name: lines for name, lines in counted.items() if abs(lines - listed[name]) > 10} == {}
    assert len(counted) <= 10
    assert sum(counted.values()) <= 1300
