"""Files of loss vectors: the package's own is what the formulas say, and a wrong number is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import make_vectors
import pytest
import torch

from nemo_selfpref.errors import DataError
from nemo_selfpref.objectives.vectors import OWN_VECTORS, error_of, read_vectors

CPU = torch.device("cpu")


def write(path: Path, change: Any = None) -> Path:
    found = json.loads(OWN_VECTORS.read_text())
    if change is not None:
        change(found)
    path.write_text(json.dumps(found))
    return path


def worst(path: Path) -> float:
    return max(error_of(vector, CPU) for vector in read_vectors(path)[0])


def test_the_packages_file_is_what_the_formulas_say() -> None:
    assert json.loads(OWN_VECTORS.read_text()) == make_vectors.vectors()


def test_every_vector_is_met() -> None:
    vectors, unknown = read_vectors(OWN_VECTORS)
    assert len(vectors) == len(make_vectors.CASES) and unknown == []
    assert worst(OWN_VECTORS) < 1e-14


@pytest.mark.parametrize("number", range(len(make_vectors.CASES)))
def test_a_wrong_value_or_gradient_is_seen(number: int, tmp_path: Path) -> None:
    def value(found: dict) -> None:
        found["cases"][number]["expected"]["loss"] += 1e-6

    def slope(found: dict) -> None:
        found["cases"][number]["expected"]["grads"]["pr"] -= 1e-6

    for change in (value, slope):
        assert worst(write(tmp_path / "wrong.json", change)) == pytest.approx(1e-6, rel=1)


def test_what_is_no_loss_of_ours_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "v.json", lambda v: v["cases"][0].update(id="x-1", loss="hinge"))
    vectors, unknown = read_vectors(path)
    assert unknown == ["x-1 (hinge)"] and len(vectors) == len(make_vectors.CASES) - 1


def of_first(**change: Any) -> Any:
    return lambda found: found["cases"][0].update(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(schema=2), "got schema 2, expected 1"),
        (lambda v: v.pop("cases"), "is no file of loss vectors"),
        (lambda v: v.update(cases=[]), "no case of a loss known here"),
        (lambda v: v["cases"][0]["inputs"].pop("rc"), r"case dpo: .*\['rc'\] are missing"),
        (lambda v: v["cases"][0]["inputs"].pop("beta"), "case dpo: KeyError: 'beta'"),
        (lambda v: v["cases"][0]["inputs"].update(tau=1), r"unknown inputs \['tau'\]"),
        (of_first(expected={"loss": 0.5, "grads": {"q": 1.0}}), r"by \['q'\], which are no inputs"),
        (of_first(expected={"grads": {}}), "case dpo: KeyError: 'loss'"),
    ],
)
def test_a_file_in_another_form_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_vectors(write(tmp_path / "bad.json", change))


def test_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(DataError, match="is no file of loss vectors"):
        read_vectors(tmp_path / "bad.json")
    with pytest.raises(DataError, match="is no file of loss vectors"):
        read_vectors(tmp_path / "absent.json")


def test_a_nan_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "nan.json", of_first(expected={"loss": float("nan"), "grads": {}}))
    assert not error_of(read_vectors(path)[0][0], CPU) < 1e9
