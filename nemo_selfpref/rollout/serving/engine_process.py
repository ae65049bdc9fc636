"""One engine as a process of its own, in vLLM's environment:

    python -m nemo_selfpref.rollout.serving.engine_process SPEC.json

Once it answers it writes {"port", "pid"} to the spec's ready_file. It ends when its standard input
does, so that it does not outlive who started it, however that one ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from nemo_selfpref.errors import SelfPrefError
from nemo_selfpref.files import write_text
from nemo_selfpref.rollout.serving.app import create_app
from nemo_selfpref.rollout.serving.auth import read_token
from nemo_selfpref.rollout.serving.engine_spec import EngineSpec


def serve(app: FastAPI, host: str, port: int, ready: Callable[[int], None]) -> None:
    """Answer until the process is told to end or its standard input does; `ready` is given the
    port, once questions are answered there."""
    with socket.create_server((host, port)) as listener:
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=2
        )
        server = uvicorn.Server(config)
        threading.Thread(target=_end_with_stdin, args=(server,), daemon=True).start()
        ready(listener.getsockname()[1])
        server.run(sockets=[listener])


def _end_with_stdin(server: uvicorn.Server) -> None:
    while os.read(0, 4096):
        pass
    server.should_exit = True


def main() -> int:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # asks a job's ranks to stop; they end us
    try:
        spec = EngineSpec.model_validate_json(Path(sys.argv[1]).read_bytes())
        token = read_token(Path(spec.token_file))
        from nemo_selfpref.rollout.serving.vllm_backend import VLLMBackend

        backend = VLLMBackend(spec)

        def ready(port: int) -> None:
            write_text(Path(spec.ready_file), json.dumps({"port": port, "pid": os.getpid()}))

        serve(create_app(backend, token), spec.host, spec.port, ready)
        backend.close()
    except SelfPrefError as error:
        sys.stderr.write(f"engine: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
