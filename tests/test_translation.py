"""README.md and the pages in docs/ have the same content in English and in Chinese."""

import re
from collections import Counter
from itertools import zip_longest

import pytest
from conftest import PROJECT

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`]+)`")


def sections(text):
    """(heading, level, body) of each section; a # inside a code block is a comment, no heading."""
    inside, found = False, [["the top", 0, ""]]
    for line in text.splitlines(keepends=True):
        inside ^= line.startswith("```")
        match = None if inside else re.match(r"(#+) (.*)", line)
        if match:
            found.append([match.group(2), len(match.group(1)), ""])
        else:
            found[-1][2] += line
    return found


def numbers(text):
    text = re.sub(r"(\d{4})\s*年\s*\d+\s*月", r"\1", text)  # November 2026
    for unit, millions in (("亿", 100), ("万", 0.01)):
        text = re.sub(rf"(\d+(?:\.\d+)?) ?{unit}", lambda m, f=millions: f"{float(m.group(1)) * f:g}", text)
    return Counter(re.findall(r"\d+(?:[.,]\d+)*", CODE.sub("", text)))


def words(text):
    return Counter(" ".join(code.split()) for code in CODE.findall(text))


def blocks(body):
    """Each code block without comments; of a block without a language (a file tree), only the names."""
    for language, block in FENCE.findall(body):
        if language:
            yield [re.sub(r"(^|\s+)#.*", "", line).rstrip() for line in block.splitlines()]
        else:
            yield re.findall(r"[\w<>-]+(?:\.(?:py|pt|json|jsonl)\b|/)", block, re.ASCII)


def parts(body):
    """What must be the same in both languages, by name."""
    prose = FENCE.sub("", body)
    prose = re.sub(r"^\[(English|中文)\]\([^)]*\)$", "", prose, flags=re.MULTILINE)  # each links to the other
    prose = prose.replace(".zh-CN.md", ".md")
    rows = [line for line in prose.splitlines() if line.startswith("|")]
    found = {f"code block {i}": Counter(block) for i, block in enumerate(blocks(body), 1)}
    for i, row in enumerate(rows, 1):
        found[f"table row {i}"] = words(row) + numbers(row) + Counter({"|": row.count("|")})
    found["code in the text"] = words(prose)
    found["numbers"] = numbers(re.sub(r"\]\([^)]*\)", "", prose))
    found["pictures and links"] = Counter(re.findall(r"\]\(([^)]*)\)", prose))
    return found


def differences(one, other):
    """A line for each difference between the two texts, with its section."""
    for a, b in zip_longest(sections(one), sections(other)):
        if a is None or b is None or a[1] != b[1]:
            yield f"headings differ at {a and a[0]!r} / {b and b[0]!r}"
            return
        first, second = parts(a[2]), parts(b[2])
        for name in {**first, **second}:
            x, y = first.get(name, Counter()), second.get(name, Counter())
            if x != y:
                yield (
                    f"{a[0]}, {name}: only in the first {list((x - y).elements())}, "
                    f"only in the second {list((y - x).elements())}"
                )


ENGLISH = """# T
[中文](README.zh-CN.md)
![A](docs/a.png)
## Speed
`--fast` took 2.56 x in November 2026.

| what | figure |
|---|---|
| `vgg16` | 99.44 % |

```sh
make run --quick  # trains
```
"""
CHINESE = """# T
[English](README.md)
![图](docs/a.png)
## 速度
2026 年 11 月，`--fast` 为 2.56 x。

| 内容 | 数值 |
|---|---|
| `vgg16` | 99.44 % |

```sh
make run --quick  # 训练
```
"""


def test_faithful_translation_has_no_differences():
    assert list(differences(ENGLISH, CHINESE)) == []


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        ("2.56", "2.65", "Speed, numbers"),
        ("| `vgg16` | 99.44 % |\n", "", "Speed, table row 3"),
        ("| 99.44 % |", "| 99.44 % | |", "Speed, table row 3"),
        ("`--fast`", "`--faster`", "Speed, code in the text"),
        ("--quick", "--slow", "Speed, code block 1"),
        ("docs/a.png", "docs/b.png", "T, pictures"),
        ("## 速度", "### 速度", "headings differ at 'Speed'"),
    ],
)
def test_outdated_translation_is_reported_by_section(old, new, difference):
    assert any(difference in line for line in differences(ENGLISH, CHINESE.replace(old, new)))


BILINGUAL = ("glossary.md", "api.md")  # the glossary in each line; the API page is made from docstrings
PAGES = [PROJECT / "README.md", *sorted(file for file in (PROJECT / "docs").glob("*.md") if "zh-CN" not in file.name)]


@pytest.mark.parametrize("file", [file for file in PAGES if file.name not in BILINGUAL], ids=lambda file: file.name)
def test_both_languages_have_the_same_content(file):
    chinese = file.with_suffix(".zh-CN.md")
    assert list(differences(file.read_text(encoding="utf-8"), chinese.read_text(encoding="utf-8"))) == []
    assert f"[中文]({chinese.name})" in file.read_text(encoding="utf-8")
    assert f"[English]({file.name})" in chinese.read_text(encoding="utf-8")


def test_every_chinese_page_has_an_english_one():
    for chinese in PROJECT.glob("docs/*.zh-CN.md"):
        assert chinese.with_name(chinese.name.replace(".zh-CN", "")) in PAGES
