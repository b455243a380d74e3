"""What torch's agent starts for each rank: it asks the worker server for the real process, and stands for it.

It passes on its environment, its output, and the signals that it gets, and ends as the worker ends. Runs as a file,
with the socket's path, and imports next to nothing: it is on the way of every restart.

Protocol, over a Unix stream socket: one line of JSON with the environment, which carries stdout and stderr; then from
here a line with the number of each signal; from the server one line, the worker's wait status, when it has ended.
"""

import array
import json
import os
import signal
import socket
import sys


def main(path: str) -> int:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.connect(path)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: server.sendall(b"%d\n" % number))
    request = json.dumps(dict(os.environ)).encode() + b"\n"
    outputs = array.array("i", [1, 2]).tobytes()
    sent = server.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, outputs)])
    server.sendall(request[sent:])
    answer = b""
    while not answer.endswith(b"\n"):
        part = server.recv(64)
        if not part:
            print("the worker server of this agent is gone", file=sys.stderr)
            return 1
        answer += part
    code = os.waitstatus_to_exitcode(int(answer))
    if code < 0:  # ended by a signal: so is this, and the agent says which
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
