"""Runs Python code in fresh copies of one process that has upstream's backend module imported: an import takes 10 s and more.

Not where there is a GPU: the driver does not survive the fork.
"""

import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
import traceback


class Parent:
    """This process as it is now, kept in a fork; each `run` is a fork of that one."""

    def __init__(self):
        (requests, self.requests), (self.replies, replies) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.requests)
            os.close(self.replies)
            try:
                serve(open(requests), open(replies, "w"))
            finally:
                os._exit(0)
        os.close(requests)
        os.close(replies)
        self.requests, self.replies = open(self.requests, "w"), open(self.replies)

    def run(self, code: str, env: dict[str, str]) -> subprocess.CompletedProcess:
        self.requests.write(json.dumps([code, env]) + "\n")
        self.requests.flush()
        reply = self.replies.readline()
        if not reply:
            raise RuntimeError("the parent process ended")
        return subprocess.CompletedProcess(code, *json.loads(reply))

    def close(self) -> None:
        self.requests.close()
        self.replies.close()
        os.waitpid(self.pid, 0)


def serve(requests, replies) -> None:
    logging.root.handlers.clear()  # pytest's, as are its streams
    gc.freeze()  # a fork that looked at millions of objects would copy their memory
    for line in requests:
        code, env = json.loads(line)
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            child = os.fork()
            if child == 0:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
                os._exit(run(code, env))
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            texts = [(file.seek(0), file.read())[1] for file in (out, err)]
        replies.write(json.dumps([status, *texts]) + "\n")
        replies.flush()


def run(code: str, env: dict[str, str]) -> int:
    """The exit status that `python -c code` would have."""
    os.environ.clear()
    os.environ.update(env)
    status = 0
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status
