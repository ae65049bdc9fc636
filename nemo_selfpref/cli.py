"""The command line: selfpref train | submit | serve | generate | import | export | correlate |
inspect | replay | plan | doctor | selftest | methods | demo."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from nemo_selfpref import __version__
from nemo_selfpref.errors import EXIT_REFUSED, SelfPrefError
from nemo_selfpref.redact import redact

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_EPILOG = """\
examples:
  selfpref demo                                    the whole loop on a small task, no model needed
  selfpref train --config-name sgpo \\
      model.restore_from_path=HF_DIR data.train_path=[sft.jsonl] \\
      algorithm.targets.source=file algorithm.targets.path=answers.jsonl
  selfpref train --config-name dpo --cfg job       show the settings, run nothing
  selfpref serve --config-name sgpo model.restore_from_path=HF_DIR
  selfpref export --checkpoint runs/sgpo/checkpoint --out my-model
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="selfpref",
        description="Align language models with preference pairs they make themselves.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nemo_selfpref {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _train_parser(commands)
    _submit_parser(commands)
    _serve_parser(commands)
    _generate_parser(commands)
    _import_parser(commands)
    _export_parser(commands)
    _correlate_parser(commands)
    _inspect_parser(commands)
    _replay_parser(commands)
    _plan_parser(commands)
    _checkpoint_parser(commands)
    _doctor_parser(commands)
    _selftest_parser(commands)
    commands.add_parser("methods", help="list the algorithms").set_defaults(act=_methods)
    _demo_parser(commands)
    return parser


def _train_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = commands.add_parser(
        "train",
        help="train a policy",
        description="Train with a configuration of conf/ and Hydra overrides (key=value).",
    )
    train.add_argument("--config-name", required=True, help="sft, dpo, ipo, orpo, sgpo, ...")
    train.add_argument("--config-dir", type=Path, help="a folder with YAML files of your own")
    train.add_argument("--cfg", choices=["job"], help="print the resolved settings and stop")
    train.add_argument("overrides", nargs="*", metavar="key=value")
    train.set_defaults(act=_train)


def _submit_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    submit = commands.add_parser(
        "submit",
        help="train on a SLURM cluster",
        description="Check a configuration, write job script, settings and code to RUN/submit/N "
        "and hand the job to sbatch; prints its number. A job that is stopped, hangs or loses a "
        "rank is queued again and goes on (docs/cluster.md).",
    )
    submit.add_argument("--config-name", required=True, help="as for train")
    submit.add_argument("--config-dir", type=Path, help="a folder with YAML files of your own")
    submit.add_argument("--nodes", type=int, default=1)
    submit.add_argument("--gpus-per-node", type=int, default=8, help="0: one CPU rank a node")
    submit.add_argument("--cpus-per-task", type=int, help="cores for each rank")
    submit.add_argument("--engine-nodes", type=int, default=0, help="nodes for vLLM of their own")
    submit.add_argument("--engine-gpus", type=int, help="GPUs of each; default: as trainers have")
    for name in ("partition", "account", "qos", "time"):
        submit.add_argument(f"--{name}", help=f"as sbatch --{name}")
    submit.add_argument("--container", metavar="IMAGE", help="run in it (pyxis and enroot)")
    submit.add_argument("--container-mounts", metavar="FROM:TO,...", help="more than this folder")
    submit.add_argument("--max-requeues", type=int, default=20, help="restarts at most")
    submit.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    submit.add_argument("overrides", nargs="*", metavar="key=value")
    submit.set_defaults(act=_submit)


def _serve_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    serve = commands.add_parser(
        "serve",
        help="start vLLM rollout servers for trainings and OpenAI clients",
        description="Start the engines of a configuration (rollout.vllm.*) and answer until "
        "Ctrl-C. No data is needed; model.restore_from_path is a Hugging Face folder.",
    )
    serve.add_argument("--config-name", required=True, help="as in training: the same settings")
    serve.add_argument("--config-dir", type=Path, help="a folder with YAML files of your own")
    serve.add_argument(
        "--weights", default="policy,ema", metavar="SETS", help="out of policy,ema,frozen,lagged"
    )
    serve.add_argument("overrides", nargs="*", metavar="key=value")
    serve.set_defaults(act=_serve)


