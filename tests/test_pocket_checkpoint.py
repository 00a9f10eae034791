"""The shipped weights: small, plain files, loadable as any Qwen2.5-VL checkpoint, and still able to do their tasks."""

import json
from pathlib import Path

import pytest
import torch

from flowmm.errors import ModelLoadError
from flowmm.models import load_model
from flowmm.pocket import checkpoint_path, tasks
from flowmm.pocket.tokenizer import build_tokenizer


def test_the_checkpoint_is_small_and_holds_no_pickle() -> None:
    files = [path for path in checkpoint_path().iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja", ".txt"}


def test_a_missing_checkpoint_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("flowmm.pocket.__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ModelLoadError, match=r"flowmm\.pocket\.train"):
        checkpoint_path()


def test_the_shipped_tokenizer_is_the_generated_one() -> None:
    shipped = json.loads((checkpoint_path() / "tokenizer.json").read_text(encoding="utf-8"))
    built = json.loads(build_tokenizer().backend_tokenizer.to_str())
    assert shipped["model"]["vocab"] == built["model"]["vocab"]
    assert shipped["model"]["merges"] == built["model"]["merges"]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_the_model_answers_its_tasks(task: str) -> None:
    loaded = load_model(str(checkpoint_path()), dtype="fp32", device="cpu")
    right = 0
    for index in range(20):
        sample = tasks.sample(task, "test", index)
        inputs = loaded.build_inputs(sample.messages())
        with torch.no_grad():
            generated = loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        right += loaded.decode(generated[0, inputs["input_ids"].shape[1] :]) == sample.answer
    assert right >= 17
