"""Other libraries are measured in processes of their own; a stub stands in for one here."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

PEERS = Path(__file__).parents[1] / "benchmarks" / "peers"
# A library of presses: one keeps the latest entries, one fails.
STUB = """
from contextlib import contextmanager

import torch


class KnormPress:
    def __init__(self, removed):
        self.removed = removed

    @contextmanager
    def __call__(self, model):
        def shorten(module, args, kwargs, output):
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            kept = int(layer.keys.shape[2] * (1 - self.removed) + 1e-9)
            layer.keys, layer.values = layer.keys[:, :, -kept:].clone(), layer.values[:, :, -kept:].clone()

        layers = model.model.language_model.layers
        hooks = [layer.self_attn.register_forward_hook(shorten, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class MergingPress:
    def __init__(self, press):
        raise NotImplementedError("not on this model")
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of environments with one for kvpress, whose interpreter finds the stub."""
    directory = tmp_path_factory.mktemp("environments")
    (directory / "library").mkdir()
    (directory / "library" / "kvpress.py").write_text(STUB)
    (directory / "kvpress" / "bin").mkdir(parents=True)
    python = directory / "kvpress" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{directory / "library"}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return directory


def measured(directory: Path, out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(PEERS / "run.py"), "--at", str(directory), "--out", str(out)]
    size = ["--shape", "tiny", "--tokens", "200", "--rounds", "2", "--new-tokens", "2"]
    return subprocess.run([*script, *size, *words], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_library_is_measured_beside_flowmm(stub: Path, tmp_path: Path) -> None:
    out = tmp_path / "peers.json"
    ended = measured(stub, out, "--budget", "0.25", "--note", "a test")
    assert ended.returncode == 0, ended.stderr
    result = json.loads(out.read_text())
    rows = {(row["peer"], row["method"]): row for row in result["rows"]}
    assert list(rows) == [("flowmm", "plain"), ("flowmm", "robust"), ("kvpress", "plain"), ("kvpress", "knorm")]
    plain, knorm = rows["kvpress", "plain"], rows["kvpress", "knorm"]
    assert plain["prompt_bytes"] == plain["contract_bytes"] == rows["flowmm", "plain"]["prompt_bytes"]
    assert knorm["prompt_bytes"] == knorm["contract_bytes"] == plain["prompt_bytes"] // 4
    assert plain["token_ratio"]["median"] == 1
    assert all(row["ttft_s"]["median"] > row["token_s"]["median"] > 0 for row in rows.values())
    assert knorm["peak_over_dynamic_layers"] < 0, "it frees each layer before the next"
    assert result["not_measured"] == [
        {"peer": "kvpress", "method": "merging", "reason": "NotImplementedError: not on this model"}
    ]
    assert "does not run: kvpress merging" in ended.stdout
    assert result["versions"]["kvpress"]["transformers"] == transformers.__version__


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(PEERS))
    return runpy.run_path(str(PEERS / "run.py"))


def test_a_library_that_is_not_there_is_said_so(script: dict[str, Any], stub: Path) -> None:
    assert list(script["libraries_at"](stub, [])) == ["flowmm", "kvpress"]
    with pytest.raises(SystemExit, match=r"no environment for mllm-kvcompress; make it with build\.py"):
        script["libraries_at"](stub, ["mllm-kvcompress"])


def test_a_library_that_dies_shows_its_last_words(script: dict[str, Any], tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'out of luck' >&2\n")
    python.chmod(0o755)
    library = script["Library"]("kvpress", python, tmp_path, "cpu", 1)
    with pytest.raises(SystemExit, match="kvpress: its process ended\nout of luck"):
        library.ask()


class TestBuild:
    @pytest.fixture
    def build(self) -> dict[str, Any]:
        return runpy.run_path(str(PEERS / "build.py"))

    def test_versions_are_pinned(self, build: dict[str, Any], tmp_path: Path) -> None:
        torch_version = f"torch=={torch.__version__.partition('+')[0]}"
        assert build["requirements"]("kvpress", None) == ["kvpress==0.5.5", torch_version, "transformers==5.2.0"]
        assert build["requirements"]("mllm-kvcompress", str(tmp_path)) == [
            str(tmp_path),
            torch_version,
            f"transformers=={transformers.__version__}",
        ]

    def test_what_cannot_be_had_is_said(self, build: dict[str, Any]) -> None:
        with pytest.raises(SystemExit, match="in no package index; give a copy of its repository: --source"):
            build["requirements"]("mllm-kvcompress", None)
        with pytest.raises(SystemExit, match="found no such file or directory"):
            build["requirements"]("kvpress", "/nowhere")

    def test_a_step_that_fails_ends_it(
        self, build: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps: list[list[str]] = []

        def record(step: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            steps.append(step)
            return subprocess.CompletedProcess(step, len(steps) - 1)

        monkeypatch.setattr(subprocess, "run", record)
        with pytest.raises(SystemExit, match="pip install --quiet --no-index kvpress' ended with status 1"):
            build["build"](tmp_path / "kvpress", ["kvpress"], ["--no-index"])
        assert steps[0][1:4] == ["-m", "venv", "--clear"]
