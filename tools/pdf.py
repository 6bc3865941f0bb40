#!/usr/bin/env python
"""Print the book, built as one page, into a PDF by headless Chromium.

    python tools/pdf.py _build/singlehtml/book/intro.html _build/weighing-adam.pdf

`make pdf` builds that page first. A copy of it is printed in which the light theme is on and
everything folded is open; custom.css has what else is different on paper. Sphinx writes the page
where the root document lies (book/), but its links start where _static lies: there goes the copy.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
APPLICATIONS = ("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
                "/Applications/Chromium.app/Contents/MacOS/Chromium")
MISSING = ("make pdf needs Chromium or Chrome, and none was found: install one (chromium on Debian and Fedora), "
           "or name it by CHROMIUM=/path/to/it. The site itself, `make book`, needs no browser.")


def browser():
    """The path of Chromium or Chrome: $CHROMIUM, one on the path, or a Mac's application; else None."""
    named = os.environ.get("CHROMIUM")
    if named:
        return shutil.which(named)
    found = (shutil.which(name) for name in NAMES)
    return next((path for path in found if path), None) or next((p for p in APPLICATIONS if os.access(p, os.X_OK)), None)


def relinked(text):
    """The page with links that hold on paper: to its own places, or to the network.

    A chapter's page is a place in this one. What is left are files of the site, such as records:
    Chromium would write where they lie on this machine into the PDF.
    """
    places = set(re.findall(r'\bid="([^"]+)"', text))

    def link(match):
        path, _, place = match[1].partition("#")
        if re.match(r"[a-z]+:", path):
            return match[0]
        if path and not place:
            name = path.removesuffix(".html").replace("../", "")
            place = next((p for p in sorted(places) if p.startswith("document-") and p.endswith("/" + name.split("/")[-1])), "")
        return f'href="#{place}"' if place in places else ""

    text = re.sub(r'(?<=<a )[^>]*', lambda a: re.sub(r'\bhref="([^"]*)"', link, a[0]), text)
    return re.sub(r'\b((?:src|href)=")(?:\.\./)+(?=_static/)', r"\1", text)


def printable(text):
    """The page in the light theme, with every fold open and links that hold on paper."""
    text = relinked(text)
    text = re.sub(r"<html\b([^>]*)>", lambda m: "<html" + re.sub(r'\s+data-(?:mode|theme)="[^"]*"', "", m[1]).rstrip()
                  + ' data-mode="light" data-theme="light">', text, count=1)
    text = re.sub(r"<details\b(?![^>]*\bopen\b)", "<details open", text)
    return text.replace('localStorage.getItem("mode")', '"light"').replace('localStorage.getItem("theme")', '"light"')


def place(page, text):
    """Where the page's links start: the nearest folder above it with _static; SystemExit if one is broken.

    Without its style sheets and MathJax, Chromium would still print a book, and a poor one.
    """
    root = next((folder for folder in page.parents if (folder / "_static").is_dir()), None)
    if root is None:
        raise SystemExit(f"{page}: no folder above it has _static: build it with `make pdf`")
    loaded = re.findall(r'<(?:link|script)\b[^>]*?\b(?:href|src)="([^"#?:]+\.(?:css|js))\b', text)
    lost = sorted({name for name in loaded if not (root / name).is_file()})
    if lost:
        raise SystemExit(f"{page}: not found in {root}: {', '.join(lost)}")
    return root


def print_page(chromium, page, target, seconds):
    """Run Chromium with a profile of its own; SystemExit if no PDF comes."""
    text = printable(page.read_text(encoding="utf-8"))
    copy = place(page, text) / "print.html"
    copy.write_text(text, encoding="utf-8")
    sandbox = ["--no-sandbox"] * (hasattr(os, "geteuid") and os.geteuid() == 0)  # Chromium refuses root otherwise
    target.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        command = [chromium, "--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                   "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", *sandbox,
                   f"--user-data-dir={profile}", "--no-pdf-header-footer", "--generate-pdf-document-outline",
                   f"--virtual-time-budget={1000 * seconds}", f"--timeout={1000 * seconds}",
                   f"--print-to-pdf={target}", copy.resolve().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10 * seconds)
    copy.unlink()
    if done.returncode or not target.is_file() or not target.read_bytes().startswith(b"%PDF"):
        raise SystemExit(f"{chromium} printed nothing (status {done.returncode}):\n{done.stderr[-2000:]}")


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path, help="the book as one page")
    parser.add_argument("target", type=Path, help="the PDF to write")
    parser.add_argument("--check", action="store_true", help="only look for the browser")
    parser.add_argument("--seconds", type=int, default=120, help="for MathJax to set all formulas")
    chosen = parser.parse_args(words)
    chromium = browser()
    if chromium is None:
        print(MISSING)
        return 1
    if not chosen.check:
        print_page(chromium, chosen.page.resolve(), chosen.target.resolve(), chosen.seconds)
        print(f"{chosen.target}: {chosen.target.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
