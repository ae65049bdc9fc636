"""The network of a run: built, loaded, trained a step, and asked for log-probs.

This is the one object that knows both megatron-core's schedules and our packed batches. It knows
no algorithm: a loss arrives as an Objective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nemo_selfpref.config.schema import ArchitectureConfig, ModelConfig, Precision
from nemo_selfpref.data.batching import PackedBatch, TokenSequence, collate
from nemo_selfpref.megatron.attention import packed_attention
from nemo_selfpref.megatron.cpu_shim import device_scope
from nemo_selfpref.megatron.gpt import PackedGPTModel, build_model
from nemo_selfpref.megatron.parallel import (
    Layout,
    all_gather_json,
    pipeline_group,
    replica_group,
    tensor_group,
)
from nemo_selfpref.megatron.platform import Platform
from nemo_selfpref.objectives.inputs import StepInputs
from nemo_selfpref.objectives.logprobs import sum_by_sequence, token_logprobs
from nemo_selfpref.objectives.objective import Objective, PairLogps, Pass

_SCORE_TOKENS = 8192
"""Tokens of one forward-only micro-batch."""


@dataclass(frozen=True)
class SequenceLogps:
    """Response log-prob sums float64 [N] and lengths int64 [N] of N sequences."""

    sums: Tensor
    lengths: Tensor


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
        self.weight_version = 0
        self.module: PackedGPTModel = build_model(arch, config, precision, platform, layout)
        ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        with device_scope():
            self.ddp = DistributedDataParallel(self.module.config, ddp_config, self.module)
        self.module.config.finalize_model_grads_func = partial(finalize_model_grads)

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
        batch, equal on every rank. Gradients are those of sum(loss) / sum(weight) over it.
        """
        self.module.train()
        self._clear_gradients()
        step = partial(self._train_step, objective=objective, inputs=inputs)
        with device_scope():
            outputs = get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=iter(batches),
                model=[self.ddp],
                num_microbatches=len(batches),
                seq_length=1,
                micro_batch_size=1,
                forward_only=False,
            )
        return self._reduce_metrics(outputs)

    def _clear_gradients(self) -> None:
        self.ddp.zero_grad_buffer()
        # The optimizer leaves .grad aliasing the buffer; Megatron's hook would add it to itself.
        for parameter in self.module.parameters():
            parameter.grad = None

    def _train_step(
        self,
        batches: Iterator[PackedBatch],
        model: torch.nn.Module,
        objective: Objective,
        inputs: StepInputs,
    ) -> tuple[Tensor, Callable[[Tensor], Any]]:
        batch = next(batches).to(self.platform.device())
        hidden = self._forward(model, batch)

        def loss(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            policy = self.pair_logps(hidden, batch)
            passes = {name: logps.of(batch.rows, policy) for name, logps in inputs.passes.items()}
            strength = inputs.strength[list(batch.rows)].to(policy.chosen.device)
            result = objective({Pass.POLICY: policy, **passes}, strength)
            # Megatron divides the summed gradient by the global sum of weights.
            scale = 1 if batch.counted else 0
            total, weight = result.loss.sum() * scale, result.weight.sum() * scale
            sums = {name: value.sum() * scale for name, value in result.metrics.items()}
            sums |= {
                "_loss": total.detach().clone(),
                "_weight": weight,
                "_rows": torch.tensor(len(batch.rows) * scale),
                "_tokens": torch.tensor(batch.tokens.numel() * scale),
            }
            return total, weight.to(torch.int), sums

        return hidden, loss

    def _forward(self, model: torch.nn.Module, batch: PackedBatch) -> Tensor:
        layout = packed_attention(batch.lengths, self.platform.device())
        return model(batch.tokens[None], batch.positions[None], None, packed_seq_params=layout)

    def response_logprobs(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """Log-prob of each target of `batch`, float32 [N]; last pipeline stage only."""
        states = self.module.full_sequence(hidden)
        return token_logprobs(
            states[batch.predict_from],
            self.module.output_weight(),
            batch.targets,
            vocab_start=self.module.vocab_start,
            chunk_size=self.config.logprob_chunk_size,
            group=tensor_group(),
        )

    def pair_logps(self, hidden: Tensor, batch: PackedBatch) -> PairLogps:
        """Log-prob sums of chosen and rejected answers; last pipeline stage only."""
        logprobs = self.response_logprobs(hidden, batch)
        is_response = batch.target_is_response
        sequence, count = batch.target_sequence, batch.num_sequences
        response = sum_by_sequence(
            torch.where(is_response, logprobs, torch.zeros_like(logprobs)), sequence, count
        )
        response_len = sum_by_sequence(is_response.long(), sequence, count)
        full = sum_by_sequence(logprobs, sequence, count)
        full_len = sum_by_sequence(torch.ones_like(sequence), sequence, count)
        rows = len(batch.rows)
        return PairLogps(
            chosen=response[:rows],
            chosen_len=response_len[:rows],
            rejected=response[rows:],
            rejected_len=response_len[rows:],
            full_chosen=full[:rows],
            full_chosen_len=full_len[:rows],
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

    @torch.no_grad()
    def score(
        self, sequences: Sequence[TokenSequence], progress: Callable[[int], None] | None = None
    ) -> SequenceLogps:
        """Response log-probs of (prompt, response) sequences under the current weights.

        Collective over all ranks, which all get the whole result, in the order given.
        """
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i][0] + sequences[i][1]))
        mine = order[self.layout.data_rank :: self.layout.data_size]
        found: dict[str, list[float]] = {}
        self.module.eval()
        for numbers in _by_tokens(sequences, mine):
            found.update(self._score_batch([sequences[n] for n in numbers], numbers))
            if progress is not None:
                progress(len(numbers) * self.layout.data_size)
        device = self.platform.device()
        last = all_gather_json(found, pipeline_group(), device)[-1]
        for part in all_gather_json(last, replica_group(), device):
            found.update(part)
        values = [found[str(n)] for n in range(len(sequences))]
        return SequenceLogps(
            sums=torch.tensor([v[0] for v in values], dtype=torch.float64),
            lengths=torch.tensor([int(v[1]) for v in values], dtype=torch.int64),
        )

    def _score_batch(
        self, sequences: Sequence[TokenSequence], numbers: Sequence[int]
    ) -> dict[str, list[float]]:
        pad = self.layout.tensor_size if self.config.sequence_parallel else 1
        batch = collate(sequences, numbers, paired=False, pad_multiple=pad)
        batch = batch.to(self.platform.device())
        found: dict[str, list[float]] = {}

        def step(batches: Iterator[PackedBatch], model: torch.nn.Module) -> Any:
            batch = next(batches)

            def keep(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
                logps = self.pair_logps(hidden, batch)
                for n, value, length in zip(
                    batch.rows, logps.chosen.tolist(), logps.chosen_len.tolist(), strict=True
                ):
                    found[str(n)] = [value, length]
                return logps.chosen.sum(), logps.chosen_len.sum().to(torch.int), {}

            return self._forward(model, batch), keep

        with device_scope():
            get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=iter([batch]),
                model=[self.module],
                num_microbatches=1,
                seq_length=1,
                micro_batch_size=1,
                forward_only=True,
            )
        return found


def _by_tokens(sequences: Sequence[TokenSequence], order: Sequence[int]) -> Iterator[list[int]]:
    """Cut `order` into batches of at most _SCORE_TOKENS tokens (one sequence at least)."""
    batch: list[int] = []
    used = 0
    for number in order:
        size = len(sequences[number][0]) + len(sequences[number][1])
        if batch and used + size > _SCORE_TOKENS:
            yield batch
            batch, used = [], 0
        batch.append(number)
        used += size
    if batch:
        yield batch
