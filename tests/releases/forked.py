"""Runs Python code in fresh copies of one process that has upstream's backend module imported: an import takes 6 to 10 s.

Not where there is a GPU: the driver does not survive the fork.
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback


class Parent:
    """A process that runs `imports` once; each `run` is a fork of it."""

    def __init__(self, imports: str):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}  # a fork has none of torch's threads
        self.process = subprocess.Popen(
            [sys.executable, __file__, imports], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, code: str, env: dict[str, str]) -> subprocess.CompletedProcess:
        self.process.stdin.write(json.dumps([code, env]) + "\n")
        self.process.stdin.flush()
        reply = self.process.stdout.readline()
        if not reply:
            raise RuntimeError(f"the parent process ended with {self.process.wait()}")
        return subprocess.CompletedProcess(code, *json.loads(reply))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def serve(imports: str) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the imports print
    exec(imports, {"__name__": "imports"})
    for line in sys.stdin:
        code, env = json.loads(line)
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            child = os.fork()
            if child == 0:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
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


if __name__ == "__main__":
    serve(sys.argv[1])
