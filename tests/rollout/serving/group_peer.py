"""Receives one set of weights, in a process of its own: CALL.json WEIGHTS_DIR; prints the outcome
as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from nemo_selfpref.errors import WeightSyncError
from nemo_selfpref.rollout.serving.receiver import receive
from nemo_selfpref.rollout.serving.wire import WeightsCall

call = WeightsCall.model_validate_json(Path(sys.argv[1]).read_bytes())
try:
    sys.stdout.write(receive(call, Path(sys.argv[2])).model_dump_json())
except WeightSyncError as error:
    sys.stdout.write(json.dumps({"error": str(error)}))