def _generate_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    generate = commands.add_parser("generate", help="answer prompts with a trained model")
    generate.add_argument("--model", required=True, type=Path, help="checkpoint or HF folder")
    generate.add_argument(
        "--prompts", required=True, type=Path, help=".jsonl, .json, .parquet, .txt"
    )
    generate.add_argument("--out", type=Path, help="JSONL file; by default the terminal")
    generate.add_argument("--max-new-tokens", type=int, default=256)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--seed", type=int, default=0)
    generate.set_defaults(act=_generate)


def _import_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    imports = commands.add_parser("import", help="Hugging Face folder to checkpoint")
    imports.add_argument("--hf", required=True, type=Path)
    imports.add_argument("--out", required=True, type=Path)
    imports.set_defaults(act=_import)


def _export_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    export = commands.add_parser("export", help="checkpoint to Hugging Face folder")
    export.add_argument("--checkpoint", required=True, type=Path)
    export.add_argument("--out", required=True, type=Path)
    export.add_argument("--no-verify", action="store_true", help="skip the comparison of logits")
    export.set_defaults(act=_export)


def _correlate_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    correlate = commands.add_parser(
        "correlate",
        help="how far a policy's marginals follow the scores of the answers",
        description="Correlate the log-prob marginal between chosen and rejected answers, policy "
        "over reference, with the difference of their scores (Sr-DPO, Table 4).",
    )
    folder = "checkpoint or HF folder"
    correlate.add_argument("--model", required=True, type=Path, help=f"the policy: {folder}")
    correlate.add_argument(
        "--reference", required=True, type=Path, help=f"what the policy was trained from: {folder}"
    )
    correlate.add_argument(
        "--data", required=True, type=Path, help="pairs with score_chosen and score_rejected"
    )
    correlate.add_argument(
        "--augment-prompt",
        metavar="NAME_OR_PATH",
        help="also compare under a prompt that asks for more: sr_augment, or the path of a .txt",
    )
    correlate.add_argument("--out", type=Path, metavar="FILE.json", help="results and points")
    correlate.add_argument(
        "--max-length", type=int, help="longest prompt and answer in tokens; default as in training"
    )
    correlate.add_argument("--max-prompt-length", type=int, help="longest prompt, in tokens")
    correlate.add_argument("--limit", type=int, help="use only the first pairs")
    correlate.add_argument(
        "--drop", nargs="+", default=[], metavar="REASON", help="drop and count rows: too_long, ..."
    )
    correlate.add_argument(
        "--ignore-fields", nargs="+", default=[], metavar="FIELD", help="fields not to be read"
    )
    correlate.set_defaults(act=_correlate)


def _inspect_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="what a run did: its stages, a step, or one pair",
        description="Read a run's folder, under way or ended, without loading a model.",
    )
    inspect.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    inspect.add_argument("--pair", metavar="ID", help="text, origin and use of one pair")
    inspect.add_argument("--stage", metavar="NAME", help="one stage only, as policy or 01-policy")
    inspect.add_argument("--step", type=int, metavar="N", help="the rows of a step, from 1")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(act=_inspect)


def _replay_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    replay = commands.add_parser(
        "replay",
        help="compute a past step again and compare it with its record",
        description="Train from the newest checkpoint before step N up to it, in a temporary "
        "folder, and compare. Exit status 0: the same; 1: not. Nothing in RUN is changed.",
    )
    replay.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    replay.add_argument("--step", type=int, required=True, metavar="N", help="counted from 1")
    replay.add_argument("--stage", metavar="NAME", help="by default the last training stage")
    replay.add_argument(
        "--resample", action="store_true", help="make online pairs again, recorded or not"
    )
    replay.add_argument(
        "--recorded-reference",
        action="store_true",
        help="take the log-probs that were scored once from their file",
    )
    replay.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        help="largest relative difference that counts as equal; 0 is bit by bit",
    )
    replay.add_argument("--scratch", type=Path, metavar="FOLDER", help="where to work meanwhile")
    replay.add_argument("--json", action="store_true", help="print JSON")
    replay.add_argument(
        "--set",
        dest="overrides",
        nargs="+",
        action="extend",
        default=[],
        metavar="key=value",
        help="settings of another layout or device",
    )
    replay.set_defaults(act=_replay)


