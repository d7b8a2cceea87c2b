"""Words that this project does not use, since a reader would have to ask what they mean. docs/glossary.md has ours."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
FILES += [
    path
    for folder in ("src", "docs", "examples", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".md", ".j2", ".sh")
]
# Code that is said to speak, former names of things, and terms that no other project has.
WORDS = (
    r"told|tells?(?!\()|telling|stranger|strangers|goes on|go on with|unless told|search[ _]twins?|twins?|ledgers?|"
    r"stand[- ]ins? for this|settl(?:ed|ing)|climb\(|votes_won|answers\(|keep_images|--keep-images|start_from|"
    r"sent ×|attacks in question|[Ww]hoever|bent|measured honestly|obeyed|images (?:that )?stand\b|"
    r"other things were asked|no name leads"
)


def test_plain_words():
    found = [
        f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, m.start()) + 1}: {m[0]}"
        for path in FILES
        for text in [path.read_text()]
        for m in re.finditer(rf"\b(?:{WORDS})", text)
    ]
    assert not found
