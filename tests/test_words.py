"""One term for each thing: docs/glossary.md lists the terms, and the words that are no longer used."""

import re

import pytest
from conftest import PROJECT

GLOSSARY = (PROJECT / "docs" / "glossary.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in GLOSSARY.splitlines()
    if line.startswith("| ") and not line.startswith("| English")
]
RETIRED = [word.strip() for row in ROWS for word in row[3].split(",") if word.strip()]
SOURCES = sorted(file for file in (PROJECT / "vgglab").rglob("*.py") if "doubles" not in file.parts)
PAGES = [*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md")]
READ = [file for file in (*SOURCES, *PAGES) if file.name not in ("glossary.md", "CHANGELOG.md")]


def test_glossary_is_complete():
    assert 50 <= len(ROWS) <= 90
    assert all(len(row) == 4 and row[0] and row[1] and row[2] for row in ROWS)
    english = [row[0].lower() for row in ROWS]
    assert english == sorted(english)
    assert len(RETIRED) > 20


@pytest.mark.parametrize("word", RETIRED)
def test_retired_word_is_not_used(word):
    edge = r"\b" if word.isascii() else ""
    pattern = re.compile(f"{edge}{re.escape(word)}{edge}", re.IGNORECASE)
    found = [
        f"{file.relative_to(PROJECT)}:{number}"
        for file in READ
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def test_messages_on_the_troubleshooting_page_exist():
    source = "\n".join(file.read_text(encoding="utf-8") for file in SOURCES)
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # messages that continue on the next line
    page = (PROJECT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 25
    assert [message for message in messages if message not in source] == []