def _plan_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plan = commands.add_parser(
        "plan",
        help="memory, time and disk that a run will need, without starting it",
        description="Reads no weights and asks no device. Exit status 0: the run fits into memory; "
        "1: it does not, and the cheapest change that does is shown.",
    )
    plan.add_argument("--config-name", required=True, help="as in training: the same settings")
    plan.add_argument("--config-dir", type=Path, help="a folder with YAML files of your own")
    plan.add_argument("--gpu", choices=["h100", "h200", "a100", "cpu"], default="h100")
    plan.add_argument("--rows", type=int, metavar="N", help="rows of data")
    plan.add_argument("--prompt-tokens", type=int, metavar="N", help="in the mean")
    plan.add_argument("--answer-tokens", type=int, metavar="N", help="in the mean")
    plan.add_argument("--mfu", type=float, help="share of the peak that training reaches")
    plan.add_argument(
        "--tokens-per-second", type=float, metavar="X", help="sampled by one device, as measured"
    )
    plan.add_argument("--peak-tflops", type=float, metavar="X", help="of a device, as measured")
    plan.add_argument("--disk-gbs", type=float, default=2.0, metavar="X", help="GB/s of the disk")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument("overrides", nargs="*", metavar="key=value")
    plan.set_defaults(act=_plan)


def _checkpoint_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    checkpoint = commands.add_parser(
        "checkpoint", help="verify, show, compare or delete saved state"
    )
    acts = checkpoint.add_subparsers(dest="act_on", required=True, metavar="ACTION")
    verify = acts.add_parser("verify", help="compare every file with its sum; status 1 if damaged")
    verify.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="checkpoints or runs")
    show = acts.add_parser("show", help="what a checkpoint holds, and bytes a parameter")
    show.add_argument("path", type=Path, metavar="CHECKPOINT")
    show.add_argument("--json", action="store_true", help="print JSON")
    diff = acts.add_parser("diff", help="how two checkpoints differ; status 1 if they do")
    diff.add_argument("first", type=Path, metavar="CHECKPOINT")
    diff.add_argument("second", type=Path, metavar="CHECKPOINT")
    prune = acts.add_parser("prune", help="delete old step checkpoints of a run")
    prune.add_argument("run", type=Path, metavar="RUN")
    prune.add_argument("--keep", type=int, required=True, metavar="N", help="the newest N a stage")
    prune.add_argument("--best", metavar="METRIC", help="keep those with its best values, too")
    prune.add_argument("--mode", choices=["min", "max"], default="min", help="which is best")
    prune.add_argument("--best-k", type=int, default=1, metavar="N", help="how many of them")
    prune.add_argument("--dry-run", action="store_true", help="only tell what would go")
    checkpoint.set_defaults(act=_checkpoint)


def _doctor_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="what of this machine and its packages is missing, broken or unsafe",
        description="Look at packages, devices, disks, limits and network. Exit status 1 where "
        "something is not in order that a run needs, with --config-name that configuration's run.",
    )
    doctor.add_argument("--config-name", help="look at what this configuration needs, too")
    doctor.add_argument("--config-dir", type=Path, help="a folder with YAML files of your own")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument("overrides", nargs="*", metavar="key=value")
    doctor.set_defaults(act=_doctor)


def _selftest_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    selftest = commands.add_parser(
        "selftest",
        help="whether this machine and layout compute what they should",
        description="Compare a tiny random model, in the layout, precision and kernels of a "
        "configuration, with literal numbers, one process, the rollout engines and its own "
        "checkpoint. Exit status 1 where a check failed.",
    )
    selftest.add_argument("--vectors", type=Path, metavar="FILE", help="losses at literal inputs")
    selftest.add_argument("--config-name", default="dpo", help="default: dpo; data is not needed")
    selftest.add_argument("--config-dir", type=Path, help="a folder with YAML files of your own")
    selftest.add_argument("overrides", nargs="*", metavar="key=value")
    selftest.set_defaults(act=_selftest)


def _demo_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser("demo", help="SGPO end to end on a small task, on this machine")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"))
    demo.add_argument("overrides", nargs="*", metavar="key=value", help="passed to both trainings")
    demo.set_defaults(act=_demo)


