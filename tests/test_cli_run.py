"""``flowmm run`` as a user types it: prompts, images, outputs, and a clear end for everything that can go wrong."""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from tiny_checkpoint import image_bytes, tiny_image, write_checkpoint

import flowmm
from flowmm import cli
from flowmm.commands.options import BudgetType
from flowmm.models import load_model
from flowmm.plans import LayerPlan, Plan, RhoStatistics, unprofiled_plan
from flowmm.runtime import generation

QUESTION = "what is in the picture, and why is it there?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def plan(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "tiny.json"
    unprofiled_plan(load_model(str(checkpoint)).fingerprint(), flowmm_version=flowmm.__version__).save(path)
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    path.write_bytes(image_bytes(tiny_image(48, 48)))
    return path


@pytest.fixture
def ask(checkpoint: Path, plan: Path) -> Any:
    def run(*arguments: object, plan: Path = plan, model: Path | None = checkpoint, tokens: int = 4) -> int:
        chosen = [] if model is None else ["--model", model]
        words = ["run", "--plan", plan, *chosen, "--max-new-tokens", tokens, *arguments]
        return cli.main([str(word) for word in words])

    return run


def type_on_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def object_on_stdout(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


def test_json_describes_answer_cache_and_time(ask: Any, image: Path, plan: Path, capsys: Any) -> None:
    assert ask("--image", image, "--image", image, "--json", "--budget", "0.25", QUESTION) == 0
    output = capsys.readouterr()
    answer = json.loads(output.out)
    assert output.err == ""
    assert set(answer) == {"text", "finish_reason", "usage", "kv", "timing", "plan", "check"}
    assert answer["finish_reason"] in ("stop", "length")
    assert 1 <= answer["usage"]["completion_tokens"] <= 4
    kv = answer["kv"]
    assert kv["full_tokens"] == answer["usage"]["prompt_tokens"]
    assert kv["kept_tokens"] == kv["full_tokens"] // 4
    assert kv["ratio"] == pytest.approx(kv["kept_tokens"] / kv["full_tokens"], abs=1e-6)
    assert 0 < kv["bytes_after"] < kv["bytes_before"]
    assert len(kv["per_layer"]) == 4
    for layer in kv["per_layer"]:
        assert layer["entries_before"] == layer["entries_after"] + layer["merged"] + layer["dropped"]
    timing = answer["timing"]
    assert 0 < timing["ttft_s"] <= timing["total_s"]
    assert answer["plan"] == {"source": str(plan), "id": Plan.load(plan).short_id}
    assert answer["check"] is None


def test_text_goes_to_stdout_and_the_summary_to_stderr(ask: Any, image: Path, capsys: Any) -> None:
    assert ask("--image", image, QUESTION, "--json") == 0
    text = object_on_stdout(capsys)["text"]
    assert ask("--image", image, QUESTION) == 0
    output = capsys.readouterr()
    assert output.out == text + "\n"
    assert output.err.startswith("flowmm: kept ")
    assert output.err.count("\n") == 1


def test_streamed_text_is_the_same_text(ask: Any, image: Path, capsys: Any) -> None:
    assert ask("--image", image, QUESTION, "--no-stream", tokens=12) == 0
    whole = capsys.readouterr().out
    assert ask("--image", image, QUESTION, "--stream", tokens=12) == 0
    assert capsys.readouterr().out == whole


def test_text_only_prompt(ask: Any, capsys: Any) -> None:
    assert ask(QUESTION, "--json") == 0
    kv = object_on_stdout(capsys)["kv"]
    assert kv["kept_tokens"] == kv["full_tokens"] // 5
    assert {layer["mode"] for layer in kv["per_layer"]} == {"intra"}


def test_prompt_shorter_than_the_budget_is_left_whole_and_said_so(ask: Any, image: Path, capsys: Any) -> None:
    assert ask("--image", image, "hi", "--budget", "5000") == 0
    assert "nothing compressed: all " in capsys.readouterr().err


def test_compare_shows_both_answers(ask: Any, image: Path, capsys: Any) -> None:
    assert ask("--image", image, QUESTION, "--compare") == 0
    out = capsys.readouterr().out
    for expected in ("full cache: ", "compressed: ", "entries per layer", "KV bytes", "tokens agree"):
        assert expected in out


def test_compare_with_everything_kept_agrees_in_every_token(ask: Any, image: Path, capsys: Any) -> None:
    assert ask("--image", image, QUESTION, "--compare", "--json", "--budget", "100%") == 0
    answer = object_on_stdout(capsys)
    full, agreement = answer["compare"]["full"], answer["compare"]["agreement"]
    assert agreement["same_text"]
    assert agreement["matching_tokens"] == agreement["compared_tokens"] == answer["usage"]["completion_tokens"]
    assert full["text"] == answer["text"]
    assert full["kv"]["bytes_after"] == answer["kv"]["bytes_before"]


@pytest.mark.parametrize("preset", ["robust", "evict"])
def test_a_static_cache_answers_with_the_same_tokens(ask: Any, preset: str, image: Path, capsys: Any) -> None:
    # In fp32: at a near-tie of random weights, one rounding step of bf16 decides between two tokens.
    words = ["--image", image, QUESTION, "--json", "--preset", preset, "--budget", "0.25", "--dtype", "fp32"]
    assert ask(*words, "--cache", "growing", tokens=12) == 0
    growing = object_on_stdout(capsys)
    assert ask(*words, "--cache", "static", tokens=12) == 0
    static = object_on_stdout(capsys)
    assert static["text"] == growing["text"]
    assert static["usage"] == growing["usage"]
    assert static["kv"]["kept_tokens"] == growing["kv"]["kept_tokens"]


def test_static_decoding_is_compiled_where_merging_is(
    checkpoint: Path, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(checkpoint)).model

    def options(compile: bool | None, static: bool = True) -> dict[str, Any]:
        return generation.Compression(Plan.load(plan), compile=compile, static=static).options(model)

    assert options(True, static=False) == {}
    assert options(None) == options(False) == {"cache_implementation": "static", "disable_compile": True}
    compiled = options(True)
    assert compiled["cache_implementation"] == "static"
    assert compiled["compile_config"].fullgraph
    monkeypatch.setattr(generation, "compiler_for", lambda device: None)
    assert options(True) == options(False)


@pytest.mark.slow
def test_compiled_static_decoding_answers_with_the_same_tokens(ask: Any, image: Path, capsys: Any) -> None:
    # In bf16 fused code rounds less often, and random weights give near-ties.
    words = ["--image", image, QUESTION, "--json", "--dtype", "fp32"]
    assert ask(*words, tokens=8) == 0
    text = object_on_stdout(capsys)["text"]
    assert ask(*words, "--cache", "static", "--compile", tokens=8) == 0
    assert object_on_stdout(capsys)["text"] == text


def test_no_compress_needs_no_plan(checkpoint: Path, capsys: Any) -> None:
    assert cli.main(["run", "--no-compress", "--model", str(checkpoint), "hello", "--json", "--max-new-tokens=2"]) == 0
    answer = object_on_stdout(capsys)
    assert answer["plan"] is None
    assert answer["kv"]["ratio"] == 1


def test_the_same_seed_samples_the_same_text(ask: Any, capsys: Any) -> None:
    texts = []
    for seed in (1, 1, 2):
        assert ask("hello", "--temperature", "5", "--top-p", "0.99", "--seed", seed, "--json", tokens=8) == 0
        texts.append(object_on_stdout(capsys)["text"])
    assert texts[0] == texts[1] != texts[2]


def test_a_prompt_comes_from_option_file_or_stdin(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file = tmp_path / "question.txt"
    file.write_text(QUESTION + "\n", encoding="utf-8")
    counts = []
    for arguments in ([QUESTION], ["--prompt", QUESTION], ["--prompt", f"@{file}"], []):
        type_on_stdin(monkeypatch, f"{QUESTION}\n".encode())
        assert ask(*arguments, "--json") == 0
        counts.append(object_on_stdout(capsys)["usage"]["prompt_tokens"])
    assert len(set(counts)) == 1
    assert ask("--system", "be brief", QUESTION, "--json") == 0
    assert object_on_stdout(capsys)["usage"]["prompt_tokens"] > counts[0]


def test_at_sign_twice_is_text(ask: Any, capsys: Any) -> None:
    assert ask("@home", "--json") == 2
    assert "home: cannot be read" in capsys.readouterr().err
    assert ask("@@home", "--json") == 0


def test_an_image_comes_from_a_file_a_data_url_or_stdin(
    ask: Any, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    url = "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()
    texts = []
    for source in (image, url, "-"):
        type_on_stdin(monkeypatch, image.read_bytes())
        assert ask("--image", source, QUESTION, "--json") == 0
        texts.append(object_on_stdout(capsys)["text"])
    assert len(set(texts)) == 1


def test_messages_file_names_images_relative_to_itself(ask: Any, image: Path, capsys: Any) -> None:
    content = [{"type": "image", "image": image.name}, {"type": "text", "text": QUESTION}]
    chat = image.with_name("chat.json")
    chat.write_text(json.dumps([{"role": "user", "content": content}]), encoding="utf-8")
    assert ask("--messages", chat, "--json") == 0
    from_file = object_on_stdout(capsys)
    assert ask("--image", image, QUESTION, "--json") == 0
    assert object_on_stdout(capsys)["text"] == from_file["text"]


def drifting(plan: Path, layer_count: int = 4) -> Plan:
    """`plan` with a rho that no prompt has."""
    rho = RhoStatistics(
        mean=0.99, std=0.001, q05=0.99, q50=0.99, q95=0.99, n=9, lift_mean=1, lift_std=0, margin=None, agree=1
    )
    layers = tuple(LayerPlan(index=i, mode="cross", budget=0.2, rho=rho) for i in range(layer_count))
    return Plan.load(plan).model_copy(update={"layers": layers})


def test_drift_is_a_warning_or_exit_code_1(ask: Any, plan: Path, image: Path, tmp_path: Path, capsys: Any) -> None:
    moved = tmp_path / "moved.json"
    drifting(plan).save(moved)
    assert ask("--image", image, QUESTION, "--check", "warn", "--json", plan=moved) == 0
    output = capsys.readouterr()
    assert output.err.startswith("flowmm: warning: rho left the plan in 4 place(s)")
    check = json.loads(output.out)["check"]
    assert check["action"] == "warn"
    assert len(check["findings"]) == 4
    assert ask("--image", image, QUESTION, "--check", "error", plan=moved) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "rho left the plan" in output.err


def test_check_without_numbers_to_check_says_so(ask: Any, capsys: Any) -> None:
    assert ask("hello", "--check", "warn") == 0
    assert "the plan holds no rho" in capsys.readouterr().err


def test_other_weights_are_a_warning(ask: Any, plan: Path, tmp_path: Path, capsys: Any) -> None:
    other = tmp_path / "other.json"
    made_for = Plan.load(plan).model.model_copy(update={"weights_sha256": "0" * 64})
    Plan.load(plan).model_copy(update={"model": made_for}).save(other)
    assert ask("hello", plan=other) == 0
    assert "flowmm: warning: plan and model differ: weights_sha256" in capsys.readouterr().err


def test_a_plan_for_another_model_is_refused(ask: Any, capsys: Any) -> None:
    assert ask("hello", plan=Path("qwen25vl")) == 3
    output = capsys.readouterr()
    assert output.out == ""
    assert "num_layers: the plan says 28, the model has 4" in output.err


def test_a_plan_that_knows_only_a_directory_asks_for_the_model(ask: Any, capsys: Any) -> None:
    assert ask("hello", model=None) == 2
    assert "--model DIRECTORY" in capsys.readouterr().err


def test_the_plans_model_is_the_default(
    ask: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    assert ask("hello", model=None) == 0


def test_inputs_that_cannot_be_read(ask: Any, plan: Path, image: Path, tmp_path: Path, capsys: Any) -> None:
    damaged = tmp_path / "damaged.json"
    damaged.write_text(plan.read_text(encoding="utf-8")[:-40], encoding="utf-8")
    assert ask("hello", plan=damaged) == 2
    assert "damaged.json" in capsys.readouterr().err
    assert ask("hello", plan=tmp_path / "absent.json") == 2
    assert "no such plan file" in capsys.readouterr().err
    assert ask("--image", tmp_path / "absent.png", "hello") == 2
    assert "no such file" in capsys.readouterr().err
    image.write_bytes(image.read_bytes()[:-60])
    assert ask("--image", image, "hello") == 2
    assert "corrupt or truncated" in capsys.readouterr().err
    chat = tmp_path / "chat.json"
    chat.write_text('{"role": "user"}', encoding="utf-8")
    assert ask("--messages", chat) == 2
    assert "expected a non-empty list" in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded(ask: Any, tmp_path: Path, capsys: Any) -> None:
    assert ask("hello", model=tmp_path / "absent") == 4
    assert "no such directory" in capsys.readouterr().err


def test_interrupted(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "generate_answer", interrupt)
    assert ask("hello") == 130


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--no-compress", "--compare", "x"], "--no-compress excludes"),
        (["--no-compress", "--cache", "static", "x"], "--no-compress excludes"),
        (["--cache", "sliding", "x"], "is not one of 'growing', 'static'"),
        (["--stream", "--json", "x"], "--stream excludes"),
        (["--top-p", "0.9", "x"], "--top-p needs"),
        (["--messages", "chat.json", "x"], "leave out prompt"),
        (["--prompt", "x", "x"], "given twice"),
        (["--image", "-", "--image", "-", "x"], "can be given once"),
        (["--preset", "best", "x"], "expected one of paper"),
        (["--budget", "1", "x"], "1 is ambiguous: write 1.0 or 100%"),
        ([], "no prompt"),
    ],
)
def test_contradictions_are_usage_errors(
    ask: Any, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    type_on_stdin(monkeypatch, b"")
    assert ask(*arguments) == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("written", "meant"), [("0.2", 0.2), ("20%", 0.2), ("1.0", 1.0), ("100%", 1.0), ("512", 512), ("2", 2)]
)
def test_budget_is_a_ratio_or_a_number_of_entries(written: str, meant: float) -> None:
    budget = BudgetType().convert(written, None, None)
    assert budget == meant
    assert type(budget) is type(meant)


@pytest.mark.parametrize("written", ["0", "-3", "1.5", "0.0", "120%", "nan%", "much", "", "1e-2", "1"])
def test_other_budgets_name_both_readings(written: str) -> None:
    with pytest.raises(click.BadParameter, match=r"(ratio such as 0\.2|1\.0 or 100%).* entries"):
        BudgetType().convert(written, None, None)
