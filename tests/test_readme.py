"""Commands, files, links and names in the documentation are valid."""

import importlib
import os
import re
import shlex
import shutil
from dataclasses import fields

import pytest
from conftest import PROJECT, TINY, shell

from vgglab import train
from vgglab.__main__ import NAMES
from vgglab.commands import plan as plan_command
from vgglab.devices import KINDS
from vgglab.settings.choices import DATA_SETS, DECODERS
from vgglab.settings.config import Request
from vgglab.settings.parser import parse_flags
from vgglab.settings.recipes import RECIPES
from vgglab.storage.schema import DOCUMENTS

README = (PROJECT / "README.md").read_text()
PAGES = [PROJECT / "README.md", *sorted(file for file in (PROJECT / "docs").glob("*.md") if "zh-CN" not in file.name)]
TRAINING = (PROJECT / "docs" / "training.md").read_text()


def training_flags(text):
    """The flags of each training command; continued lines joined, launchers and comments removed."""
    joined = re.sub(r"\\\s*\n\s*", " ", text)
    for line in joined.splitlines():
        match = re.search(r"(?:vgglab/train\.py|-m vgglab\.train|^vgglab train)\b(.*)", line.strip())
        if line.strip().startswith(("python", "torchrun", "vgglab")) and match:
            yield match.group(1).split("#")[0]


@pytest.mark.parametrize("text", [TRAINING, train.__doc__], ids=["training.md", "train.py"])
def test_training_commands_in_documentation_parse(text):
    found = list(training_flags(text))
    assert len(found) >= 7
    for flags in found:
        words = [re.sub(r"<\w+>", "x", word) for word in shlex.split(flags)]
        if not words or not words[0].startswith("--help"):
            parse_flags(words)


def commands_shown_in(file):
    """The ``vgglab`` commands in a page's code blocks for the shell, each as a list of words."""
    for block in re.findall(r"^```sh\n(.*?)^```", file.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("vgglab "):
                yield shlex.split(line.split("  #")[0])[1:]


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_commands_in_documentation_parse(file):
    """Only with the parser of each command; what the commands do is tested elsewhere."""
    for name, *words in commands_shown_in(file):
        if "--help" in words:
            continue
        if name == "train":
            parse_flags(words)
        elif name == "plan":
            plan_command.parser.parse_known_args(words)
        else:
            importlib.import_module(f"vgglab.commands.{name}").parser.parse_args(words)


SHORTENING_FLAGS = {  # appended to the page's flags, to override some
    "train": [*TINY, "--training-step-per-epoch=2", "--eval-step-per-epoch=1", "--batch-size=2", "--skip-steps=0"],
    "bench data": ["--image-size=32", "--seconds=0.1", "--workers=1"],
    "bench step": ["--model=vgg11", "--image-size=32", "--turns=1", "--batch-size=2"],
    "anatomy": ["--image-size=32"],
}


@pytest.mark.long
@pytest.mark.paper_widths  # new interpreters continue what this process has trained
@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_commands_in_documentation_run(file, images, train, tmp_path):
    """In a folder with the data sets and runs that the pages name."""
    (tmp_path / "imagenet").symlink_to(images)
    (tmp_path / "recorded").symlink_to(PROJECT / "recorded")
    for name in ("my_run", "A", "B"):
        shutil.copytree(train().run.path, tmp_path / "runs" / name)
    for words in commands_shown_in(file):
        command = " ".join(words[:2]) if words[0] in ("bench", "data") else words[0]
        reduced = ["--nproc=2"] * ("--nproc" in words) + ["--seeds=2"] * ("--seeds" in words)
        extra = [] if "--help" in words else SHORTENING_FLAGS.get(command, []) + reduced * (command == "train")
        result = shell(
            "python", "-m", "vgglab", *words, *extra, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(PROJECT)}
        )
        assert result.returncode in ((0, 1) if command == "compare" else (0,)), (words, result.stderr[-2000:])


def test_documentation_mentions_every_command():
    shown = {words[0] for file in PAGES for words in commands_shown_in(file)}
    inline = set(re.findall(r"`vgglab (\w+)", "".join(file.read_text() for file in PAGES)))
    assert set(NAMES) <= shown | inline


