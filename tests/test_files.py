"""Downloads, checksums and kept copies, against the real faults: a local server that fails
midway, files that are damaged, disks that are full, processes that are killed."""
import errno
import hashlib
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from local_mirror import Mirror

from nbutils import files
from nbutils.files import (ChecksumError, DownloadError, cached, data_home, download, members,
                           verify)

CONTENT = bytes(i * i % 251 for i in range(5500))
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def mirror(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Mirror(CONTENT) as mirror:
        yield mirror


@pytest.fixture
def target(tmp_path):
    return tmp_path / "file.bin"


def part_of(target):
    return Path(f"{target}.part")


def get(mirror, target, *words, timeout=10):
    got = download([mirror.url(w) for w in words], target, sha256=SHA256, timeout=timeout)
    assert got == target and target.read_bytes() == CONTENT and not part_of(target).exists()
    return mirror.log


def run_python(program, *args, **kwargs):
    return subprocess.Popen([sys.executable, "-c", program, *map(str, args)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def finish(process, seconds=240):
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err
    return out


# Checksums

def test_verify(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    md5 = "900150983cd24fb0d6963f7d28e17f72"
    assert verify(path, md5=md5) == path
    assert verify(str(path), sha256=hashlib.sha256(b"abc").hexdigest().upper()) == path
    assert verify("no such file", md5=md5, raw=b"abc") == Path("no such file")
    with pytest.raises(ChecksumError) as caught:
        verify(path, md5=md5, raw=b"abd")
    assert caught.value.expected == md5 and caught.value.found in str(caught.value)
    assert str(path) in str(caught.value) and "Delete it" in str(caught.value)
    for wrong in {}, {"md5": md5, "sha256": md5}:
        with pytest.raises(TypeError, match="exactly one"):
            verify(path, **wrong)
    with pytest.raises(FileNotFoundError):
        verify(tmp_path / "b", md5=md5)


def test_empty_content_is_checked():
    with pytest.raises(ChecksumError):
        verify("x", sha256=SHA256, raw=b"")


def test_data_home(monkeypatch, tmp_path):
    monkeypatch.setenv("NBUTILS_DATA", str(tmp_path))
    assert data_home() == tmp_path
    monkeypatch.setenv("NBUTILS_DATA", "")
    assert data_home() == Path.home() / ".cache/nbutils"


# Downloads

def test_whole(mirror, tmp_path):
    assert get(mirror, tmp_path / "new/folder/file.bin", "whole") == [["whole", None, 5500]]
    assert "Mozilla" in mirror.agents.pop()


def test_a_file_that_is_there_is_not_fetched(mirror, target):
    target.write_bytes(CONTENT)
    assert get(mirror, target, "whole") == []


def test_a_wrong_file_that_is_there_is_kept_and_named(mirror, target):
    target.write_bytes(b"mine")
    with pytest.raises(ChecksumError, match="file.bin"):
        get(mirror, target, "whole")
    assert target.read_bytes() == b"mine" and mirror.log == []


def test_one_address_as_a_string(mirror, target):
    download(mirror.url("whole"), target, md5=hashlib.md5(CONTENT).hexdigest())
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("word", ["cut", "reset"])
def test_failing_midway_is_resumed(mirror, target, word):
    log = get(mirror, target, word)
    starts = [start or 0 for _, start, _ in log]
    assert starts == [0, 1000, 2000, 3000, 4000, 5000]
    assert sum(sent for *_, sent in log) == len(CONTENT), "no byte was fetched twice"


def test_the_next_mirror_continues(mirror, target):
    assert get(mirror, target, "once", "whole")[-1] == ["whole", 1000, 4500]


def test_the_next_call_continues(mirror, target):
    with pytest.raises(DownloadError):
        get(mirror, target, "once")
    assert part_of(target).read_bytes() == CONTENT[:1000]
    assert get(mirror, target, "whole")[-1] == ["whole", 1000, 4500]


def test_range_is_ignored(mirror, target):
    part_of(target).write_bytes(CONTENT[:10])
    assert get(mirror, target, "rangeless") == [["rangeless", 10, 5500]]


def test_range_is_ignored_and_the_connection_breaks(mirror, target):
    with pytest.raises(DownloadError, match="ended after 1,000 of 5,500"):
        get(mirror, target, "rangeless-cut")
    assert len(mirror.log) == 2, "given up once it brings nothing new"
    get(mirror, target, "whole")


def test_wrong_bytes_are_removed(mirror, target):
    log = get(mirror, target, "wrong", "whole")
    assert log == [["wrong", None, 5500], ["whole", None, 5500]]


def test_only_wrong_bytes(mirror, target):
    with pytest.raises(DownloadError, match="wrong bytes, sha256") as caught:
        get(mirror, target, "wrong")
    assert SHA256 in str(caught.value)
    assert not target.exists() and not part_of(target).exists()


def test_a_wrong_part_is_not_blamed_on_the_mirror(mirror, target):
    part_of(target).write_bytes(b"nonsense")
    assert get(mirror, target, "whole") == [["whole", 8, 5492], ["whole", None, 5500]]


def test_a_wrong_part_and_a_wrong_mirror_end(mirror, target):
    part_of(target).write_bytes(b"nonsense")
    with pytest.raises(DownloadError):
        get(mirror, target, "wrong")
    assert len(mirror.log) == 2


def test_a_part_longer_than_the_file(mirror, target):
    part_of(target).write_bytes(CONTENT + b"more")
    log = get(mirror, target, "whole")
    assert [start for _, start, _ in log] == [5504, None]


def test_a_complete_part_needs_no_server(target):
    part_of(target).write_bytes(CONTENT)
    assert download(["http://127.0.0.1:9/none"], target, sha256=SHA256) == target


def test_no_length(mirror, target):
    assert get(mirror, target, "lengthless") == [["lengthless", None, 5500]]


def test_all_mirrors_fail(mirror, target):
    urls = [mirror.url("nowhere"), mirror.url("gone"), "http://127.0.0.1:9/refused"]
    with pytest.raises(DownloadError) as caught:
        download(urls, target, sha256=SHA256, timeout=5)
    message = str(caught.value)
    assert list(caught.value.reasons) == urls and all(url in message for url in urls)
    assert message.count("404") == 2 and "refused" in message.splitlines()[3].lower()
    assert f"by hand: {target}" in message and SHA256 in message and "NBUTILS_DATA" in message


def test_a_name_that_does_not_exist(target):
    with pytest.raises(DownloadError, match="no-such-host.invalid"):
        download("http://no-such-host.invalid/x", target, md5="0" * 32, timeout=5)


def test_silence_ends_after_the_timeout(mirror, target):
    start = time.monotonic()
    log = get(mirror, target, "silent", "whole", timeout=0.5)
    assert time.monotonic() - start < 10 and log == [["silent", None, 0], ["whole", None, 5500]]


def test_what_came_before_the_silence_is_kept(mirror, target):
    with pytest.raises(DownloadError, match="503"):
        get(mirror, target, "once-stalls", timeout=0.5)
    assert get(mirror, target, "whole")[-1] == ["whole", 1000, 4500]


def test_the_reason_of_silence_is_told(mirror, target):
    with pytest.raises(DownloadError, match="timed out"):
        get(mirror, target, "silent", timeout=0.3)


# Disks and folders

def test_the_folder_is_a_file(mirror, tmp_path):
    (tmp_path / "folder").write_text("")
    with pytest.raises(OSError, match="cannot write in .*folder.*NBUTILS_DATA"):
        get(mirror, tmp_path / "folder/file.bin", "whole")
    assert mirror.log == [], "said before anything is fetched"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs Linux's /proc")
def test_the_folder_cannot_be_written(mirror):
    with pytest.raises(OSError, match="cannot write in /proc/self"):
        get(mirror, Path("/proc/self/file.bin"), "whole")
    assert mirror.log == []


def test_the_disk_is_too_small(mirror, target, monkeypatch):
    usage = files.shutil.disk_usage(target.parent)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: usage._replace(free=5000))
    with pytest.raises(OSError, match="NBUTILS_DATA") as caught:
        get(mirror, target, "whole", "whole")
    assert caught.value.errno == errno.ENOSPC and not isinstance(caught.value, DownloadError)
    assert not part_of(target).exists() and len(mirror.log) == 1, "no other mirror is asked"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_the_disk_is_full_while_writing(mirror, target):
    part_of(target).symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        get(mirror, target, "whole", "whole")
    assert caught.value.errno == errno.ENOSPC and len(mirror.log) == 1


# Several processes

FETCH = """
import sys
from nbutils.files import download
download([sys.argv[1]], sys.argv[2], sha256=sys.argv[3])
print(sorted({"fastprogress", "matplotlib", "torch"} & set(sys.modules)))
"""


def test_two_processes_fetch_once(mirror, target):
    both = [run_python(FETCH, mirror.url("slow"), target, SHA256) for _ in range(2)]
    assert [finish(p) for p in both] == ["[]\n", "[]\n"]
    assert target.read_bytes() == CONTENT
    assert mirror.log == [["slow", None, 5500]], "the second process waited for the first"


def test_a_killed_download_is_resumed(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    content = CONTENT * 400  # more than one block of 256 KiB
    sha256, target = hashlib.sha256(content).hexdigest(), tmp_path / "file.bin"
    with Mirror(content, piece=2**18) as mirror:
        process = run_python(FETCH, mirror.url("slow"), target, sha256)
        until = time.monotonic() + 240
        while files._size(part_of(target)) == 0 and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        done = files._size(part_of(target))
        assert 0 < done < len(content)
        download(mirror.url("whole"), target, sha256=sha256)  # the lock died with it
        assert target.read_bytes() == content and mirror.log[-1][1] == done


# Progress bars

BAR = """
import sys
import nbutils.files as files
with open(sys.argv[3], "w") as out:
    files.download([sys.argv[1]], sys.argv[2], md5=sys.argv[4])
    print("fastprogress" in sys.modules, file=out)
"""


def in_terminal(program, *args, **variables):
    """Run a program whose standard output is a terminal; return what appears there."""
    import pty

    parent, child = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "NBUTILS_NO_BAR"} | variables
    process = subprocess.Popen([sys.executable, "-c", program, *map(str, args)], stdout=child,
                               stderr=subprocess.PIPE, env=environment)
    os.close(child)
    seen = b""
    try:
        while block := os.read(parent, 4096):
            seen += block
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(parent)
    errors = process.communicate(timeout=240)[1]
    assert process.returncode == 0, errors.decode()
    return seen.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("variables, shown", [({}, True), ({"NBUTILS_NO_BAR": "1"}, False)])
def test_a_bar_for_those_who_look(monkeypatch, tmp_path, variables, shown):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    content = bytes(3 * 2**20 + 500_000)
    with Mirror(content) as mirror:
        seen = in_terminal(BAR, mirror.url("whole"), tmp_path / "x", tmp_path / "out",
                           hashlib.md5(content).hexdigest(), **variables)
    assert seen.count("100.00%") == shown and bool(seen) == shown
    assert (tmp_path / "out").read_text() == f"{shown}\n"


# Archives

def test_members_come_from_folders_and_archives_alike(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in "one", "two", "other":
        (tmp_path / "folder" / name).write_text(name)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        for name in "two", "other", "one":
            tar.add(tmp_path / "folder" / name, arcname=f"../../{name}")
        link = tarfile.TarInfo("x/three")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = sorted(p for p in tmp_path.parent.rglob("*"))
    wanted = ["one", "two", "three"]
    for source in tmp_path / "folder", tmp_path / "a.tar.gz":
        got = {name: raw for _, name, raw in members(source, wanted)}
        assert got == {"one": b"one", "two": b"two"}
    assert sorted(p for p in tmp_path.parent.rglob("*")) == before, "nothing was unpacked"


# Kept copies

class Make:
    """Counts how often it is asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"x": torch.arange(100_000), "names": ["a", "b"]}


def keep(path, made_from="1"):
    """What cached() gives, and how often it was made for that."""
    make = Make()
    got = cached(path, {"source": made_from}, make)
    assert torch.equal(got["x"], torch.arange(100_000)) and got["names"] == ["a", "b"]
    return make.calls


class Touch:
    """A pickle that makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_kept_copies(tmp_path):
    path = tmp_path / "x.pt"
    assert [keep(path), keep(path)] == [1, 0]
    assert [keep(path, "2"), keep(path, "2"), keep(path, "1")] == [1, 0, 1]


@pytest.mark.parametrize("damage", ["flip", "half", "empty", "text", "other", "folder"])
def test_damaged_copies_are_made_anew(tmp_path, damage):
    path = tmp_path / "x.pt"
    keep(path)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert torch.load(path, weights_only=True), "torch itself does not notice"
    elif damage == "other":
        torch.save([1, 2], path)
    elif damage == "folder":  # cannot be replaced by a file: made each time, with a warning
        path.unlink()
        path.mkdir()
        with pytest.warns(UserWarning, match="no decoded copy could be kept in"):
            assert keep(path) == 1
        path.rmdir()
        return
    else:
        path.write_bytes({"half": content[:len(content) // 2], "empty": b"",
                          "text": b"not a tensor"}[damage])
    assert [keep(path), keep(path)] == [1, 0]


def test_a_copy_never_runs_code(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(Touch(tmp_path / "ran"), path)
    assert keep(path) == 1
    path.write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    assert keep(path) == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs Linux's /proc")
def test_a_folder_that_cannot_be_written_costs_the_copy_only():
    with pytest.warns(UserWarning, match="no decoded copy could be kept in /proc/self/x.pt"):
        assert keep(Path("/proc/self/x.pt")) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_costs_the_copy_only(tmp_path):
    (tmp_path / "x.pt.new").symlink_to("/dev/full")
    with pytest.warns(UserWarning, match="no decoded copy could be kept"):
        assert keep(tmp_path / "x.pt") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt.lock"], "nothing half-written stays"
    assert [keep(tmp_path / "x.pt"), keep(tmp_path / "x.pt")] == [1, 0]


def test_what_fails_to_be_made_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        cached(tmp_path / "x.pt", {}, lambda: 1 / 0)
    assert list(tmp_path.iterdir()) == []


KEEP = """
import sys, time, torch
from pathlib import Path
from nbutils.files import cached
path, start = Path(sys.argv[1]), Path(sys.argv[2])
while not start.exists():
    time.sleep(0.001)
for k in range(20):
    x = torch.arange(50_000) + int(sys.argv[3])
    got = cached(path, {"source": sys.argv[3]}, lambda: {"x": x})
    assert torch.equal(got["x"], x)
    if k % 3 == 0:
        path.unlink(missing_ok=True)
"""


def test_processes_do_not_harm_one_another(tmp_path):
    """Two that want the same copy, and one that keeps replacing it by another."""
    three = [run_python(KEEP, tmp_path / "x.pt", tmp_path / "start", s) for s in "112"]
    (tmp_path / "start").touch()
    for process in three:
        finish(process)
