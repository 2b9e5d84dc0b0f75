"""Links between pages lead somewhere: to files, and to headings where they name one."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import ROOT, pages, without_fences

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(text):
    """The names that the headings of a page go by."""
    titles = re.findall(r"^#+ (.+)$", without_fences(text), re.M)
    kept = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
    return {title.strip().replace(" ", "-") for title in kept}


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    text = page.read_text()
    for link in _LINK.findall(without_fences(text)):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page}: {link}"
        assert target.is_relative_to(ROOT), f"{page}: {link} leaves the repository"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{page}: {link}"


def test_links_are_found():
    found = _LINK.findall((ROOT / "README.md").read_text())
    assert "docs/training.md" in found
    assert "training-on-your-own-data" in anchors("## Training on your own data!\n")
