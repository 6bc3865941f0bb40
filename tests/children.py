"""Processes that tests start, watch and kill.

They are forked from a server that has imported torch already: each costs milliseconds instead of seconds, and nothing of the test's own
process is inherited.
"""
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["pytest", "torch._dynamo", "nbutils.command", "nbutils.cifar10", "fastprogress.fastprogress"])
PATIENCE = 300                                   # seconds until a child is given up; machines may be busy


def _work(function, args, env, out, err):
    signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell's background jobs inherit that Ctrl-C is ignored
    for name, value in env.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    for number, place in ((1, out), (2, err)):
        to = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(to, number)
        os.close(to)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    for name in [n for n in sys.modules if n.partition(".")[0] == "fastprogress"]:
        del sys.modules[name]                    # preloaded for speed; a test looks who imports it
    warnings.simplefilter("error")
    function(*args)


class Child:
    """One process that runs ``function(*args)``.

    Parameters
    ----------
    function : callable
        At the top level of its module.
    env : dict
        Environment variables, None to take one away.
    tty : str, optional
        The terminal that it writes to, instead of to :attr:`out` and :attr:`err`.
    """

    def __init__(self, function, *args, env=None, tty=None):
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._out, self._err = (Path(tty or Path(self.folder.name, name)) for name in ("out", "err"))
        with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"):
            forkserver.ensure_running()
        work = (function, args, {k: None if v is None else str(v) for k, v in (env or {}).items()}, str(self._out), str(self._err))
        self.process = _CONTEXT.Process(target=_work, args=work, daemon=True)
        self.process.start()
        self.pid = self.process.pid

    @property
    def out(self):
        return self._out.read_text() if self._out.is_file() else ""

    @property
    def err(self):
        return self._err.read_text() if self._err.is_file() else ""

    def wait(self, patience=PATIENCE):
        """Return its exit code, negative for a signal."""
        self.process.join(patience)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"the child did not end in {patience} s\n{self.out}\n{self.err}")
        return self.process.exitcode

    def kill(self):
        """Send SIGKILL, and wait until it is gone."""
        self.process.kill()
        return self.wait()

    def until(self, condition, patience=PATIENCE):
        """Wait until ``condition()`` holds while the child runs."""
        end = time.monotonic() + patience
        while not condition():
            assert self.process.is_alive(), f"the child ended with {self.process.exitcode}\n{self.out}\n{self.err}"
            assert time.monotonic() < end, f"waited {patience} s for the child in vain\n{self.out}\n{self.err}"
            time.sleep(0.005)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.process.close()
        self.folder.cleanup()