def test_original_commands_are_in_the_documentation():
    from test_seed_defects import CONVERGENCE, EIGHT_CARDS, ONE_CARD, PERFORMANCE

    joined = " ".join(re.sub(r"\\\s*\n", " ", TRAINING).split())
    for command in (ONE_CARD, EIGHT_CARDS):
        for flags in (PERFORMANCE, CONVERGENCE):
            assert f"{command} {flags.replace('DATA', 'imagenet_raw')}" in joined


def test_make_targets_in_documentation_exist():
    makefile = (PROJECT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert {"install", "run", "test", "test-long", "test-kernels", "lab", "check", "notebooks", "help"} <= targets
    for document in (*PAGES, PROJECT / "CONTRIBUTING.md", PROJECT / ".ci/run"):
        named = set(re.findall(r"(?:^|`)make ([a-z-]+)", document.read_text(), re.MULTILINE))
        assert named <= targets, document
    listed = shell("make", "help").stdout
    assert all(re.search(rf"^{target} ", listed, re.MULTILINE) for target in ("run", "test", "lab", "check"))


def test_files_in_documentation_exist():
    for document in (*PAGES, PROJECT / "CONTRIBUTING.md"):
        text = document.read_text()
        named = set(re.findall(r"`((?:vgglab|tests|notebooks)/[\w./]*)`|\b(\w+\.(?:ya?ml|toml|ipynb))\b", text))
        for path, name in named:
            found = (PROJECT / path).exists() if path else list(PROJECT.glob(f"**/{name}"))
            assert found, (document, path or name)


@pytest.mark.parametrize("file", [*PAGES, *PROJECT.glob("docs/*.zh-CN.md")], ids=lambda file: file.name)
def test_links_in_documentation_exist(file):
    for link in re.findall(r"\]\(([^)#]+)", file.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (file.parent / link).exists(), link


def test_conda_environment_matches_make_install():
    environment = (PROJECT / "environment.yml").read_text()
    assert "-c constraints.txt" in environment
    assert "-e .[dev]" in environment
    assert "pytorch" not in re.sub(r"#.*", "", environment)  # that channel is discontinued


def test_every_dependency_is_explained_and_pinned():
    text = (PROJECT / "pyproject.toml").read_text()
    block = text[text.index("dependencies = [") : text.index("[tool.hatch")]
    pinned = {line.split("==")[0].lower() for line in (PROJECT / "constraints.txt").read_text().splitlines()}
    lines = [line for line in block.splitlines() if line.startswith('    "') and "vgglab[" not in line]
    assert len(lines) > 10
    for line in lines:
        assert re.search(r"#\s+\w+", line), line
        assert re.match(r'\s+"([\w-]+)', line).group(1).lower() in pinned, line


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("data", DATA_SETS),
        ("data", DECODERS),
        ("training", RECIPES),
        ("devices", KINDS),
        ("run-directory", DOCUMENTS["report.json"]),
    ],
)
def test_every_choice_is_documented(page, names):
    """On the Chinese page, too: test_translation compares the two."""
    text = (PROJECT / "docs" / f"{page}.md").read_text()
    assert [name for name in names if not re.search(rf"`(--\w+ )?{name}`", text)] == []


def test_settings_that_a_resumed_run_does_not_keep_are_on_the_page():
    """The page listed some of them, and mixed precision, which is kept."""
    not_about_training = {
        "pretrained", "dist_url", "world_size", "fix_seed", "seeds", "run_dir", "resume", "start_epoch", "test_only",
        "cache_dataset", "apex", "apex_opt_level", "enable_horovod", "amp",
    }  # fmt: skip
    names = {field.name for field in fields(Request) if not field.metadata["is_inherited"]} - not_about_training
    page = (PROJECT / "docs" / "training.md").read_text()
    [listed] = re.findall(r"repeat the\s+flag: (.*?)\. ", page, re.DOTALL)
    assert set(re.findall(r"`--([a-z0-9-]+)`", listed)) == {name.replace("_", "-") for name in names}
