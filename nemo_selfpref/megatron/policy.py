"""The network of a run: built, loaded, trained a step, and asked for log-probs.

This is the one object that knows both megatron-core's schedules and our packed batches. It knows
no algorithm: a loss arrives as an Objective.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor

from nemo_selfpref.config.model_schema import (
    ArchitectureConfig,
    AttentionBackend,
    Fp8Recipe,
    ModelConfig,
)
from nemo_selfpref.config.schema import Precision
from nemo_selfpref.data.batching import PackedBatch, TokenSequence
from nemo_selfpref.data.packing import PackingRule
from nemo_selfpref.data.spans import ContextSlices
from nemo_selfpref.megatron.attention_layout import attention_layout
from nemo_selfpref.megatron.cpu_shim import device_scope
from nemo_selfpref.megatron.gpt import Network, PackedGPTModel, build_model, parts_of
from nemo_selfpref.megatron.nonfinite import (
    Fault,
    Trial,
    find_fault,
    finite_output,
    finite_step,
    nonfinite_weights,
)
from nemo_selfpref.megatron.parallel import (
    Layout,
    all_gather_json,
    context_group,
    pipeline_group,
    replica_group,
    tensor_group,
)
from nemo_selfpref.megatron.platform import Platform, check_platform
from nemo_selfpref.megatron.scoring import SequenceLogps, score
from nemo_selfpref.objectives.inputs import StepInputs
from nemo_selfpref.objectives.logprobs import sum_by_sequence, token_logprobs
from nemo_selfpref.objectives.objective import Objective, PairLogps, Pass

_FP8_ROWS = {
    None: 1,
    Fp8Recipe.delayed: 16,
    Fp8Recipe.tensorwise: 16,
    Fp8Recipe.blockwise: 128,
}
"""Tokens on a rank have to be a multiple of this."""


class Policy:
    """This rank's part of the trained model.

    weight_version counts optimizer steps since the run's first weights; rollouts carry it.
    """

    def __init__(
        self,
        arch: ArchitectureConfig,
        config: ModelConfig,
        precision: Precision,
        platform: Platform,
        layout: Layout,
    ) -> None:
        self.arch, self.config, self.precision = arch, config, precision
        self.platform, self.layout = platform, layout
        check_platform(config, precision, platform)
        self.weight_version = 0
        self._last_outputs: list[dict[str, Tensor]] = []
        self.module: Network = build_model(arch, config, precision, platform, layout)
        self.parts = parts_of(self.module)
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=config.use_distributed_optimizer
        )
        with device_scope():
            self.ddp: list[Any] = [  # its `buffers` is a list, not the method of a module
                DistributedDataParallel(part.config, ddp_config, part) for part in self.parts
            ]
        self.module.config.finalize_model_grads_func = partial(finalize_model_grads)

    @property
    def pad_multiple(self) -> int:
        """Packed tokens of a micro-batch are padded to a multiple of this: sequence and context
        parallelism cut them evenly, and FP8 wants whole blocks."""
        tensor = self.layout.tensor_size if self.config.sequence_parallel else 1
        context = self.layout.context_size
        return tensor * (2 * context if context > 1 else 1) * _FP8_ROWS[self.config.fp8_recipe]

    @property
    def in_fp8(self) -> bool:
        return self.module.config.fp8 is not None

    @contextlib.contextmanager
    def without_fp8(self) -> Iterator[None]:
        """Multiply in bfloat16 inside the block."""
        kept = self.module.config.fp8
        self.module.config.fp8 = None
        try:
            yield
        finally:
            self.module.config.fp8 = kept

    def leave_fp8(self) -> None:
        """Multiply in bfloat16 from now on."""
        self.module.config.fp8 = None

    def packing_rule(self, micro_batch_size: int) -> PackingRule:
        """How rows become this policy's micro-batches."""
        return PackingRule(
            micro_batch_size=micro_batch_size,
            micro_batch_tokens=self.config.micro_batch_tokens,
            share_prompts=self.config.share_prompts,
            pad_multiple=self.pad_multiple,
            # An interleaved schedule wants a multiple of the stages.
            count_multiple=self.layout.pipeline_size if self.layout.virtual_size > 1 else 1,
        )

    @property
    def head(self) -> PackedGPTModel:
        """The part with the output projection; last pipeline stage only."""
        return self.parts[-1]

    def sharded_state_dict(self) -> dict[str, Any]:
        """megatron-core's description of this rank's weights, one key a layer."""
        return self.module.sharded_state_dict(metadata={"non_homogeneous_layers": True})

    def train_batch(
        self,
        batches: Sequence[PackedBatch],
        objective: Objective,
        inputs: StepInputs,
    ) -> dict[str, float]:
        """Forward and backward over one global batch; leaves gradients for the optimizer.

        The batches' row numbers count the rows of `inputs`. Returns the metrics of the whole global
        batch, equal on every rank. Gradients are those of sum(loss) / sum(weight) over it. Neither
        need be finite: ask `finite_step` before an optimizer uses them.
        """
        self.module.train()
        self.clear_gradients()
        step = partial(self.train_step, objective=objective, inputs=inputs)
        outputs = self.run_schedule(step, batches, list(self.ddp), forward_only=False)
        self._last_outputs = outputs
        return self._reduce_metrics(outputs)

    def finite_step(self, metrics: Mapping[str, float]) -> bool:
        """Whether the metrics and the global gradient that train_batch left are finite. Collective,
        and the same answer on every rank."""
        return finite_step(self, metrics)

    def nonfinite_batches(self) -> list[int]:
        """Micro-batches of this rank whose loss or metrics in the last train_batch were not
        finite; the last pipeline stage alone knows."""
        return [n for n, output in enumerate(self._last_outputs) if not finite_output(output)]

    def find_fault(self, trial: Trial) -> Fault:
        """Why the last train_batch was not finite. Collective; the gradients are gone after."""
        return find_fault(self, trial)

    def nonfinite_weights(self) -> list[str]:
        """Names, as in a checkpoint, of weights with values that are not finite, over all ranks.
        Collective; one pass over the weights."""
        return nonfinite_weights(self)

    def run_schedule(
        self,
        step: Callable[..., Any],
        batches: Sequence[PackedBatch],
        model: list[torch.nn.Module],
        forward_only: bool,
    ) -> list[dict[str, Tensor]]:
        """Megatron's forward-backward schedule over some micro-batches."""
        length = 1
        if len(model) > 1:  # the interleaved schedule passes on tensors of one size
            length = max(batch.tokens.numel() for batch in batches)
            batches = [batch.padded(length) for batch in batches]
        iterators = [iter(batches) for _ in model]
        with device_scope():
            return get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=iterators if len(model) > 1 else iterators[0],
                model=model,
                num_microbatches=len(batches),
                seq_length=length,
                micro_batch_size=1,
                forward_only=forward_only,
            )

    def clear_gradients(self) -> None:
        for part in self.ddp:
            part.zero_grad_buffer()
        # The optimizer leaves .grad aliasing the buffer; Megatron's hook would add it to itself.
        for parameter in self.module.parameters():
            parameter.grad = None

    def train_step(
        self,
        batches: Iterator[PackedBatch],
        model: torch.nn.Module,
        objective: Objective,
        inputs: StepInputs,
    ) -> tuple[Tensor, Callable[[Tensor], Any]]:
        whole = next(batches)
        batch, hidden = self.forward(model, whole)

        def loss(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            policy = self.pair_logps(hidden, batch)
            passes = {name: logps.of(batch.rows, policy) for name, logps in inputs.passes.items()}
            strength = inputs.strength[list(batch.rows)].to(policy.chosen.device)
            result = objective({Pass.POLICY: policy, **passes}, strength)
            # Megatron divides the summed gradient by the weights' sum over replicas and context
            # ranks, all of which hold the whole loss.
            scale = 1 if batch.counted else 0
            total, weight = result.loss.sum() * scale, result.weight.sum() * scale
            sums = {name: value.sum() * scale for name, value in result.metrics.items()}
            sums |= {
                "_loss": total.detach().clone(),
                "_weight": weight,
                "_rows": torch.tensor(len(batch.rows) * scale),
                "_tokens": torch.tensor(whole.num_tokens * scale),
            }
            first = int(self.layout.context_rank == 0)
            return total, (weight * first).to(torch.int), sums

        return hidden, loss

    def forward(self, model: torch.nn.Module, batch: PackedBatch) -> tuple[PackedBatch, Tensor]:
        """This rank's part of the batch, on its device, and the states of its tokens."""
        device, here = self.platform.device(), self.layout
        slices = ContextSlices(batch.tokens.numel(), here.context_size, here.context_rank)
        attention = attention_layout(
            batch.spans,
            device,
            slices=slices,
            key_group=context_group(),
            backend=self._attention_backend(batch),
        )
        mine = batch.part(slices).to(device)
        hidden = model(mine.tokens[None], mine.positions[None], None, packed_seq_params=attention)
        return mine, hidden

    def _attention_backend(self, batch: PackedBatch) -> AttentionBackend:
        chosen = self.config.attention_backend
        if chosen is not AttentionBackend.auto:
            return chosen
        masked = self.layout.context_size > 1 or any(s.context_length for s in batch.spans)
        flex = self.platform.cuda and masked
        return AttentionBackend.flex if flex else AttentionBackend.sdpa

    def response_logprobs(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """Log-prob of each target of `batch`, float32 [N]; last pipeline stage only."""
        states = self.head.full_sequence(hidden)
        return token_logprobs(
            states[batch.predict_from],
            self.head.output_weight(),
            batch.targets,
            vocab_start=self.head.vocab_start,
            chunk_size=self.config.logprob_chunk_size,
            group=tensor_group(),
            grad_sink=self.head.output_grad_sink(),
            backend=self.config.logprob_backend.value,
        )

    def pair_logps(self, hidden: Tensor, batch: PackedBatch) -> PairLogps:
        """Log-prob sums of chosen and rejected answers, over all context ranks; last pipeline
        stage only."""
        logprobs = self.response_logprobs(hidden, batch)
        is_response = batch.target_is_response
        values = torch.stack([torch.where(is_response, logprobs, 0.0), logprobs], dim=1)
        counts = torch.stack([is_response, torch.ones_like(is_response)], dim=1).long()
        sums, lengths = (
            sum_by_sequence(x, batch.target_sequence, batch.num_sequences) for x in (values, counts)
        )
        if self.layout.context_size > 1:
            group = context_group()
            # Forward sums over the ranks, backward hands each its own part.
            sums = reduce_from_tensor_model_parallel_region(sums, group=group)
            torch.distributed.all_reduce(lengths, group=group)
        rows = len(batch.rows)
        return PairLogps(
            chosen=sums[:rows, 0],
            chosen_len=lengths[:rows, 0],
            rejected=sums[rows:, 0],
            rejected_len=lengths[rows:, 0],
            full_chosen=sums[:rows, 1],
            full_chosen_len=lengths[:rows, 1],
        )

    def _reduce_metrics(self, outputs: list[dict[str, Tensor]]) -> dict[str, float]:
        mine = {
            name: float(sum(output[name].item() for output in outputs))
            for name in (outputs[0] if outputs else ())
        }
        totals = self._sum_over_replicas(mine)
        rows, weight = totals.pop("_rows"), totals.pop("_weight")
        loss, tokens = totals.pop("_loss"), totals.pop("_tokens")
        return {
            "loss": loss / weight,
            **{name: value / rows for name, value in totals.items()},
            "tokens": tokens,
        }

    def _sum_over_replicas(self, mine: Mapping[str, float]) -> dict[str, float]:
        device = self.platform.device()
        parts = all_gather_json(dict(mine), replica_group(), device)
        totals = {name: sum(part[name] for part in parts) for name in parts[0]}
        return all_gather_json(totals, pipeline_group(), device)[-1]

    def score(
        self, sequences: Sequence[TokenSequence], progress: Callable[[int], None] | None = None
    ) -> SequenceLogps:
        """Response log-probs of (prompt, response) sequences under the current weights.

        Collective over all ranks, which all get the whole result, in the order given.
        """
        return score(self, sequences, progress)
