"""How a front is to run: the engines behind it, and where it answers. Written by whoever starts
it, read once at its start."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Literal

from pydantic import Field

from nemo_selfpref.config.model_schema import TokenizerConfig, TokenizerLibrary
from nemo_selfpref.rollout.serving.engine_spec import EngineSpec
from nemo_selfpref.rollout.serving.roster import FleetSettings
from nemo_selfpref.rollout.serving.wire import Record


class EngineEntry(Record):
    name: str
    spec: EngineSpec
    devices: str | None = None
    """CUDA_VISIBLE_DEVICES of its process; None leaves it as it is."""


class TokenizerEntry(Record):
    """A TokenizerConfig whose path is given."""

    folder: str
    library: Literal["auto", "huggingface", "sentencepiece"] = "auto"
    chat_template: str | None = None

    def config(self) -> TokenizerConfig:
        return TokenizerConfig(TokenizerLibrary[self.library], self.folder, self.chat_template)


class FleetEntry(Record):
    """FleetSettings, as far as they are settings of a run."""

    health_every_s: Annotated[float, Field(gt=0)] = 2.0
    suspect_after: Annotated[int, Field(ge=1)] = 3
    max_restarts: Annotated[int, Field(ge=0)] = 3
    min_engines: Annotated[int, Field(ge=1)] = 1
    start_timeout_s: Annotated[float, Field(gt=0)] = 600.0

    def settings(self) -> FleetSettings:
        return FleetSettings(**self.model_dump())

    @classmethod
    def of(cls, source: object) -> FleetEntry:
        """The settings of these names that `source` has."""
        return cls.model_validate({name: getattr(source, name) for name in cls.model_fields})


class FrontSpec(Record):
    """One front. Paths are of its own machine."""

    engines: Annotated[list[EngineEntry], Field(min_length=1)]
    python: str
    """Interpreter of vLLM's environment, for the engines."""
    folder: str
    """Takes the engines' specs and logs."""
    tokenizer: TokenizerEntry
    fleet: FleetEntry = FleetEntry()
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, lt=65536)] = 0
    token_file: str
    ready_file: str
    weights_dir: str
    """Weights that arrive over the network are put below this folder, which the engines share."""
    delete_weights: bool = False
    """Whether that folder goes when the front does: a trainer that is killed cannot see to it."""


assert {*FleetEntry.model_fields} <= {field.name for field in fields(FleetSettings)}
