"""The README's table names every command of the repository."""

import re

from tests.docs.pages import ROOT


def test_every_tool_is_in_the_table():
    section = (ROOT / "README.md").read_text().partition("\n## Tools\n")[2].partition("\n## ")[0]
    named = set()
    for row in re.findall(r"^\| (`.*?) \|", section, re.M):
        first, *others = re.findall(r"`([^`]+)`", row)
        folder = first.rpartition("/")[0]
        for tool in (first, *(f"{folder}/{name}" for name in others)):
            found = [str(path.relative_to(ROOT)) for path in ROOT.glob(tool)]
            assert found, f"the table names {tool}, which is not there"
            named.update(found)
    tools = {*ROOT.glob("tools/*.py"), *ROOT.glob("projects/*/tools/*.py")}
    assert {str(path.relative_to(ROOT)) for path in tools} == named
