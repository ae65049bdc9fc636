"""Runs whose files are damaged one at a time, and what the product's own checks say of it."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from breaking import Broken, Damage, break_file, damages_of

from nemo_selfpref.checkpoint.seal import SEAL, problems
from nemo_selfpref.errors import SelfPrefError
from nemo_selfpref.training.reference_segments import SUFFIX, Segments, read_segment
from nemo_selfpref.training.stage_files import is_done
from nemo_selfpref.training.store import RunFolder

CHECKPOINTS, WEIGHTS, HF = "checkpoints", "weights", "HF folder"
CACHE, RESULTS, SETTINGS = "reference cache", "stage results", "settings"


@dataclass
class Saved:
    """Runs on disk. `sealed`: folders with sums, by part; `runs`: each with its settings."""

    runs: dict[Path, Any]
    sealed: dict[str, list[Path]]
    cache: Path
    parts: dict[str, list[Path]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for part, folders in self.sealed.items():
            self.parts[part] = [f for folder in folders for f in files_below(folder)]
        self.parts[CACHE] = list(self.cache.glob(f"*/*{SUFFIX}"))
        self.parts[RESULTS] = [f for run in self.runs for f in results(run)]
        self.parts[SETTINGS] = [
            run / n for run in self.runs for n in ("config.yaml", "inputs.json")
        ]
        assert all(self.parts.values()), {part: len(files) for part, files in self.parts.items()}

    def found(self, part: str, broken: Broken) -> bool:
        """Whether the product's own check of that part finds the damage and names the file."""
        if part in self.sealed:
            return all(self._in_seal(part, path, broken) for path in broken.files)
        return self._in_cache(broken) if part == CACHE else self._in_runs(broken)

    def _in_seal(self, part: str, path: Path, broken: Broken) -> bool:
        folder = max(f for f in self.sealed[part] if path.is_relative_to(f))
        if broken.damage is Damage.SWAPPED and path.name == SEAL:
            return problems(folder) != []  # each is whole: the other files are not what it says
        return any(line.startswith(f"{path} ") for line in problems(folder))

    def _in_cache(self, broken: Broken) -> bool:
        """Its entries are unknown, so they are scored again; of a file that is there it is told."""
        said: list[str] = []
        segments = Segments(self.cache, said.append)
        for path in broken.files:
            segments.open(path.parent.name)
            if any(segments.get(key) is not None for key in self.entries[path]):
                return False
        aside = all(path.with_name(f"{path.name}.bad").exists() for path in broken.files)
        named = all(any(str(path) in line for line in said) for path in broken.files)
        return (aside and named) or broken.damage is Damage.DELETED

    def _in_runs(self, broken: Broken) -> bool:
        """A start refuses, or says what is lost; a stage without its done.json is done again."""
        done = [path for path in broken.files if path.name == "done.json"]
        if broken.damage is Damage.DELETED and done:
            return not is_done(done[0].parent)
        told = "\n".join(self.told(run) for run in self.runs)
        # Of two files that changed places, the one whose sum is kept elsewhere; of two done.json,
        # the files that the wrong one speaks of.
        swapped = broken.damage is Damage.SWAPPED
        names = [f"{p.parent}/" if swapped and p in done else str(p) for p in broken.files]
        lost = [f"{p.parent} has no {p.name}" for p in broken.files]
        if swapped:  # another run's inputs.json says that the settings are not its own
            lost += [str(p.with_name("config.yaml")) for p in broken.files]
        return any(name in told for name in [*names, *lost])

    def told(self, run: Path) -> str:
        """What a start that goes on with the run refuses, or says."""
        try:
            return "\n".join(RunFolder(run).open(self.runs[run], resume=True))
        except SelfPrefError as error:
            return str(error)

    @property
    def entries(self) -> dict[Path, list[bytes]]:
        if not hasattr(self, "_entries"):
            self._entries = {path: list(read_segment(path)) for path in self.parts[CACHE]}
        return self._entries


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def results(run: Path) -> list[Path]:
    """What finished stages left, and what one that was cut off is continued with."""
    found = []
    for stage in sorted((run / "stages").iterdir()):
        kinds = ("*.parquet", "*.safetensors", "pairs/*", "done.json")
        found += [p for kind in kinds if is_done(stage) for p in stage.glob(kind)]
        found += [] if is_done(stage) else stage.glob("*.safetensors")
    return sorted(found)


@dataclass(frozen=True)
class Score:
    """Damages found of those made, by part and kind."""

    made: Counter[tuple[str, Damage]]
    missed: list[tuple[str, Broken]]

    def table(self) -> str:
        lines = [f"{'':16}" + "".join(f"{kind.value:>16}" for kind in Damage)]
        for part in dict.fromkeys(part for part, _ in self.made):
            lost = Counter(b.damage for p, b in self.missed if p == part)
            cells = (
                f"{self.made[part, kind] - lost[kind]} of {self.made[part, kind]}"
                for kind in Damage
            )
            lines.append(f"{part:16}" + "".join(f"{cell:>16}" for cell in cells))
        total = self.made.total()
        return "\n".join([*lines, f"found {total - len(self.missed)} of {total}"])


def same_json(path: Path, before: bytes) -> bool:
    """Whether a JSON file still says the same: white space decides nothing."""
    try:
        return path.suffix == ".json" and json.loads(path.read_bytes()) == json.loads(before)
    except ValueError:
        return False


def break_all(saved: Saved, times: int, seed: int) -> Score:
    """Damage one file (or swap two) at a time, see whether it is found, and mend it again."""
    draw, score = random.Random(seed), Score(Counter(), [])
    assert saved.entries
    whole = {path: path.read_bytes() for files in saved.parts.values() for path in files}
    schedule = [part for _, part in zip(range(times), _round(saved.parts), strict=False)]
    for part in schedule:
        broken = None
        while broken is None:
            broken = _break_one(saved.parts[part], whole, draw)
        score.made[part, broken.damage] += 1
        if not saved.found(part, broken):
            score.missed.append((part, broken))
        for path in broken.files:
            path.write_bytes(whole[path])
            path.with_name(f"{path.name}.bad").unlink(missing_ok=True)
    return score


def _round(parts: dict[str, list[Path]]) -> Iterator[str]:
    """Parts in turn, those of checkpoints and results twice."""
    while True:
        yield from (*parts, CHECKPOINTS, RESULTS)


def _break_one(
    files: Sequence[Path], whole: dict[Path, bytes], draw: random.Random
) -> Broken | None:
    """A damage; None, and nothing done, where it would have changed no meaning."""
    path = draw.choice(files)
    damage = draw.choice(damages_of(path, files))
    broken = break_file(path, damage, files, draw)
    spaced = damage is Damage.FLIP and path.name in ("done.json", "inputs.json", SEAL)
    if spaced and same_json(path, whole[path]):
        path.write_bytes(whole[path])
        return None
    return broken
