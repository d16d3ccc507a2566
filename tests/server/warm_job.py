"""`trainer` as a command that starts at once: forked from a process that has imported everything.

A job command for servers under test, whose trainings import their libraries one time for all:

    with warm_jobs(tmp_path) as environment:
        with running_server(data, environment=environment) as server: ...

The command is a process with the job's own locks, files, environment and signals. What works for it
is a child of the forking process, which it ends with.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import traceback

HERE = os.path.abspath(__file__)
# What is read of a message at once: an environment is smaller.
MOST = 1 << 20


def ask(place: str, arguments: list[str]) -> int:
    """Has a command done, hands signals on, and returns its exit code."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
        line.connect(place)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MOST)
        case = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: line.send(str(int(number)).encode()))
        socket.send_fds(line, [json.dumps(case).encode()], [0, 1, 2])
        told = line.recv(16)
    status = int(told) if told else signal.SIGKILL
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def serve(place: str) -> None:
    """Forks a child for every command, until standard input ends."""
    importlib.import_module("trainer.printing").hush_libraries()
    with importlib.import_module("trainer.collection").importing():
        for name in ("trainer.cli", "trainer.engine", "trainer.generating", "trainer.inference"):
            importlib.import_module(name)
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door,
        selectors.DefaultSelector() as watched,
    ):
        door.bind(place)
        door.listen()
        watched.register(door, selectors.EVENT_READ)
        watched.register(sys.stdin, selectors.EVENT_READ)
        print("ready", flush=True)
        children: dict[socket.socket, int] = {}
        while True:
            spoken = [key.fileobj for key, _ in watched.select(0.05)]
            if sys.stdin in spoken:
                for pid in children.values():
                    os.kill(pid, signal.SIGKILL)
                return
            for line in set(spoken) & set(children):
                if not _obeyed(line, children[line]):
                    watched.unregister(line)
            if door in spoken:
                line = door.accept()[0]
                children[line] = _forked(line)
                watched.register(line, selectors.EVENT_READ)
            for line in _answered(children):
                del children[line]
                if line in watched.get_map():
                    watched.unregister(line)
                line.close()


def _obeyed(line: socket.socket, pid: int) -> bool:
    """Hands a signal on; false once the command was killed, and its child with it."""
    told = line.recv(16)
    os.kill(pid, int(told) if told else signal.SIGKILL)
    return bool(told)


def _answered(children: dict[socket.socket, int]) -> list[socket.socket]:
    """The commands whose children have ended, and that were told how."""
    done = []
    for line, pid in children.items():
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            # One that was killed hears nothing.
            with contextlib.suppress(BrokenPipeError):
                line.send(str(status).encode())
            done.append(line)
    return done


def _forked(line: socket.socket) -> int:
    """A child that does what is asked for."""
    message, files, _, _ = socket.recv_fds(line, MOST, 3)
    pid = os.fork()
    if pid == 0:
        _be_the_command(json.loads(message), files)
    for file in files:
        os.close(file)
    return pid


def _be_the_command(case: dict[str, object], files: list[int]) -> None:
    """Becomes the command and ends with its exit code."""
    code = 1
    try:
        os.setsid()
        for number, file in enumerate(files):
            os.dup2(file, number)
        os.closerange(3, 256)
        os.environ.clear()
        os.environ.update(case["environment"])
        os.chdir(case["folder"])
        sys.argv = ["trainer", *case["arguments"]]
        importlib.import_module("trainer.cli").main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