def _train(args: argparse.Namespace) -> int:
    from omegaconf import OmegaConf

    from nemo_selfpref.algorithms.base import algorithms
    from nemo_selfpref.config.loader import load_config
    from nemo_selfpref.training.launch import launch, needs_launch
    from nemo_selfpref.training.train import check_before_work, train

    schemas = {name: cls.config_class for name, cls in algorithms().items()}
    args.config_name = _known_name(args.config_name, args.config_dir)
    cfg = load_config(
        args.config_name, args.overrides, schemas, args.config_dir, args.cfg is not None
    )
    if args.cfg:
        sys.stdout.write(OmegaConf.to_yaml(cfg))
        return 0
    typed = check_before_work(cfg)
    if needs_launch(typed):
        from nemo_selfpref.training.session import find_start

        find_start(typed)  # refuse what the model cannot do before processes are started
        return launch(typed, args.argv)
    train(cfg)
    return 0


def _submit(args: argparse.Namespace) -> int:
    from nemo_selfpref.training.submit import submit

    args.config_name = _known_name(args.config_name, args.config_dir)
    return submit(args)


def _known_name(name: str, folder: Path | None) -> str:
    """The configuration meant by a name that has another meaning elsewhere."""
    from nemo_selfpref.algorithms.base import ALIASES

    if name not in ALIASES or (folder is not None and (folder / f"{name}.yaml").exists()):
        return name
    meant, warning = ALIASES[name]
    sys.stderr.write(f"selfpref: warning: {name} is {meant} here; {warning}\n")
    return meant


def _serve(args: argparse.Namespace) -> int:
    from nemo_selfpref.training.serve import serve

    args.config_name = _known_name(args.config_name, args.config_dir)
    serve(args)
    return 0


def _generate(args: argparse.Namespace) -> int:
    from nemo_selfpref.training.generate import generate

    generate(args)
    return 0


def _import(args: argparse.Namespace) -> int:
    from nemo_selfpref.training.convert import import_hf

    import_hf(args.hf, args.out)
    sys.stdout.write(f"checkpoint  {args.out}\n")
    return 0


def _export(args: argparse.Namespace) -> int:
    from nemo_selfpref.training.convert import export_hf

    sys.stdout.write(export_hf(args.checkpoint, args.out, verify=not args.no_verify) + "\n")
    return 0


def _correlate(args: argparse.Namespace) -> int:
    from nemo_selfpref.evaluation.correlate import correlate

    correlate(args)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from nemo_selfpref.training.inspect import inspect

    inspect(args)
    return 0


def _replay(args: argparse.Namespace) -> int:
    from nemo_selfpref.training.replay import replay

    return replay(args)


def _checkpoint(args: argparse.Namespace) -> int:
    from nemo_selfpref.training import checkpoint_commands

    act: Callable[[argparse.Namespace], int] = getattr(checkpoint_commands, args.act_on)
    return act(args)


def _doctor(args: argparse.Namespace) -> int:
    from nemo_selfpref.training.doctor import doctor

    if args.config_name is not None:
        with contextlib.suppress(ImportError):  # of a broken package: the report tells of it
            args.config_name = _known_name(args.config_name, args.config_dir)
    return doctor(args)


def _selftest(args: argparse.Namespace) -> int:
    from nemo_selfpref.training.selftest import selftest

    args.config_name = _known_name(args.config_name, args.config_dir)
    return selftest(args)


def _plan(args: argparse.Namespace) -> int:
    from nemo_selfpref.training.plan import plan

    args.config_name = _known_name(args.config_name, args.config_dir)
    return plan(args)


def _methods(args: argparse.Namespace) -> int:
    from nemo_selfpref.algorithms.base import algorithms

    known = algorithms()
    width = max(map(len, known))
    for name, algorithm in known.items():
        sys.stdout.write(f"{name:{width}}  {algorithm.summary} [{algorithm.paper}]\n")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from nemo_selfpref.demo.run import run_demo

    run_demo(args.out, args.overrides)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. Errors meant for people come without a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(arguments)
    args.argv = arguments
    try:
        return args.act(args)
    except SelfPrefError as error:
        rank = f" [rank {os.environ['RANK']}]" if "RANK" in os.environ else ""
        sys.stderr.write(f"selfpref{rank}: {redact(str(error))}\n")
        return error.exit_status
    except OSError as error:
        if error.errno not in _FULL_DISK:
            raise
        sys.stderr.write(f"selfpref: {error}: free some space or mend the disk, and run it again\n")
        return EXIT_REFUSED
    finally:
        _leave_process_group()


def _leave_process_group() -> None:
    # Only a command that joined one has imported the module.
    parallel = sys.modules.get("nemo_selfpref.megatron.parallel")
    if parallel is not None:
        parallel.shutdown()


if __name__ == "__main__":
    sys.exit(main())
