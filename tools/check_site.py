#!/usr/bin/env python
"""Check the built site: every local link, anchor, image and script exists, every image has alt text,
no page needs the network, and the API's pages and their chapters lead to each other. A page says its
language and title, has one first heading and skips no level, shows no markup that should have been
formatted, and no two of its scripts declare the same constant (the second would not run).

    python tools/check_site.py _build/html

Sphinx checks the links that it makes; this also sees those in notebooks' HTML outputs, such as
the links from tables to the runs behind them.
"""
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

HEADINGS = {f"h{level}": level for level in range(1, 7)}
QUIET = {"pre", "code", "script", "style", "svg"}           # what their text holds is meant so
RAW = re.compile(r"\$[^$\n]+\$|\\[(\[]|\{[a-z:-]+\}`|^:::|^```", re.M)
SKIP_FOLDERS = {"_static", "_sphinx_design_static", "_modules", "_sources"}


class Page(HTMLParser):
    """Collects a page's anchors, what it refers to, and images without alt text."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.targets, self.mute = set(), [], []
        self.fetched, self.text, self.inside = [], set(), 0    # what it loads; links in its text
        self.lang, self.title, self.levels, self.raw = "", "", [], []
        self.constants, self.quiet, self.tag = Counter(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.anchors.update(v for v in (a.get("id"), a.get("name")) if v)
        for key in ("href", "src"):
            if a.get(key):
                self.targets.append(a[key])
        self.inside += tag == "article"
        if tag == "a" and self.inside:
            self.text.add((a.get("href") or "").partition("#")[0])
        loaded = a.get("href") if tag == "link" and "stylesheet" in (a.get("rel") or "") else a.get("src")
        if loaded and (urlsplit(loaded).scheme in ("http", "https") or loaded.startswith("//")):
            self.fetched.append(loaded)
        if tag == "img" and ("alt" not in a or self.inside and not a["alt"].strip()):
            self.mute.append(a.get("src", "")[:60])
        if tag == "html":
            self.lang = a.get("lang") or ""
        if self.inside and tag in HEADINGS:
            self.levels.append(HEADINGS[tag])
        if tag in QUIET or "math" in (a.get("class") or "").split() or self.quiet and self.quiet[-1] == tag:
            self.quiet.append(tag)                          # with those of its name inside it
        self.tag = tag

    def handle_endtag(self, tag):
        self.inside -= tag == "article"
        if self.quiet and self.quiet[-1] == tag:
            self.quiet.pop()

    def handle_data(self, data):
        if self.tag == "title" and not self.inside:
            self.title += data.strip()
        if self.tag == "script":
            self.constants.update(set(re.findall(r"\bconst\s+(\w+)", data)))
        if self.inside and not self.quiet:
            self.raw += [found[0] for found in RAW.finditer(data)]


def one_way(pages, site):
    """Links in the text of the API's pages to chapters that do not lead back."""
    def linked(path):
        return {(path.parent / unquote(target)).resolve() for target in pages[path].text if target}

    for path in pages:
        if path.parent == site / "book" / "api" and path.name != "index.html":
            chapters = [p for p in linked(path) if p.parent == site / "nbs" and p in pages]
            if not chapters:
                yield f"{path.relative_to(site)}: leads to no chapter"
            elif not any(path in linked(chapter) for chapter in chapters):
                yield f"{chapters[0].relative_to(site)}: does not lead back to {path.relative_to(site)}"


def unreadable(page):
    """What a reader of the page, or of its sound, would stumble over."""
    for what in ("lang", "title"):
        if not getattr(page, what):
            yield f"no {what}"
    if page.levels and page.levels.count(1) != 1:
        yield f"{page.levels.count(1)} first headings"
    for before, after in zip([0, *page.levels], page.levels):
        if after > before + 1:
            yield f"a heading of level {after} below one of level {before}"
    for text in page.raw:
        yield f"raw markup: {text[:40]}"
    for name, n in page.constants.items():
        if n > 1:
            yield f"{n} scripts declare {name}"


def problems(site):
    site = site.resolve()
    pages = {p.resolve(): Page(p.read_text(encoding="utf-8")) for p in sorted(site.rglob("*.html"))
             if not SKIP_FOLDERS.intersection(p.relative_to(site).parts)}
    for path, page in pages.items():
        name = path.relative_to(site)
        for source in page.fetched:
            yield f"{name}: {source} comes from the network"
        if page.levels:  # a page of ours, not one that only leads on
            yield from (f"{name}: {problem}" for problem in unreadable(page))
        for source in page.mute:
            yield f"{name}: an image without alt text: {source}"
        for target in sorted(set(page.targets)):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc or target.startswith("data:"):
                continue
            place = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if place.is_dir():
                place /= "index.html"
            if not place.is_file():
                yield f"{name}: {target} does not exist"
            elif parts.fragment and place in pages and name.name != "genindex.html" \
                    and unquote(parts.fragment) not in pages[place].anchors:
                yield f"{name}: {target}: the page has no such anchor"
    yield from one_way(pages, site)


def main():
    site = Path(sys.argv[1] if len(sys.argv) > 1 else "_build/html")
    if not (site / "index.html").is_file():
        print(f"{site}/index.html does not exist: run `make book`")
        return 1
    found = list(problems(site))
    print("\n".join(found) or f"{site}: every local link, anchor and image is there")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
