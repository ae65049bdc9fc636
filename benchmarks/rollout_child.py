"""vLLM in a process of its own environment, for rollout.py: the raw side, and updates in-process.

    .venv-rollout/bin/python benchmarks/rollout_child.py job.json

A line of JSON on standard input is a question, a line on standard output its answer; the first
answer, which nobody asks for, says that the engine is there. It ends with its standard input.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from nemo_selfpref.rollout.serving.engine_spec import EngineSpec

Facts = dict[str, Any]


class Raw:
    """`LLM.generate` with the settings that a server's engine has, and nothing of ours."""

    def __init__(self, spec: EngineSpec) -> None:
        os.environ.update(
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            # One process, as an engine of ours without a GPU: on few cores that is the faster way.
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_LOGGING_LEVEL="WARNING",
        )
        import vllm

        self.vllm, self.seed = vllm, spec.seed
        self.llm = vllm.LLM(
            model=spec.model,
            skip_tokenizer_init=True,
            dtype=spec.dtype,
            seed=spec.seed,
            max_model_len=spec.max_length,
            max_num_seqs=spec.max_num_seqs,
            enforce_eager=True,
            enable_prefix_caching=spec.enable_prefix_caching,
            kv_cache_memory_bytes=spec.kv_cache_bytes,
            disable_log_stats=True,
            distributed_executor_backend="uni",
        )

    def about(self) -> Facts:
        return {"vllm": self.vllm.__version__}

    def answer(self, question: Facts) -> Facts:
        """Answers to prompts, all given at once. plain: without log-probs and own seeds."""
        own = {} if question["plain"] else {"logprobs": 0}
        params = [
            self.vllm.SamplingParams(
                **question["params"],
                **own,
                seed=None if question["plain"] else seed,
                ignore_eos=True,
                detokenize=False,
            )
            for seed in question["seeds"]
        ]
        prompts = [{"prompt_token_ids": ids} for ids in question["prompts"]]
        started = time.perf_counter()
        found = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "answers": [list(o.outputs[0].token_ids) for o in found]}


class Updates:
    """Weights written to a folder and taken in by a backend of this process."""

    def __init__(self, spec: EngineSpec) -> None:
        from safetensors.torch import load_file

        from nemo_selfpref.rollout.serving.vllm_backend import VLLMBackend

        self.backend, self.root = VLLMBackend(spec), Path(spec.weights_dir)
        self.tensors: Facts = {}
        for path in sorted(Path(spec.model).glob("*.safetensors")):
            self.tensors |= load_file(path)
        self.version = 0

    def about(self) -> Facts:
        return self.backend.info().versions

    def answer(self, question: Facts) -> Facts:
        """The seconds of one hand-over; the model's own weights, with the trainer's probe."""
        from nemo_selfpref.rollout.serving.manifest import write_weights
        from nemo_selfpref.rollout.serving.wire import FolderSource, Probe, WeightsCall
        from nemo_selfpref.types import WeightSet

        self.version += 1
        folder, probe = self.root / str(self.version), Probe.model_validate(question["probe"])
        started = time.perf_counter()
        manifest = write_weights(
            folder,
            self.tensors.items(),
            weight_set=WeightSet.POLICY,
            version=self.version,
            run="benchmark",
            probe=probe,
        )
        written = time.perf_counter()
        source = FolderSource(folder=str(folder))
        report = self.backend.update(WeightsCall(manifest=manifest, source=source))
        ended = time.perf_counter()
        shutil.rmtree(self.root / str(self.version - 1), ignore_errors=True)
        return {
            "seconds": ended - started,
            "write": written - started,
            "update": ended - written,
            **report.model_dump(include={"verify_s", "load_s", "probe_s", "wait_s"}),
        }


def main() -> None:
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)  # whatever else is printed is for the log

        def say(what: Facts) -> None:
            replies.write(json.dumps(what) + "\n")
            replies.flush()

        job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
        spec = EngineSpec.model_validate(job["spec"])
        side = {"raw": Raw, "updates": Updates}[job["side"]](spec)
        say(side.about())
        for line in sys.stdin:
            say(side.answer(json.loads(line)))


if __name__ == "__main__":
    main()
