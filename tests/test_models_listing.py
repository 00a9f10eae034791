"""flowmm models: the table and its JSON."""

from __future__ import annotations

import json

import pytest

from flowmm.cli import main
from flowmm.models.catalogue import known_models


def test_table_has_a_line_per_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.startswith("model ")
    assert len(lines) == len(known_models())
    line = next(line for line in lines if line.startswith("qwen25vl, qwen25vl-7b "))
    assert line.split("  ")[1].strip() == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert "57.3 MB" in line


def test_json_has_an_object_per_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    objects = json.loads(capsys.readouterr().out)
    assert [entry["source"] for entry in objects] == [card.source for card in known_models()]
    assert objects[0]["kv_bytes_per_1k_tokens"] == 2 * 36 * 2 * 128 * 1000 * 2
    assert objects[0]["aliases"] == ["qwen25vl-3b"]
