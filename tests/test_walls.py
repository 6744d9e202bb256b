"""Architecture rules: which modules may import or name what, and how large they may get."""

import ast
import inspect
import re
import sys
import tokenize
from pathlib import Path

import pytest
from conftest import PROJECT, shell

from vgglab.devices import KINDS

PACKAGE = PROJECT / "vgglab"
MODULES = sorted(PACKAGE.rglob("*.py"))
HARDWARE_NAMES = "|".join(sorted({"xla", *KINDS} - {"cpu"}))  # any computer has a CPU
HARDWARE = re.compile(rf"(?<![a-z])({HARDWARE_NAMES})(?![a-z])", re.IGNORECASE)


def module_name(file):
    parts = file.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file, only_at_import=False):
    tree = ast.parse(file.read_text())
    typing_only = {
        id(n)
        for b in ast.walk(tree)
        if isinstance(b, ast.If) and re.search("TYPE_CHECKING|__main__", ast.dump(b.test))
        for n in ast.walk(b)
    }
    found = set()
    for node in tree.body if only_at_import else ast.walk(tree):
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


def test_modules_are_found():
    assert {"vgglab.trainer", "vgglab.devices.native", "vgglab.view.live"} <= {module_name(file) for file in MODULES}


@pytest.mark.parametrize("file", [f for f in MODULES if "devices" not in f.parts], ids=module_name)
def test_hardware_is_named_only_in_devices(file):
    assert HARDWARE.findall(code_without_prose(file)) == []


def test_hardware_pattern_finds_names(tmp_path):
    (tmp_path / "bad.py").write_text(
        '"""About cuda."""\nif device.kind == "cuda":  # cuda\n    torch.xla.step(is_cuda, transfer_to_gcu)\n'
    )
    assert HARDWARE.findall(code_without_prose(tmp_path / "bad.py")) == ["cuda", "xla", "cuda", "gcu"]


@pytest.mark.parametrize("file", sorted((PACKAGE / "view").glob("*.py")), ids=module_name)
def test_views_import_neither_the_trainer_nor_torch(file):
    inside = {name for name in imports_of(file) if name.startswith("vgglab.")}
    allowed = ("vgglab.view", "vgglab.runs", "vgglab.storage", "vgglab.errors", "vgglab.settings")
    assert [name for name in inside if not name.startswith(allowed)] == []
    assert not [name for name in imports_of(file, only_at_import=True) if name.startswith("torch")]


def test_viewing_a_run_works_without_torch(train):
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
def test_core_does_not_import_plotting(name):
    assert not [m for m in imports_of(PACKAGE / f"{name}.py") if m.startswith(("vgglab.view", "matplotlib", "IPython"))]


def test_core_needs_only_torch_torchvision_and_standard_library():
    outside = set()
    for file in MODULES:
        # Views and commands may use more; the doubles are separate packages.
        if {"view", "commands"} & {*file.parts} or file.name == "__main__.py" or "doubles" in file.parts:
            continue
        outside |= {name.split(".")[0] for name in imports_of(file)} - set(sys.stdlib_module_names)
    # Pillow comes with torchvision; scikit-learn, simplejpeg and tqdm are imported only where they are used.
    assert outside <= {"vgglab", "torch", "torchvision", "PIL", "sklearn", "simplejpeg", "tqdm"}


def imports_in_functions(file):
    """Modules of this package that a module imports inside functions."""
    functions = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
    inside = [node for function in functions for node in ast.walk(function) if isinstance(node, ast.ImportFrom)]
    return {node.module for node in inside if node.module and node.module.startswith("vgglab")}


