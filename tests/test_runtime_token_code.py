"""A decoded token as kept code: the tokens of uncompiled decoding, for the model as it is, or the ordinary call."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_runtime_oracle import BATCH, GREEDY, PROMPT, logits_of
from tiny import tiny_inputs, tiny_model
from torch import nn

import flowmm
from flowmm.runtime import module_tree, static_cache, token_code, token_package
from flowmm.runtime.bench import fixed_plan
from flowmm.runtime.compiled import CACHE_VARIABLE
from flowmm.runtime.static_cache import StaticFlowCache

PROMPTS = [PROMPT, [[9, -4, 30]], [[50, -16, 9]]]
EAGER: dict[str, Any] = GREEDY | {"cache_implementation": "static", "disable_compile": True}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where these tests keep code; made once for all of them."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("code")
        patch.setenv(CACHE_VARIABLE, str(folder))
        yield folder / "token"


@pytest.fixture
def made(directory: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Grows by one with every compilation; nothing is loaded yet."""
    paths, make = [], token_package._make

    def noted(path: Path, *arguments: Any) -> None:
        paths.append(path)
        make(path, *arguments)

    monkeypatch.setattr(token_package, "_make", noted)
    return paths


@pytest.fixture
def model() -> Any:
    return small_model()


def small_model(seed: int = 0) -> Any:
    """Two layers, norms that are not all ones, biases that are not all zeros."""
    model = tiny_model(seed=seed, layers=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(mean=1.0, std=0.2)
    return model


def answers(model: Any, rows: list[list[int]] = PROMPT, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """Of uncompiled and of compiled decoding."""
    inputs = tiny_inputs(rows, seed=seed)
    with flowmm.compress(model, fixed_plan(model), budget=0.3):
        expected = model.generate(**inputs, **EAGER | options)
    with compiled_block(model):
        found = model.generate(**inputs, **GREEDY | options)
    return expected, found


def compiled_block(model: Any) -> Any:
    return flowmm.compress(model, fixed_plan(model), budget=0.3, compile_decoding=True)


def check_alike(expected: Any, found: Any) -> None:
    assert torch.equal(expected.sequences, found.sequences)
    torch.testing.assert_close(logits_of(found), logits_of(expected), atol=1e-4, rtol=1e-4)


@pytest.fixture
def plain_ordinary(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The ordinary call is the model itself, and grows this list."""
    calls: list[Any] = []

    def get_compiled_call(config: Any) -> Callable[..., Any]:
        def call(**kwargs: Any) -> Any:
            calls.append(config)
            return model(**kwargs)

        return call

    monkeypatch.setattr(model, "get_compiled_call", get_compiled_call)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("rows", [PROMPT, BATCH], ids=["single", "left-padded"])
def test_one_code_for_all_prompts(
    model: Any, made: list[Path], rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, run = [], token_package.Package.run

    def noted(*arguments: Any) -> torch.Tensor:
        logits.append(run(*arguments))
        return logits[-1]

    monkeypatch.setattr(token_package.Package, "run", noted)
    attributes, weights = set(vars(model)), {name: id(weight) for name, weight in model.named_parameters()}
    torch._dynamo.utils.counters.clear()
    for seed, prompt in enumerate([rows, *PROMPTS] if rows is PROMPT else [rows, rows]):
        check_alike(*answers(model, prompt, seed))
        assert set(vars(model)) == attributes
    assert len(made) <= 1
    assert not torch._dynamo.utils.counters["stats"]
    assert {name: id(weight) for name, weight in model.named_parameters()} == weights
    # No token is written over by a later one.
    assert len({tensor.data_ptr() for tensor in logits}) == len(logits) > 0


@pytest.mark.slow
def test_half_precision(made: list[Path]) -> None:
    expected, found = answers(small_model().to(torch.bfloat16))
    torch.testing.assert_close(logits_of(found)[:2], logits_of(expected)[:2], atol=0.1, rtol=0.1)
    assert len(made) == 1


@pytest.mark.slow
def test_weights_are_those_of_the_model(model: Any, made: list[Path]) -> None:
    check_alike(*answers(model))
    before = len(made)
    text = model.model.language_model
    changes: list[Callable[[], Any]] = [
        lambda: setattr(text.layers[0].mlp.down_proj, "weight", nn.Parameter(torch.randn(64, 96) * 0.1)),
        lambda: setattr(text.norm, "weight", nn.Parameter(torch.ones(64))),
        lambda: setattr(text.layers[1].self_attn.q_proj.bias, "data", torch.zeros(64)),
        lambda: setattr(text.rotary_emb, "inv_freq", text.rotary_emb.inv_freq * 0.7),
        lambda: text.layers[0].input_layernorm.weight.data.mul_(1.5),
        lambda: model.load_state_dict(small_model(seed=3).state_dict()),
    ]
    latest = answers(model)[1]
    for change in changes:
        change()
        expected, found = answers(model)
        check_alike(expected, found)
        assert not torch.equal(logits_of(found), logits_of(latest))
        latest = found
    other = small_model(seed=5)
    check_alike(*answers(other))
    check_alike(*answers(model))
    assert len(made) == before


@pytest.mark.slow
def test_code_compiled_with_uniform_weights_serves_others(directory: Path, made: list[Path]) -> None:
    plain = tiny_model(layers=2)
    for module in plain.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for path in directory.rglob("*.pt2"):
        path.unlink()
    check_alike(*answers(plain))
    assert len(made) == 1
    check_alike(*answers(small_model(seed=2)))
    assert len(made) == 1


@pytest.mark.slow
def test_a_later_turn_finds_room(model: Any, made: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_cache, "BUCKET", 64)
    inputs, question = tiny_inputs(PROMPT), torch.tensor([[7, 8, 9, 10]])

    def talk(**options: Any) -> list[Any]:
        cache = run.static_cache(2)
        first = model.generate(**inputs, **GREEDY | options, past_key_values=cache)
        ids = torch.cat([first.sequences, question], dim=1)
        return [
            first,
            model.generate(input_ids=ids, **GREEDY | options | {"max_new_tokens": 70}, past_key_values=cache),
        ]

    with compiled_block(model) as run:
        for expected, found in zip(talk(disable_compile=True), talk(), strict=True):
            check_alike(expected, found)
    # Buffers of two sizes, each with its code.
    assert len(made) == 2


@pytest.mark.slow
def test_threads_decode_at_once_and_compile_once(model: Any, directory: Path, made: list[Path]) -> None:
    for path in directory.rglob("*.pt2"):
        path.unlink()
    prompts = [tiny_inputs(rows, seed=seed) for seed, rows in enumerate(PROMPTS)]
    with flowmm.compress(model, fixed_plan(model), budget=0.3):
        expected = [model.generate(**inputs, **EAGER) for inputs in prompts]
    ids, done = torch.arange(3, 40)[None], threading.Event()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    wrong: list[Any] = []

    def use_the_plain_model() -> None:
        with torch.no_grad():
            while not done.is_set():
                try:
                    torch.testing.assert_close(twin(input_ids=ids, use_cache=False).logits, logits)
                except Exception as error:
                    wrong.append(error)

    def answer(number: int) -> None:
        try:
            with compiled_block(model):
                for _ in range(3):
                    check_alike(expected[number], model.generate(**prompts[number], **GREEDY))
        except Exception as error:
            wrong.append(error)

    # The same parameters in modules of its own, so that no block sees its calls.
    twin = module_tree.twin(model)
    threads = [threading.Thread(target=answer, args=(number,)) for number in range(len(prompts))]
    beside = threading.Thread(target=use_the_plain_model)
    for thread in (beside, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    beside.join()
    assert not wrong
    assert len(made) == 1


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "foreign", "empty"])
def test_damaged_code_is_made_again(
    model: Any, made: list[Path], directory: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_alike(*answers(model))
    contents = {path: path.read_bytes() for path in directory.rglob("*.pt2")}
    for path, content in contents.items():
        foreign = b"not what torch wrote"
        if damage == "foreign":
            path.unlink()
            path = path.with_stem(token_code.digest_of(foreign))
        path.write_bytes({"cut": content[:-9], "foreign": foreign, "empty": b""}[damage])
    [kept] = {path for path, content in contents.items() if path.parent.name in token_code._packages[model]}
    again: list[Path] = []

    def make(path: Path, *_: Any) -> None:
        again.append(path)
        path.write_bytes(contents[kept])

    monkeypatch.setattr(token_package, "_make", make)
    check_alike(*answers(small_model()))
    assert len(again) == 1
    assert [path.read_bytes() for path in kept.parent.glob("*.pt2")] == [contents[kept]]
    for path in directory.rglob("*.pt2"):
        path.unlink()
    for path, content in contents.items():
        path.write_bytes(content)


@pytest.mark.slow
def test_no_answer_and_no_code_keeps_weights_alive(made: list[Path]) -> None:
    model = small_model()
    check_alike(*answers(model))
    norm = model.model.language_model.norm
    replaced, kept = weakref.ref(norm.weight), norm.weight.untyped_storage()._weak_ref()
    norm.weight = nn.Parameter(torch.ones(64))
    gc.collect()
    assert replaced() is None
    assert torch.UntypedStorage._expired(kept)
    packages = len(token_code._packages)
    watched = weakref.ref(model)
    del model, norm
    gc.collect()
    assert watched() is None
    assert len(token_code._packages) == packages - 1


@pytest.mark.slow
def test_in_inference_mode(model: Any, made: list[Path]) -> None:
    with torch.inference_mode():
        check_alike(*answers(model))


A_PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from test_runtime_token_code import answers, check_alike, small_model, token_package
made, make = [], token_package._make
token_package._make = lambda *arguments: (made.append(1), make(*arguments))
check_alike(*answers(small_model()))
counters = torch._dynamo.utils.counters
print(len(made), counters["stats"]["calls_captured"], sum(counters["inductor"].values()))
"""


@pytest.mark.slow
def test_a_second_process_traces_nothing(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != CACHE_VARIABLE}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    words = [sys.executable, "-c", A_PROCESS, str(Path(__file__).parent)]
    runs = [subprocess.run(words, env=environment, check=True, capture_output=True, text=True) for _ in range(2)]
    first, second = ([int(word) for word in run.stdout.split()] for run in runs)
    assert first[:2] == [1, 0]
    assert first[2] > 0
    assert second == [0, 0, 0]
    assert len(list((tmp_path / "cache" / "flowmm" / "inductor" / "token").rglob("*.pt2"))) == 1
    # What torch unpacks to load it is gone.
    assert not list(tmp_path.glob("aotinductor*"))


@pytest.mark.parametrize("function", ["aoti_compile_and_package", "aoti_load_package"])
def test_without_torchs_functions_the_ordinary_call_serves(
    model: Any, plain_ordinary: list[Any], tmp_path: Path, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.delattr(torch._inductor, function)
    if function == "aoti_load_package":
        monkeypatch.setattr(token_package, "_make", lambda path, *_: path.write_bytes(b"code"))
    for _ in range(2):
        check_alike(*answers(model))
    assert len(plain_ordinary) == 2 * (GREEDY["max_new_tokens"] - 1)
    assert not list(tmp_path.rglob("*.pt2"))


def _replace_forward(model: Any) -> None:
    weight = model.lm_head.weight
    model.lm_head.forward = lambda states: -nn.functional.linear(states, weight)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "hook": lambda model: model.lm_head.register_forward_hook(lambda module, args, logits: logits * -1),
    "forward": _replace_forward,
    "hidden states": lambda model: setattr(model.config, "output_hidden_states", True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_models_that_the_code_is_not_for(
    model: Any, plain_ordinary: list[Any], change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_code, "find_package", pytest.fail)
    change(model)
    check_alike(*answers(model))
    assert len(plain_ordinary) == GREEDY["max_new_tokens"] - 1


def test_what_changes_a_model_or_its_cache_asks_for_other_code(
    model: Any, plain_ordinary: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []
    monkeypatch.setattr(token_code, "find_package", lambda folder, *_: folders.append(folder))
    attention = model.model.language_model.layers[0].self_attn
    changes: list[Callable[[], Any]] = [
        lambda: setattr(attention, "scaling", 0.3),
        lambda: model.train(),
        lambda: model.to(torch.bfloat16),
        lambda: monkeypatch.setattr(static_cache, "BUCKET", 64),
        lambda: monkeypatch.setattr(token_code, "environment", lambda: ("other",)),
    ]
    threads = torch.get_num_threads()
    # As torch's exporter does, for all threads, while it traces in one.
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        answers(model)
    for change in [lambda: None, *changes, lambda: torch.set_num_threads(threads + 1)]:
        change()
        answers(model)
    torch.set_num_threads(threads)
    assert len(folders) == len(set(folders)) == 2 + len(changes)
    assert len(plain_ordinary) == (3 + len(changes)) * (GREEDY["max_new_tokens"] - 1)


def test_calls_that_the_code_is_not_for(model: Any, plain_ordinary: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_code, "find_package", pytest.fail)
    expected, found = answers(model, output_hidden_states=True)
    check_alike(expected, found)
    assert found.hidden_states is not None
    whole = flowmm.compress(model, fixed_plan(model), budget=1.0, compile_decoding=True)
    with whole, torch.autocast("cpu", dtype=torch.bfloat16):
        model.generate(**tiny_inputs(PROMPT), **GREEDY)
    assert len(plain_ordinary) == 2 * (GREEDY["max_new_tokens"] - 1)


def test_beams_and_other_blocks_are_decoded_as_before(
    model: Any, plain_ordinary: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_code, "find_package", pytest.fail)
    beams = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    with flowmm.compress(model, fixed_plan(model), budget=0.3):
        expected = model.generate(**tiny_inputs(BATCH), **beams)
    with compiled_block(model) as run:
        assert torch.equal(model.generate(**tiny_inputs(BATCH), **beams), expected)
        assert isinstance(run.cache, StaticFlowCache)
        with flowmm.compress(model, fixed_plan(model), budget=0.3):
            model.generate(**tiny_inputs(PROMPT), **GREEDY | {"cache_implementation": "static"})
    assert model.get_compiled_call(None) is not None
    assert not plain_ordinary
