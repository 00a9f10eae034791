"""Calibration sets, resumable records, and the plan that comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_checkpoint import write_checkpoint

import flowmm
from flowmm.errors import InputError
from flowmm.models import LoadedModel, load_model
from flowmm.plans import MethodParameters, Plan, diff
from flowmm.profiler import CalibrationSample, load_calibration, profile


def user(*parts: dict[str, str]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(write_checkpoint(tmp_path_factory.mktemp("checkpoint"))))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for name in ("a.png", "b.png", "c.jpg"):
        Image.fromarray(noise.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    lines = [
        {"images": ["a.png", "b.png"], "prompt": "<image> and <image> differ in what?"},
        {"images": [], "prompt": "hello"},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "c.jpg"}, {"type": "text", "text": "?"}]}
            ]
        },
    ]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return folder


def stable(plan: Plan) -> dict[str, Any]:
    return plan.as_json() | {"created_at": None}


def test_profile_from_json_lines(model: LoadedModel, pictures: Path, tmp_path: Path) -> None:
    samples = load_calibration(str(pictures / "prompts.jsonl"))
    seen: list[tuple[int, int]] = []
    records = tmp_path / "plan.records.parquet"
    plan = profile(model, samples, source="prompts", records=records, progress=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert plan.calibration is not None
    assert plan.calibration.n_samples == 3
    assert plan.calibration.tokens.images_mean == 1
    assert all(layer.mode in ("cross", "intra") and layer.rho is not None for layer in plan.layers)
    table = pq.read_table(records)
    assert table.num_rows == 3 * len(plan.layers)
    assert Plan.loads(plan.dumps()) == plan
    plan.save(tmp_path / "plan.json")
    with flowmm.compress(model.model, tmp_path / "plan.json", budget=0.5, check="error") as run:
        model.model.generate(**model.build_inputs(samples[0].messages), max_new_tokens=2)
    assert run.report.kept_tokens < run.report.full_tokens


def test_image_folder(pictures: Path) -> None:
    samples = load_calibration(str(pictures), prompt="What is this?")
    assert [sample.name for sample in samples] == ["a.png", "b.png", "c.jpg"]
    assert samples[0].messages[-1]["content"][-1]["text"] == "What is this?"


def test_generated_prompts_differ_by_seed_and_can_be_photo_sized() -> None:
    first, again, other = (load_calibration("pocket", limit=3, seed=seed) for seed in (0, 0, 1))
    hashes = [[sample.sha256() for sample in samples] for samples in (first, again, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    large = load_calibration("pocket", limit=1, photo_size=True)[0]
    sizes = {part["image"].size for part in large.messages[0]["content"] if part["type"] == "image"}
    assert sizes == {(448, 448)}


def test_limit_is_a_seeded_choice_in_file_order(pictures: Path) -> None:
    path = str(pictures / "prompts.jsonl")
    names = [sample.name for sample in load_calibration(path, limit=2, seed=1)]
    assert names == sorted(names)
    assert len(names) == 2
    assert names == [sample.name for sample in load_calibration(path, limit=2, seed=1)]


def test_hash_follows_content_not_file_names(pictures: Path, tmp_path: Path) -> None:
    def sample(path: Path, text: str = "?") -> CalibrationSample:
        image = {"type": "image", "image": str(path)}
        return CalibrationSample("x", user(image, {"type": "text", "text": text}))

    (tmp_path / "copy.png").write_bytes((pictures / "a.png").read_bytes())
    original = sample(pictures / "a.png").sha256()
    assert original == sample(tmp_path / "copy.png").sha256()
    assert original != sample(pictures / "b.png").sha256()
    assert original != sample(pictures / "a.png", "!").sha256()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"bad\.jsonl:1"),
        ('{"prompt": "a"}\n[1]', r"bad\.jsonl:2: expected a JSON object"),
        ('{"images": "a.png", "prompt": "x"}', r"bad\.jsonl:1: expected"),
        ('{"images": ["a.png"], "prompt": "<image> <image>"}', r"bad\.jsonl:1.*placeholders"),
        ("", "holds no calibration prompt"),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_unusable_data_names_the_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        load_calibration(str(path))


def test_missing_data_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_calibration(str(tmp_path / "none"))
    with pytest.raises(InputError, match="holds no image"):
        load_calibration(str(tmp_path))


def test_missing_image_names_the_sample(model: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "gone.jsonl"
    path.write_text('{"images": ["gone.png"], "prompt": "x"}')
    with pytest.raises(InputError, match=r"gone\.jsonl:1.*gone\.png"):
        profile(model, load_calibration(str(path)), source="gone")


def test_text_only_calibration_is_refused(model: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"prompt": "hello"}')
    with pytest.raises(InputError, match="both text and images"):
        profile(model, load_calibration(str(path)), source="text")
    with pytest.raises(InputError, match="no calibration prompts"):
        profile(model, [], source="none")


class Killed(BaseException):
    """Stands for a kill between two prompts."""


def test_interrupted_profile_resumes_to_the_same_plan(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = load_calibration("pocket", limit=5)
    whole = profile(model, samples, source="pocket", records=tmp_path / "whole.parquet")
    passes: list[int] = []
    original = flowmm.profiler.profile.__globals__["record_flow"]

    def counted(*args: Any, **options: Any) -> Any:
        passes.append(1)
        return original(*args, **options)

    monkeypatch.setitem(flowmm.profiler.profile.__globals__, "record_flow", counted)

    def kill(done: int, total: int | None) -> None:
        if done == 3:
            raise Killed

    records = tmp_path / "cut.parquet"
    with pytest.raises(Killed):
        profile(model, samples, source="pocket", records=records, progress=kill)
    assert len(passes) == 3
    assert not records.exists()
    resumed = profile(model, samples, source="pocket", records=records)
    assert len(passes) == 5, "finished prompts are not measured again"
    assert stable(resumed) == stable(whole)
    assert pq.read_table(records).equals(pq.read_table(tmp_path / "whole.parquet"))
    assert [path.name for path in tmp_path.glob("cut*")] == ["cut.parquet"]
    profile(model, samples, source="pocket", records=records, resume=False)
    assert len(passes) == 10


def test_records_of_another_model_are_not_reused(model: LoadedModel, tmp_path: Path) -> None:
    samples = load_calibration("pocket", limit=2)
    records = tmp_path / "records.parquet"
    first = profile(model, samples, source="pocket", records=records)
    other = load_model(str(write_checkpoint(tmp_path / "other")))
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter *= 1.5
    second = profile(other, samples, source="pocket", records=records)
    assert diff(first, second).drifted
    assert first.layers != second.layers


def test_damaged_records_are_named(model: LoadedModel, tmp_path: Path) -> None:
    records = tmp_path / "records.parquet"
    records.write_bytes(b"not parquet")
    with pytest.raises(InputError, match="--no-resume"):
        profile(model, load_calibration("pocket", limit=1), source="pocket", records=records)


def test_theta_decides_the_modes(model: LoadedModel) -> None:
    samples = load_calibration("pocket", limit=2)
    for theta, mode in ((0.0, "cross"), (1.0, "intra")):
        plan = profile(model, samples, source="pocket", method=MethodParameters(theta=theta))
        assert {layer.mode for layer in plan.layers} == {mode}
