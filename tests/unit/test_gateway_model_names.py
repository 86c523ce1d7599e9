"""What a request may call its model."""

from __future__ import annotations

import pytest

from gateway.mesh_session import MeshView
from gateway.model_names import ModelNames
from stagemesh.errors import ModelNotFound


def test_the_model_and_the_adapters_of_the_mesh_have_names() -> None:
    names = ModelNames("base")
    names.learn(MeshView(model="dir", adapters={"b": "2", "a": "1"}))
    assert names.adapters == ["a", "b"]
    assert [names.adapter(name) for name in ("", "base", "a", "b")] == ["", "", "1", "2"]
    with pytest.raises(ModelNotFound, match="no model 'c' here; 'base', 'a' and 'b' are served"):
        names.adapter("c")


def test_adapters_stay_known_while_the_scheduler_is_away_or_alone() -> None:
    names = ModelNames("base")
    names.learn(MeshView(model="dir", adapters={"a": "1"}))
    names.learn(MeshView(detail="the scheduler is not reachable"))
    assert names.adapter("a") == "1"
    names.learn(MeshView(model="dir"))
    with pytest.raises(ModelNotFound, match="'base' is served"):
        names.adapter("a")


def test_a_name_that_the_gateway_gave_the_model_is_the_models() -> None:
    names = ModelNames("a")
    names.learn(MeshView(model="dir", adapters={"a": "1"}))
    assert names.adapter("a") == ""
    assert names.adapters == []
