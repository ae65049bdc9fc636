"""The server that trainers and OpenAI clients talk to, in front of engines that it starts and
watches:

    python -m nemo_selfpref.rollout.serving.front_process SPEC.json

Once all engines answer it writes {"port", "pid"} to the spec's ready_file. It ends, and its engines
with it, when its standard input does.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from nemo_selfpref.data.tokenizer import ChatTokenizer, load_tokenizer
from nemo_selfpref.errors import ConfigError, SelfPrefError
from nemo_selfpref.files import write_text
from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving.app import create_app, in_thread
from nemo_selfpref.rollout.serving.auth import read_token
from nemo_selfpref.rollout.serving.backend import Backend
from nemo_selfpref.rollout.serving.engine_process import serve
from nemo_selfpref.rollout.serving.fleet import Fleet, LocalMember
from nemo_selfpref.rollout.serving.front_spec import FrontSpec
from nemo_selfpref.rollout.serving.openai_routes import openai_routes
from nemo_selfpref.rollout.serving.plan import exposure_warning, refuse_insecure_environment
from nemo_selfpref.rollout.serving.receiver import receive
from nemo_selfpref.rollout.serving.wire import (
    CompletionRecord,
    FolderSource,
    GenerateCall,
    GroupSource,
    Health,
    Info,
    LabelRecord,
    LabelsCall,
    UpdateReport,
    WeightsCall,
)
from nemo_selfpref.types import WeightSet


class Front:
    """A Backend that also takes weights over the network: they are put into a folder first. A set's
    latest folder and the one before it are kept: an engine may have to load them again."""

    def __init__(self, backend: Backend, weights_dir: Path) -> None:
        self.backend, self.weights_dir = backend, weights_dir
        self._received: dict[WeightSet, list[Path]] = {}
        self._confirmed: dict[WeightSet, Path] = {}
        self._updates = threading.Lock()

    def info(self) -> Info:
        return self.backend.info()

    def health(self) -> Health:
        return self.backend.health()

    def check(self, call: GenerateCall | LabelsCall) -> None:
        self.backend.check(call)

    def generate(
        self, call: GenerateCall, emit: Callable[[CompletionRecord], None], until: Until
    ) -> None:
        self.backend.generate(call, emit, until)

    def label_scores(
        self, call: LabelsCall, emit: Callable[[LabelRecord], None], until: Until
    ) -> None:
        self.backend.label_scores(call, emit, until)

    def update(self, call: WeightsCall) -> UpdateReport:
        """See Backend.update."""
        if not isinstance(call.source, GroupSource):
            return self.backend.update(call)
        with self._updates:
            got = receive(call, self.weights_dir)
            assert isinstance(got.source, FolderSource)
            folder = Path(got.source.folder)
            # Kept after a failure too: an engine that had taken it is on its way back.
            received = self._received.setdefault(call.manifest.weight_set, [])
            received.append(folder)
            report = self.backend.update(got)
            before, self._confirmed[call.manifest.weight_set] = (
                self._confirmed.get(call.manifest.weight_set),
                folder,
            )
            kept = [old for old in received if old in (before, folder)]
            _delete([old for old in received if old not in kept])
            received[:] = kept
            return report

    def sleep(self) -> None:
        self.backend.sleep()

    def wake(self) -> None:
        self.backend.wake()

    def close(self) -> None:
        self.backend.close()
        for folders in self._received.values():
            _delete(folders)


def _delete(folders: Sequence[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def front_app(
    backend: Backend, token: str, tokenizer: ChatTokenizer, table: Callable[[], Any], **more: Any
) -> FastAPI:
    """The app of a front: the routes of every server, OpenAI's, and /rollout/fleet, a row for each
    engine."""

    def extend(app: FastAPI) -> None:
        openai_routes(backend, tokenizer)(app)

        @app.get("/rollout/fleet")
        async def fleet() -> Any:
            return await in_thread(table)

    return create_app(backend, token, extend=extend, **more)


def run(spec: FrontSpec) -> None:
    """Start the engines and answer until told to end.

    Raises:
        RolloutError, ConfigError, DataError: an engine, the token or the tokenizer cannot be used.
    """
    refuse_insecure_environment()
    token = read_token(Path(spec.token_file))
    tokenizer = load_tokenizer(spec.tokenizer.config())
    _check_tokenizer(spec, tokenizer)
    folder, settings = Path(spec.folder), spec.fleet.settings()
    members = [
        LocalMember(e.name, e.spec, spec.python, folder, token, e.devices) for e in spec.engines
    ]
    fleet = Fleet(members, settings, _say)
    try:
        fleet.start(Until.within(settings.start_timeout_s, _watch_stdin().is_set))
        front = Front(fleet, Path(spec.weights_dir))
        if warning := exposure_warning(spec.host):
            _say(warning)

        def ready(port: int) -> None:
            write_text(Path(spec.ready_file), json.dumps({"port": port, "pid": os.getpid()}))

        try:
            serve(front_app(front, token, tokenizer, fleet.table), spec.host, spec.port, ready)
        finally:
            front.close()
    finally:
        fleet.close()
        if spec.delete_weights:
            shutil.rmtree(spec.weights_dir, ignore_errors=True)


def _check_tokenizer(spec: FrontSpec, tokenizer: ChatTokenizer) -> None:
    """Raise ConfigError where text would become other tokens than the engines' weights know."""
    own = tokenizer.fingerprint()
    for engine in spec.engines:
        if engine.spec.tokenizer_sha256 != own:
            raise ConfigError(
                f"the tokenizer in {spec.tokenizer.folder} ({own[:12]}) is not the one that "
                f"{engine.name} is for ({engine.spec.tokenizer_sha256[:12]})"
            )


def _say(line: str) -> None:
    sys.stderr.write(f"front: {line}\n")
    sys.stderr.flush()


def _watch_stdin() -> threading.Event:
    """Set once whoever started this process is gone, while engines are still starting."""
    ended = threading.Event()

    def watch() -> None:
        while os.read(0, 4096):
            pass
        ended.set()

    threading.Thread(target=watch, daemon=True).start()
    return ended


def _leave(number: int, _: object) -> None:
    sys.exit(128 + number)  # unwinds: the engines are ended on the way


def main() -> int:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # asks a job's ranks to stop; they end us
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _leave)
    try:
        run(FrontSpec.model_validate_json(Path(sys.argv[1]).read_bytes()))
    except SelfPrefError as error:
        _say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
