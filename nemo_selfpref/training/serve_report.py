"""What `selfpref serve` tells its user once it answers."""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from nemo_selfpref.errors import RolloutError
from nemo_selfpref.monitor.console import Console
from nemo_selfpref.rollout.serving.front_spec import FrontSpec
from nemo_selfpref.rollout.serving.plan import exposure_warning, reachable

COLUMNS = ("engine", "url", "weights", "device", "weights MB", "KV cache MB")


def show(console: Console, spec: FrontSpec, port: int) -> None:
    """The engines of a front that answers on `port`, and how to use them."""
    token_file = Path(spec.token_file)
    rows = fleet_rows(f"http://{reachable(spec.host)}:{port}", token_file)
    devices = {entry.name: _device(entry.spec.device, entry.devices) for entry in spec.engines}
    console.table("Engines", COLUMNS, [_row(row, devices) for row in rows])
    host = socket.gethostname() if spec.host in ("0.0.0.0", "::", "") else spec.host
    url = f"http://{host}:{port}"
    if warning := exposure_warning(spec.host):
        console.say(warning)
    console.say(
        f"url         {url}\n"
        f"token file  {token_file}\n"
        f"weights     {spec.weights_dir}\n\n"
        "train with it:\n"
        f"  selfpref train --config-name ... rollout=vllm rollout.vllm.urls=[{url}] \\\n"
        f"      rollout.vllm.token_file={token_file} rollout.vllm.weights_dir={spec.weights_dir}\n"
        "  (from a machine without that folder, rollout.vllm.transport=gloo instead of it)\n\n"
        "ask it:\n"
        "  from openai import OpenAI\n"
        f'  client = OpenAI(base_url="{url}/v1", api_key=open("{token_file}").read().strip())\n'
        f'  client.chat.completions.create(model="{spec.engines[0].spec.weight_sets[0]}",\n'
        '      messages=[{"role": "user", "content": "Hello"}])\n\n'
        "Ctrl-C ends it."
    )
    sys.stdout.flush()


def fleet_rows(url: str, token_file: Path) -> list[dict[str, Any]]:
    """What a front says of its engines (Fleet.table).

    Raises:
        RolloutError: it does not answer.
    """
    token = token_file.read_text(encoding="utf-8").strip()
    try:
        with httpx.Client(trust_env=False, timeout=30.0) as http:
            reply = http.get(f"{url}/rollout/fleet", headers={"Authorization": f"Bearer {token}"})
            return reply.raise_for_status().json()
    except (httpx.HTTPError, ValueError) as error:
        raise RolloutError(f"{url}/rollout/fleet: {error!r}") from error


def _row(row: Mapping[str, Any], devices: Mapping[str, str]) -> list[Any]:
    memory = row["memory"]
    sizes = [round(memory.get(name, 0) / 1e6) for name in ("weights", "kv_cache")]
    return [row["name"], row["url"], ", ".join(row["sets"]), devices[row["name"]], *sizes]


def _device(kind: str, visible: str | None) -> str:
    return kind if visible is None else f"{kind} {visible}"
