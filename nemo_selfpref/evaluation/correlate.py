"""`selfpref correlate`: does a policy favour an answer the more, the better it was rated?

The marginal of each pair against the difference of its scores, as in Table 4 of the Sr-DPO paper
(section 4.4: 200 pairs of UltraFeedback).
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor

from nemo_selfpref.algorithms.refinement import AUGMENT_SLOTS, augment
from nemo_selfpref.config.paths import prompts_dir
from nemo_selfpref.config.schema import DataConfig
from nemo_selfpref.data.batching import TokenSequence, sequences_of
from nemo_selfpref.data.dataset import load_preferences
from nemo_selfpref.data.templates import PromptTemplate, load_template
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import ConfigError, DataError
from nemo_selfpref.evaluation.marginals import check_differences, correlation, marginals
from nemo_selfpref.evaluation.options import common_tokenizer, data_settings, settings_as_options
from nemo_selfpref.files import write_json
from nemo_selfpref.monitor.console import Console
from nemo_selfpref.training.convert import single_process_policy
from nemo_selfpref.types import DropReport, PreferencePair

COLUMNS = ("query", "pairs", "Pearson", "Spearman", "Kendall tau-b", "mean marginal", "accuracy")


def correlate(args: argparse.Namespace) -> None:
    """Score the pairs under both models, print the correlations, and write them to args.out.

    Raises:
        ConfigError, CheckpointError: options or folders that cannot be used.
        DataError: no usable pairs, or no correlation is defined for them.
    """
    if args.out is not None and args.out.is_dir():
        raise ConfigError(f"--out {args.out}: this is a folder; expected the name of a file")
    template = None
    if args.augment_prompt is not None:
        template = load_template(args.augment_prompt, AUGMENT_SLOTS, folder=prompts_dir())
    data = data_settings(args)
    tokenizer = common_tokenizer(args.model, args.reference, data)
    console = Console()

    pairs, report = scored_pairs(data, tokenizer, template)
    console.rows("pairs with scores", report)
    differences = [_score_difference(pair) for pair in pairs]
    check_differences(differences)

    queries = {"original": pairs}
    if template is not None:
        queries["augmented"] = [replace(p, prompt_ids=p.augmented_prompt_ids or ()) for p in pairs]
    found = _marginals(args.model, args.reference, queries, console)
    results = {query: asdict(correlation(h, differences)) for query, h in found.items()}
    rows = [[query, *result.values()] for query, result in results.items()]
    console.table("Marginal against score difference", COLUMNS, rows)
    if args.out is not None:
        facts = {
            "model": str(args.model),
            "reference": str(args.reference),
            "data": str(args.data),
            "augment_prompt": template and {"name": template.name, "sha256": template.fingerprint},
            "dropped": report.dropped,
            "results": results,
            "points": {"id": [p.id for p in pairs], "score_difference": differences, **found},
        }
        write_json(args.out, facts)
        console.say(f"written     {args.out}")


def scored_pairs(
    data: DataConfig, tokenizer: ChatTokenizer, template: PromptTemplate | None
) -> tuple[list[PreferencePair], DropReport]:
    """The pairs of the data that have two scores and fit. With a template also under the augmented
    prompt, so that both kinds of query are compared on the same pairs."""
    with settings_as_options():
        loaded, report = load_preferences(data, tokenizer)
    pairs = []
    for pair in loaded:
        if {"score_chosen", "score_rejected"} <= pair.provenance.keys():
            pairs.append(pair)
        else:
            report.drop("no_scores", pair.provenance["source"])
    if not pairs:
        raise DataError(
            f"{data.train_path[0]}: no scores in the data; got {len(loaded)} pairs without; "
            "expected two numbers, score_chosen and score_rejected, in each row or its metadata; "
            "have the answers rated, or use rated data such as UltraFeedback"
        )
    if template is not None:
        pairs, too_long = augment(pairs, template, tokenizer, data.max_length)
        report.add(too_long)
    report.kept = len(pairs)
    return pairs, report


def _score_difference(pair: PreferencePair) -> float:
    return pair.provenance["score_chosen"] - pair.provenance["score_rejected"]


def _marginals(
    model: Path,
    reference: Path,
    queries: Mapping[str, Sequence[PreferencePair]],
    console: Console,
) -> dict[str, list[float]]:
    """The marginals under each kind of query."""
    parts = [sequences_of(pairs, paired=True) for pairs in queries.values()]
    sequences = [sequence for part in parts for sequence in part]
    policy = _score("score with the model", model, sequences, console)
    base = _score("score with the reference", reference, sequences, console)
    sizes = [len(part) for part in parts]
    each = zip(queries, policy.split(sizes), base.split(sizes), strict=True)
    return {query: marginals(p, b) for query, p, b in each}


def _score(what: str, folder: Path, sequences: Sequence[TokenSequence], console: Console) -> Tensor:
    """Sums of response log-probs, float64 [N]. The model leaves memory before this returns."""
    policy, _ = single_process_policy(folder)
    with console.progress(what, len(sequences), "answers") as progress:
        sums = policy.score(sequences, progress).sums
    del policy
    gc.collect()  # its modules refer to one another
    return sums
