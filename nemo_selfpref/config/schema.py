"""The configuration, typed. Every default has its one home here; YAML files say only what differs.

Groups carry the names NeMo users know: trainer, exp_manager, model, data, rollout, algorithm.
Algorithm settings are dataclasses registered next to their algorithm (see algorithms/base.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from nemo_selfpref.config.model_schema import ModelConfig


class Accelerator(Enum):
    auto = "auto"
    cpu = "cpu"
    gpu = "gpu"


class NonFinite(Enum):
    """What becomes of a step whose loss or gradient is not finite."""

    skip = "skip"
    """It is left out: nothing changes, the run goes on."""
    halt = "halt"
    """It ends the run."""


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"


class RefMode(Enum):
    """Which weights the reference is."""

    frozen = "frozen"
    """The weights the run (or its preparation) started from."""
    fix = "frozen"  # noqa: PIE796 (the SAPO paper's word for it)
    policy = "policy"
    """The policy as it was at the last move, every ref_every steps."""
    ema = "ema"
    """The moving average of the policy as it was at the last move."""
    last = "last"
    """The policy as it was when this iteration began."""
    none = "none"

    @property
    def moves(self) -> bool:
        """Whether the reference is taken anew during a training stage."""
        return self in (RefMode.policy, RefMode.ema)


class DropReason(Enum):
    bad_row = "bad_row"
    unknown_field = "unknown_field"
    empty_prompt = "empty_prompt"
    empty_response = "empty_response"
    identical_pair = "identical_pair"
    tied_pair = "tied_pair"
    prompt_too_long = "prompt_too_long"
    too_long = "too_long"


class RowFormat(Enum):
    auto = "auto"
    trl = "trl"
    nemo_rl = "nemo_rl"
    aligner = "aligner"
    spin = "spin"
    alpaca = "alpaca"
    dolly = "dolly"


@dataclass
class TrainerConfig:
    devices: int = 1
    """Processes per node; each drives one GPU, or one CPU process where there is none."""
    num_nodes: int = 1
    accelerator: Accelerator = Accelerator.auto
    precision: Precision = Precision.fp32
    """fp32, or bf16 weights with float32 master weights, log-probs and losses."""
    max_epochs: int = 1
    max_steps: int = -1
    """Stop a training stage after this many optimizer steps; -1 for whole epochs."""
    gradient_clip_val: float = 1.0
    """Clip the global gradient norm to this; 0 switches clipping off."""
    nonfinite: NonFinite = NonFinite.skip
    """A step whose loss or gradient is not finite is skipped, or ends the run. One bad row should
    not cost a long run, and max_nonfinite_steps ends one that has really diverged."""
    max_nonfinite_steps: int = 3
    """Steps in a row that may be skipped; one more ends the run."""
    log_every_n_steps: int = 10
    enable_progress_bar: bool = True


class MonitorMode(Enum):
    min = "min"
    max = "max"


class DamagedCheckpoint(Enum):
    previous = "previous"
    """Put it aside under another name, and go on from the newest whole one before it."""
    refuse = "refuse"


@dataclass
class CheckpointParams:
    every_n_train_steps: int = 0
    """Save within a training stage every so many steps; 0 saves at the end of each stage only."""
    save_top_k: int = 2
    """How many of a stage's newest checkpoints to keep; -1 keeps all."""
    monitor: str | None = None
    """A metric of metrics.jsonl; the checkpoints with its best values are kept besides."""
    mode: MonitorMode = MonitorMode.min
    """Whether the lowest or the highest value of `monitor` is the best."""
    save_best_k: int = 1
    """How many of the best to keep, where `monitor` is set."""
    async_save: bool = True
    """Write while training goes on; the step that saves only copies the state to memory."""
    failed_saves_allowed: int = 2
    """Saves in a row that may fail (a full disk) before the run stops; each is told of."""
    on_damaged: DamagedCheckpoint = DamagedCheckpoint.previous
    """What a resumed run does where its newest checkpoint is damaged."""


@dataclass
class HeartbeatConfig:
    """Finding ranks that hang (monitor/heartbeat.py)."""

    every_s: float = 10.0
    """Seconds between two beats of a rank: a small file each in RUN/heartbeat."""
    slow_after_s: float = 120.0
    """Name a rank that stood still for so long, and go on."""
    hang_timeout_s: float = 1800.0
    """Name it, and end all ranks with exit status 76, once it stood still for so long; 0 switches
    all of it off. Longer than what can take long without a sign of life and be well (reading or
    writing the largest checkpoint, an export); a false alarm costs the steps since the last
    checkpoint, a late one idle devices only."""


@dataclass
class ExpManagerConfig:
    exp_dir: str = "runs"
    name: str = "${name}"
    resume_if_exists: bool = True
    """Continue the run found in exp_dir/name; false refuses to touch an existing run."""
    create_tensorboard_logger: bool = True
    checkpoint_callback_params: CheckpointParams = field(default_factory=CheckpointParams)
    heartbeat: HeartbeatConfig = field(default_factory=HeartbeatConfig)


