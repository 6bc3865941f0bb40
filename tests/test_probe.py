"""Addresses that answer, that moved, that died, on a server of this machine; and the marks of published pages."""
import ast
import functools
import http.server
import re
import shutil
import threading
from pathlib import Path

import probe_addresses  # tools/, which conftest.py puts on the path
import published
import pytest
from local_mirror import Mirror
from probe_addresses import ADDRESSES, probe

ROOT = Path(__file__).resolve().parent.parent
CONTENT = bytes(range(256)) * 20
FAST = {"timeout": 1, "tries": 1, "pause": 0}


@pytest.mark.parametrize("word, length, wrong", [
    ("whole", 5120, ""), ("whole", None, ""), ("whole", 5121, "it has 5,120 bytes, and 5,121 were expected: another file"),
    ("rangeless", 5120, ""), ("rangeless", 7, "another file"), ("lengthless", None, ""), ("cut", 5120, ""),
    ("gone", 5120, "HTTP 404"), ("silent", 5120, "timed out")])
def test_probe(word, length, wrong):
    with Mirror(CONTENT) as mirror:
        answer = probe(mirror.url(word), length, **FAST)
        assert wrong in answer.wrong and bool(wrong) == bool(answer.wrong)
        assert mirror.agents <= {probe_addresses.AGENT}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def served(tmp_path):
    """A folder, and its address on a server that knows HEAD."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield tmp_path, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_server_that_knows_head(served):
    folder, base = served
    (folder / "data.tgz").write_bytes(CONTENT)
    assert probe(f"{base}/data.tgz", 5120, **FAST) == probe_addresses.Answer(5120, "")
    assert "another file" in probe(f"{base}/data.tgz", 1, **FAST).wrong
    assert "404" in probe(f"{base}/none.tgz", 1, **FAST).wrong
    (folder / "empty.tgz").touch()
    assert "another file" in probe(f"{base}/empty.tgz", 5120, **FAST).wrong


def test_nobody_there():
    assert "refused" in probe("http://127.0.0.1:9/x", **FAST).wrong
    assert probe("nonsense", **FAST).wrong


def test_a_hiccup_is_asked_again():
    with Mirror(CONTENT) as mirror:
        said = []
        whole, mirror.answer = mirror.answer, lambda request: said.append(1) or (request.send_error(503) if len(said) < 2 else whole(request))
        assert probe(mirror.url("whole"), 5120, timeout=1, tries=2, pause=0).wrong == ""


def test_report_and_exit_status(tmp_path, capsys):
    with Mirror(CONTENT) as mirror:
        good, dead = mirror.url("whole"), mirror.url("gone")
        page, words = tmp_path / "report.md", ["--tries", "1", "--pause", "0", "--timeout", "1"]
        assert probe_addresses.main(words, [("Words", good, 5120), ("Words", good, None)]) == 0
        assert "answers, 5,120 bytes" in capsys.readouterr().out
        assert probe_addresses.main([*words, "--report", str(page)], [("Words", good, 5120), ("Words", dead, 5120), ("Cars", dead, None)]) == 1
    text = page.read_text()
    assert text == capsys.readouterr().out
    assert "**Cars cannot be fetched from any address of the book.**" in text and "**Words" not in text
    lines = [line for line in text.splitlines() if line.startswith("| ") and "http" in line]
    assert len(lines) == 3 and "404" in lines[0] and "404" in lines[1] and "answers" in lines[2]


@pytest.mark.parametrize("said", [
    "`</code>\n```\n# owned", "a | b | c", "@someone #1 ![x](https://e.example/x.png)", "<img src=x onerror=alert(1)>", "\x1b[31m\u202e\x00",
    "::error::x", "x" * 10_000, " ", "\r\n| --- |"])
def test_what_a_server_says_stays_in_its_cell(said):
    """The report becomes an issue: what was answered is one span of code on one line, whatever it is."""
    text = probe_addresses.report([("Words", "https://x.example", probe_addresses.Answer(None, said))])
    (line,) = [line for line in text.splitlines() if "https://x.example" in line]
    found = re.fullmatch(r"\| Words \| https://x\.example \| `([ -_a-{}~]{1,100})` \|", line)
    assert found and text.count("`") == 2 and text.isascii() and len(text.splitlines()) == 5


def addresses_in_the_package():
    """Strings of nbutils that are addresses of files, with {...} where a name is put in."""
    for path in sorted((ROOT / "nbutils").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"https?://\S+/\S*[\w}]", node.value):
                yield node.value


def test_every_address_of_the_package_is_asked():
    listed, found = [url for _, url, _ in ADDRESSES], list(addresses_in_the_package())
    assert len(listed) == len(set(listed)) and len(found) >= 5
    for url in found:
        assert any(a.startswith(url.partition("{")[0]) for a in listed), f"tools/probe_addresses.py does not ask {url}"


# --- published pages -----------------------------------------------------------------------------
OLD, NEW = "a" * 40, "b" * 40


def build(folder):
    for name in published.PAGES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('<!doctype html><html><head lang="en"><title>x</title></head><body>y</body></html>')
    (folder / "index.html").write_text('<meta http-equiv="Refresh" content="0; url=book/intro.html" />\n')  # as Jupyter Book writes it


def test_marked_pages(served):
    site, base = served
    build(site)
    assert published.wrong(base, NEW, 5) == "index.html shows no commit"
    assert published.main(["stamp", str(site), OLD]) == 0 and published.main(["check", base, OLD]) == 0
    assert published.wrong(base, NEW, 5) == f"index.html shows commit {OLD}"
    assert published.stamp(site, NEW) == len(published.PAGES) and published.wrong(f"{base}/", NEW, 5) == ""
    assert (site / "index.html").read_text().count("book-commit") == 1                  # the old mark is gone
    (site / "nbs/11-cifar10.html").unlink()
    assert "nbs/11-cifar10.html: HTTP Error 404" in published.wrong(base, NEW, 5)
    assert published.main(["check", base, NEW, "--minutes", "0"]) == 1
    shutil.rmtree(site / "book")
    with pytest.raises(SystemExit, match="lacks nbs/11-cifar10.html, book/runs.html: was the book built whole"):
        published.stamp(site, NEW)
    with pytest.raises(SystemExit, match="is no commit"):
        published.stamp(site, "main")


def test_pages_that_come_late(served):
    site, base = served
    build(site)
    published.stamp(site, OLD)
    later = threading.Timer(0.3, published.stamp, (site, NEW))
    later.start()
    assert published.check(base, NEW, minutes=0.2, pause=0.1) == ""
    later.join()


def test_the_pages_are_pages_of_the_book():
    contents = (ROOT / "_toc.yml").read_text("utf-8")
    for name in published.PAGES[1:]:
        assert re.search(rf"(file|root): {name.removesuffix('.html')}$", contents, re.M), f"_toc.yml has no {name}"
