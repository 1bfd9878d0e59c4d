"""A process that has imported everything and stands for a machine with a GPU: each command that is
handed to it runs in a fork. Starting them from nothing would take minutes.

    python server.py SOCKET FOLDER
"""

import array
import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import device  # noqa: E402
import torch  # noqa: E402

from fusedmlp.bench import cli  # noqa: E402
from fusedmlp.bench.campaign import worker  # noqa: E402

# As it would be in a process of its own: the name under which a command runs its module again.
worker.__spec__ = importlib.util.find_spec("fusedmlp.bench.campaign.worker")


def receive(client):
    size = array.array("i").itemsize
    _, parts, _, _ = client.recvmsg(1, socket.CMSG_LEN(2 * size))
    descriptors = array.array("i", parts[0][2][: 2 * size])
    text = b""
    while not text.endswith(b"\n"):
        text += client.recv(1 << 16)
    return json.loads(text), descriptors


def run(client):
    """In the fork: the command, its exit code to the client, and the end."""
    task, (out, err) = receive(client)
    os.dup2(out, 1)
    os.dup2(err, 2)
    # Whoever handed the command over was killed: so is this.
    threading.Thread(target=lambda: (client.recv(1), os._exit(137)), daemon=True).start()
    os.environ.clear()
    os.environ.update(task["env"], PATH=os.environ_path)
    os.chdir(task["cwd"])
    _, module, *argv = task["argv"]
    device.FAULTS.choose([module, *argv])
    code = 1
    try:
        code = cli.main(argv) if module == "fusedmlp.bench" else worker.main(argv)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(OSError):
        client.sendall(bytes([code]))
    os._exit(code)


def main(path, folder):
    torch.set_num_threads(1)
    # What several commands import late.
    for name in ("torch._dynamo", "torch._inductor.compile_fx"):
        importlib.import_module(name)
    device.install(Path(folder))
    os.environ_path = os.environ["PATH"]
    cli.parser()  # imports every command
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(path)
        server.listen(64)
        print("ready", flush=True)
        while True:
            client, _ = server.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                server.close()
                run(client)
            client.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