@dataclass
class DataConfig:
    train_path: list[str] = MISSING
    format: RowFormat = RowFormat.auto
    columns: dict[str, str] = field(default_factory=dict)
    """Rename fields of the file before its format is read: {"their_name": "our_name"}."""
    ignore_fields: list[str] = field(default_factory=list)
    """Fields of the file that carry nothing we need; any other unknown field is an error."""
    drop: list[DropReason] = field(default_factory=list)
    """Row faults that are dropped and counted; every other fault stops the run."""
    max_length: int = 2048
    """Longest prompt + response, in tokens."""
    max_prompt_length: int = 1792
    system_prompt: str | None = None
    limit: int | None = None
    """Use only the first rows."""
    shuffle: bool = True


class RolloutEngineName(Enum):
    embedded = "embedded"
    """In the trainer, on its own weights."""
    vllm = "vllm"
    """vLLM in processes and an environment of its own."""


class Placement(Enum):
    """Where engines run, and how many sets of weights each holds."""

    colocated = "colocated"
    """One engine a set of weights, on the trainer's devices; on a GPU it sleeps while the trainer
    works."""
    disaggregated = "disaggregated"
    """One engine a set of weights, on devices of its own."""
    shared = "shared"
    """One engine for all sets; they are swapped in as they are asked for."""


class StaleSamples(Enum):
    refuse = "refuse"
    count = "count"


class ServedSet(Enum):
    policy = "policy"
    ema = "ema"
    frozen = "frozen"


class WeightTransport(Enum):
    folder = "folder"
    """Files in shared memory, or in a folder that trainer and engines both see."""
    nccl = "nccl"
    """Broadcast from GPU to GPU, across nodes."""
    gloo = "gloo"
    """Broadcast over the network from CPU to CPU."""


@dataclass
class VLLMConfig:
    """Rollout servers with vLLM: those at `urls`, or one that the run starts on this machine."""

    urls: list[str] = field(default_factory=list)
    """Servers that run already (selfpref serve); empty starts one beside the trainer."""
    token_file: str | None = None
    """File with the bearer token, mode 0600; null makes one in the run's folder."""
    host: str = "127.0.0.1"
    """Address a started server listens on."""
    port: int = 0
    """Its port; 0 takes any free one."""
    python: str = ".venv-rollout/bin/python"
    """Interpreter of the environment with vLLM."""
    also_serve: list[ServedSet] = field(default_factory=list)
    """Sets of weights to hold beside those the method asks, kept as new as they are, for people to
    talk to while the run trains."""
    engines_per_set: int = 1
    devices: list[str] = field(default_factory=list)
    """CUDA_VISIBLE_DEVICES of each engine, one entry an engine; empty leaves it as it is."""
    tensor_parallel_size: int = 1
    max_num_seqs: int = 256
    gpu_memory_utilization: float = 0.9
    kv_cache_gb: float | None = None
    """Memory of the key-value cache; null: what vLLM takes on a GPU, 1 GB on a CPU."""
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    transport: WeightTransport = WeightTransport.folder
    weights_dir: str | None = None
    """Where new weights are put; null: a folder of the run's own in /dev/shm."""
    probe_tolerance: float | None = None
    """Largest difference of a token's log-prob between trainer and engine on a fixed text, after
    new weights were loaded; null: 1e-3 in float32, 0.1 in bf16."""
    start_timeout_s: float = 600.0
    sync_timeout_s: float = 600.0
    health_every_s: float = 2.0
    suspect_after: int = 3
    """Failed probes in a row after which an engine gets no more work and is restarted."""
    max_restarts: int = 3
    """How often one engine may be started again in a run."""
    min_engines: int = 1
    """Fewer engines of a set than this stop the run, with everything saved."""


@dataclass
class RolloutConfig:
    engine: RolloutEngineName = RolloutEngineName.embedded
    placement: Placement = Placement.colocated
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    timeout_s: float = 3600.0
    """How long one batch of answers is waited for."""
    max_staleness: int = 0
    """Answers may be sampled with weights this many optimizer steps old, while the trainer works
    on earlier ones; 0 is strictly on-policy."""
    stale_samples: StaleSamples = StaleSamples.refuse
    """What becomes of older ones, kept by a checkpoint: made anew, or counted and used."""
    check_samples: int = 8
    """Answers a step whose log-probs the trainer computes again, to compare; 0 switches it off."""
    logprob_alarm: float = 0.05
    """Warn where they differ by more than this, in the mean over tokens."""
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    max_new_tokens: int = 512
    batch_size: int = 64
    """Sequences that one replica decodes together."""
    save_every: int = 4096
    """Answers or judgements of a stage that are kept as they come; an interruption loses no more
    of them than these. Answers are decoded together within such a part, so another number may
    change their last bits."""


@dataclass
class AlgorithmConfig:
    """Base of every algorithm's settings; `name` picks the algorithm."""

    name: str = MISSING


@dataclass
class ExportConfig:
    hf: bool = True
    """Write the final weights as a Hugging Face folder, RUN/hf."""
    verify: bool = True
    """Reload the folder with transformers and compare logits with the trained model."""


@dataclass
class RunConfig:
    name: str = MISSING
    seed: int = 1234
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
