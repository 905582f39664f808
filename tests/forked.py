"""Functions in processes of their own, forked from one that has imported everything.

A process of its own tells what a call does to memory, ends it where it hangs, and can be killed.
"""

import contextlib
import importlib
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent


class Outcome(NamedTuple):
    """What became of a call.

    code: of the process, 0 if the function returned; below 0 the signal that ended it.
    """

    code: int
    value: Any
    said: str  # on stdout and stderr
    memory: int  # bytes that it took at its peak beside what it began with


class Server:
    """The process that the others are forked from.

    Args:
        modules: imported there.
        environment: of that process, beside this one's.
    """

    def __init__(self, *modules, **environment):
        paths = os.pathsep.join([str(HERE), *filter(None, sys.path)])
        self._process = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": paths} | environment,
        )

    def call(self, module, function, *args, seconds=60):
        """The outcome of module.function(*args), whose value can be pickled."""
        _send(self._process.stdin, (module, function, args, seconds))
        return Outcome(*_receive(self._process.stdout))

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _send(file, what):
    data = pickle.dumps(what)
    file.write(struct.pack("q", len(data)) + data)
    file.flush()


def _receive(file):
    (size,) = struct.unpack("q", file.read(8))
    return pickle.loads(file.read(size))


def _serve(requests, answers):
    while True:
        try:
            module, function, args, seconds = _receive(requests)
        except struct.error:  # closed
            return
        with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as result:
            child = os.fork()
            if child == 0:
                _run(module, function, args, seconds, said, result)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            for file in (said, result):
                file.seek(0)
            text, data = said.read().decode(errors="replace"), result.read()
            value, memory = pickle.loads(data) if code == 0 else (None, 0)
        _send(answers, (code, value, text, memory))


def _run(module, function, args, seconds, said, result):
    code = 1
    with contextlib.suppress(BaseException):
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
        signal.alarm(seconds)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            value = getattr(importlib.import_module(module), function)(*args)
        except BaseException:
            import traceback

            traceback.print_exc()
            raise
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        pickle.dump((value, 1024 * taken), result)
        result.flush()
        code = 0
    os._exit(code)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        importlib.import_module(name)
    own = os.dup(1)
    os.dup2(2, 1)
    _serve(sys.stdin.buffer, os.fdopen(own, "wb"))