def test_imports_in_functions_are_for_entry_points_and_optional_modules():
    late = {module_name(file): imports_in_functions(file) for file in MODULES if "doubles" not in file.parts}
    entries = {name for name in late if name.startswith(("vgglab.__main__", "vgglab.train", "vgglab.commands"))}
    assert "vgglab.trainer" in late["vgglab.train"]
    assert {name: modules for name, modules in late.items() if modules and name not in entries} == {
        "vgglab.devices.gcu": {"vgglab.devices.gcu_eager", "vgglab.devices.gcu_lazy"},  # whichever is installed
        "vgglab.devices.sim": {"vgglab.devices.sim", "vgglab.devices.sim.card"},  # installs the simulated torch.gcu
        "vgglab.lab.machine_speed": {"vgglab.devices.compat", "vgglab.model"},  # torch may be missing
        "vgglab.view.display": {"vgglab.view.figures"},  # matplotlib may be missing
        "vgglab.view.live": {"vgglab.view.figures"},
    }


def test_device_has_few_methods():
    from vgglab.devices.base import Device

    methods = [name for name, value in vars(Device).items() if inspect.isfunction(value)]
    assert len([name for name in methods if not name.startswith("_")]) <= 23


def test_files_stay_small():
    lengths = {module_name(file): len(file.read_text().splitlines()) for file in MODULES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_package_parses_with_python_3_8():
    for file in MODULES:
        ast.parse(file.read_text(), feature_version=(3, 8))


def test_no_file_names_a_package_registry():
    tracked = shell("git", "ls-files").stdout.split()
    assert tracked
    hosts = re.compile(r"(pypi|pythonhosted|deb\.debian|registry\.npmjs|download\.pytorch)\.org")
    files = [Path(PROJECT, name) for name in tracked if Path(PROJECT, name).suffix != ".png"]
    assert [
        f.name for f in files if f.is_file() and f.name != Path(__file__).name and hosts.search(f.read_text())
    ] == []


def test_vendors_migration_helper_is_not_imported():
    """It changes torch.cuda, torch.jit.script and the warning filters for the whole process."""
    files = [file for file in MODULES if "doubles" not in file.parts]
    assert [module_name(file) for file in files if "transfer_to_gcu" in code_without_prose(file)] == []


def test_html_is_escaped_in_one_module():
    assert [module_name(file) for file in MODULES if "html.escape" in file.read_text()] == ["vgglab.view.tables"]


def test_no_module_is_ignored_by_git():
    """Files that git ignores are missing from the wheel; an installation once lacked vgglab/runs."""
    ignored = shell("git", "check-ignore", "--no-index", *(str(file.relative_to(PROJECT)) for file in MODULES))
    assert ignored.stdout == ""


def lines_of_code(file):
    """Number of lines without blank lines, comments and docstrings."""
    docstrings = {
        line
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    ignored = {getattr(tokenize, name) for name in "COMMENT NL NEWLINE INDENT DEDENT ENCODING ENDMARKER".split()}
    with file.open("rb") as source:
        tokens = [token for token in tokenize.tokenize(source.readline) if token.type not in ignored]
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - docstrings)


def test_training_code_is_small_and_listed():
    """All modules that the trainer imports, except devices, and the settings: ten files, listed in CONTRIBUTING.md."""
    files = {module_name(file): file for file in MODULES}
    found, to_do = {"vgglab.settings.config", "vgglab.settings.flags"}, ["vgglab.trainer"]
    while to_do:
        name = to_do.pop()
        if name in files and name not in found and not name.startswith("vgglab.devices") and files[name].stem[0] != "_":
            found.add(name)
            to_do += imports_of(files[name])
    rows = re.findall(r"^\| `(vgglab/[\w/]+\.py)` \| (\d+) \|", (PROJECT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    listed = {name: int(lines) for name, lines in rows}
    counted = {str(files[name].relative_to(PROJECT)): lines_of_code(files[name]) for name in found}
    assert listed.keys() == counted.keys()
    assert {name: lines for name, lines in counted.items() if abs(lines - listed[name]) > 10} == {}
    assert len(counted) <= 10
    assert sum(counted.values()) <= 1300
