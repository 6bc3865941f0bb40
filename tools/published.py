#!/usr/bin/env python
"""Mark the built pages with their commit, and look for the mark in the pages that were published.

    python tools/published.py stamp _build/html COMMIT
    python tools/published.py check https://example.org/book COMMIT [--minutes 10]

A deployment may succeed and leave the old pages, or none, in sight. `check` fetches the first page, a
chapter and the page of runs until all of them show the commit, and fails after some minutes.
"""
import argparse
import re
import time
import urllib.request
from pathlib import Path

PAGES = ("index.html", "nbs/01-sgd.html", "nbs/11-cifar10.html", "book/runs.html")
MARK = '<meta name="book-commit" content="{}"/>'
FOUND = re.compile(r'<meta name="book-commit" content="([0-9a-f]*)"/>')


def stamp(site, commit):
    """Write the mark into each page; return the number of pages."""
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise SystemExit(f"{commit!r} is no commit: give its 40 hexadecimal digits")
    pages = 0
    for path in sorted(site.rglob("*.html")):
        text = FOUND.sub("", path.read_text(encoding="utf-8"))
        mark = MARK.format(commit)
        head = re.search(r"<head[^>]*>", text)  # the first page, which only leads on to another, has none
        text = text[:head.end()] + mark + text[head.end():] if head else mark + text
        path.write_text(text, encoding="utf-8")
        pages += 1
    missing = [name for name in PAGES if not (site / name).is_file() or not FOUND.search((site / name).read_text(encoding="utf-8"))]
    if missing:
        raise SystemExit(f"{site} lacks {', '.join(missing)}: was the book built whole?")
    return pages


def wrong(base, commit, timeout):
    """What is wrong with the first published page that does not show the commit, or ""."""
    for name in PAGES:
        url = f"{base.rstrip('/')}/{name}?{commit[:12]}"  # past caches
        try:
            with urllib.request.urlopen(url, timeout=timeout) as reply:
                mark = FOUND.search(reply.read().decode("utf-8", "replace"))
        except OSError as error:
            return f"{name}: {ascii(str(error)[:200])[1:-1]}"
        if mark is None:
            return f"{name} shows no commit"
        if mark[1] != commit:
            return f"{name} shows commit {mark[1]}"
    return ""


def check(base, commit, minutes=10.0, pause=15.0, timeout=30.0):
    """Wait until all pages show the commit; return what is wrong at the end, or ""."""
    end = time.monotonic() + 60 * minutes
    while (why := wrong(base, commit, timeout)) and time.monotonic() + pause < end:
        time.sleep(pause)
    return why


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["stamp", "check"])
    parser.add_argument("where", help="the site's folder, or its address")
    parser.add_argument("commit")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to wait for the pages")
    chosen = parser.parse_args(words)
    if chosen.what == "stamp":
        print(f"{stamp(Path(chosen.where), chosen.commit)} pages marked with {chosen.commit}")
        return 0
    why = check(chosen.where, chosen.commit, chosen.minutes)
    print(why or f"{chosen.where}: {len(PAGES)} pages show {chosen.commit}")
    return 1 if why else 0


if __name__ == "__main__":
    raise SystemExit(main())
