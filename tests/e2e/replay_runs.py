"""Runs one `selfpref` command after another in one process and keeps what each said.

replay_runs.py COMMANDS.json      a list of argument lists; writes COMMANDS.out, a list of
                                  [exit status, output, errors]
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

from nemo_selfpref import cli


def carry_out(arguments: list[str]) -> tuple[int, str, str]:
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = cli.main(arguments)
    return status, out.getvalue(), errors.getvalue()


if __name__ == "__main__":
    path = Path(sys.argv[1])
    said = [carry_out(arguments) for arguments in json.loads(path.read_text(encoding="utf-8"))]
    path.with_suffix(".out").write_text(json.dumps(said), encoding="utf-8")
