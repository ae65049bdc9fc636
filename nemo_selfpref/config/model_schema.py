"""Settings of the group `model`: weights, shape, layout, precision, adapters, optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class AttentionBackend(Enum):
    """What computes attention. Each gives the same numbers up to rounding."""

    auto = "auto"
    """sdpa on a CPU; on CUDA flex where prompts are shared or the context is split, else sdpa."""
    sdpa = "sdpa"
    """torch's scaled_dot_product_attention over runs of like length."""
    flex = "flex"
    """FlexAttention over the packed tokens with a block mask."""


class Fp8Fallback(Enum):
    """What to do once FP8's error is too large for the margins."""

    bf16 = "bf16"
    """Go on without FP8."""
    warn = "warn"
    stop = "stop"


class Fp8Recipe(Enum):
    """How FP8 numbers are scaled (Transformer Engine)."""

    delayed = "delayed"
    """By the history of maxima. It has a state: the same weights give other log-probs later, so a
    reference is not quite the policy at step 0."""
    tensorwise = "tensorwise"
    blockwise = "blockwise"


class LogprobBackend(Enum):
    """What computes the element-wise part of the log-prob head; products are torch's."""

    auto = "auto"
    """triton on CUDA where it can be imported, else torch."""
    torch = "torch"
    triton = "triton"


class Recompute(Enum):
    """What of the activations is computed again in the backward pass."""

    none = "none"
    selective = "selective"
    """The attention alone."""
    full = "full"
    """Whole layers, recompute_num_layers at a time."""


class OptimizerName(Enum):
    adamw = "adamw"
    rmsprop = "rmsprop"


class Scheduler(Enum):
    constant = "constant"
    CosineAnnealing = "CosineAnnealing"
    LinearAnnealing = "LinearAnnealing"
    InverseSquareRoot = "InverseSquareRoot"


class TokenizerLibrary(Enum):
    auto = "auto"
    huggingface = "huggingface"
    sentencepiece = "sentencepiece"


@dataclass
class RopeScalingConfig:
    rope_type: str = "default"
    """default, linear or llama3."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass
class ArchitectureConfig:
    """Shape of a model, in Megatron's words. Read from the Hugging Face folder or the
    checkpoint when one is given; written out (num_layers and the rest all positive) only to train a
    model from random weights."""

    num_layers: int = 0
    hidden_size: int = 0
    ffn_hidden_size: int = 0
    num_attention_heads: int = 0
    num_query_groups: int = 0
    kv_channels: int = 0
    vocab_size: int = 0
    max_position_embeddings: int = 2048
    rotary_base: float = 10000.0
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    layernorm_epsilon: float = 1e-5
    share_embeddings_and_output_weights: bool = False
    init_method_std: float = 0.02
    num_moe_experts: int = 0
    """Experts of every layer, each ffn_hidden_size wide; 0 for a dense model."""
    moe_router_topk: int = 2
    """Experts that a token goes to."""
    moe_router_pre_softmax: bool = False
    """Weigh a token's experts by a softmax over all experts, so that their weights sum to less than
    one, and not by one over these alone (Mixtral's)."""
    add_qkv_bias: bool = False
    """Biases on query, key and value (Qwen2's)."""
    qk_layernorm: bool = False
    """RMSNorm of every query and key head (Qwen3's)."""
    family: str | None = None
    """Hugging Face model_type of an export, where the parts above do not tell it ("mistral", whose
    network is Llama's); null for the first that has these parts."""


@dataclass
class SchedulerConfig:
    name: Scheduler = Scheduler.CosineAnnealing
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    """Warm-up as a share of the stage's steps; used when warmup_steps is 0."""
    min_lr: float = 0.0


@dataclass
class OptimConfig:
    name: OptimizerName = OptimizerName.adamw
    lr: float = 5e-7
    weight_decay: float = 0.0
    """adamw takes it off the weights, rmsprop adds it to the clipped gradient (torch's own rules);
    norms do not decay."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """adamw's smoothing constants; rmsprop has none."""
    alpha: float = 0.99
    """rmsprop's smoothing constant; adamw has none."""
    eps: float = 1e-8
    sched: SchedulerConfig = field(default_factory=SchedulerConfig)


@dataclass
class TokenizerConfig:
    library: TokenizerLibrary = TokenizerLibrary.auto
    path: str | None = None
    """Folder of a Hugging Face tokenizer or a sentencepiece .model file; by default the tokenizer
    that lies beside the weights of restore_from_path."""
    chat_template: str | None = None
    """A jinja file that replaces the tokenizer's own chat template."""


@dataclass
class LoRAConfig:
    """Low-rank adapters: y = W x + (alpha / rank) B A x with W frozen. There is no dropout: policy
    and reference would differ before the first step."""

    rank: int = 0
    """Width of the adapters; 0 trains all weights and has none."""
    alpha: float = 32.0
    target_modules: list[str] = field(
        default_factory=lambda: ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    )
    """Which linear layers have one, of those four (Megatron's names), in every layer."""


@dataclass
class ModelConfig:
    restore_from_path: str | None = None
    """A Hugging Face folder or a checkpoint of ours. Null starts from random weights of the shape
    in `architecture`."""
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    """Parts that each pipeline stage's layers are cut into (the interleaved schedule); null for
    one."""
    context_parallel_size: int = 1
    """Ranks that split the tokens of one micro-batch."""
    expert_model_parallel_size: int = 1
    """Ranks of one pipeline stage, whatever else they split, that share out its experts."""
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False
    """Split optimizer state and main weights over the replicas."""
    copies_on_cpu: bool = False
    """Keep the frozen, averaged and lagged copies of the weights in the CPU's memory."""
    recompute_granularity: Recompute = Recompute.none
    recompute_num_layers: int = 1
    transformer_engine: bool | None = None
    """Build the layers from Transformer Engine's; null does where it is installed, in bf16 and
    without adapters."""
    fp8_recipe: Fp8Recipe | None = None
    """Multiply in FP8 in training and scoring; sampling stays in bf16. Needs Transformer Engine."""
    first_last_layers_bf16: bool = False
    """Leave the first and the last layer out of FP8."""
    fp8_max_noise: float = 0.5
    """Largest share of the median margin |h| that FP8's error of it may be (root mean square over
    the rows of a step) before fp8_fallback is followed."""
    fp8_check_every: int = 50
    """Steps from one such check to the next."""
    fp8_fallback: Fp8Fallback = Fp8Fallback.bf16
    attention_backend: AttentionBackend = AttentionBackend.auto
    micro_batch_size: int = 4
    """Rows (pairs or demonstrations) in one forward and backward pass of one replica."""
    micro_batch_tokens: int | None = None
    """Pack rows by length instead, as many as that many tokens hold; micro_batch_size is then not
    used."""
    share_prompts: bool = False
    """Compute a prompt once for all answers to it in a micro-batch."""
    global_batch_size: int = 64
    """Rows in one optimizer step, over all replicas."""
    logprob_chunk_size: int = 1024
    """Tokens whose logits exist at one time in the log-prob head."""
    logprob_backend: LogprobBackend = LogprobBackend.auto
    reference_cache_dir: str | None = None
    """Folder that keeps log-probs of reference passes for later steps, stages and runs, which may
    share it; null keeps none."""
    reference_cache_max_gb: float = 0.0
    """GiB that folder may take; the oldest of its files go first. 0 for no bound."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
