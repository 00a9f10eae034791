"""Kept code: loaded instead of traced again, made anew when damaged, never used for what it was not made for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from flowmm.runtime import kept_code
from flowmm.runtime.kept_code import KeptCode

aot_compile = pytest.importorskip("torch._dynamo.aot_compile", reason="this torch keeps no code")


class Rule(NamedTuple):
    name: str


def product(left: Tensor, right: Tensor, count: int, rule: Rule) -> Tensor:
    """Matrix products alone: compiling them takes no C++ compiler."""
    return (left @ right if rule.name == "left first" else right @ left)[:count]


def arguments(
    size: int, rule: str = "left first", same: bool = False, dtype: torch.dtype = torch.float
) -> tuple[Any, ...]:
    left, right = torch.randn(2, size, size, dtype=dtype).unbind()
    return left, left if same else right, size - 2, Rule(rule)


@pytest.fixture
def keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], KeptCode]:
    """A fresh object over the same files, as another process would make it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))

    def fresh() -> KeptCode:
        torch._dynamo.reset()
        return KeptCode(product, tmp_path / "kept")

    return fresh


def traced(code: KeptCode, *given: Any) -> int:
    """The number of graphs that were traced for this call."""
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    torch.testing.assert_close(code(*given), product(*given))
    return counters["unique_graphs"] - before


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "kept").rglob("*.code"))


def test_one_tracing_serves_all_sizes_and_processes(keep: Callable[[], KeptCode], tmp_path: Path) -> None:
    first = keep()
    assert [traced(first, *arguments(size)) for size in (8, 9, 31)] == [1, 0, 0]
    assert len(files(tmp_path)) == 1
    second = keep()
    assert [traced(second, *arguments(size)) for size in (12, 8)] == [0, 0]
    assert len(files(tmp_path)) == 1


def test_what_code_was_not_made_for_has_its_own(keep: Callable[[], KeptCode], tmp_path: Path) -> None:
    others: list[dict[str, Any]] = [{"rule": "right first"}, {"same": True}, {"dtype": torch.double}]
    first = keep()
    assert traced(first, *arguments(8)) == 1
    assert [traced(first, *arguments(8, **other)) for other in others] == [1, 1, 1]
    second = keep()
    assert [traced(second, *arguments(9, **other)) for other in [*others, {}]] == [0, 0, 0, 0]
    assert len(files(tmp_path)) == 4


@pytest.mark.parametrize("thing", ["sources", "processor"])
def test_another_environment_compiles_for_itself(
    thing: str, keep: Callable[[], KeptCode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert traced(keep(), *arguments(8)) == 1
    monkeypatch.setattr(kept_code, "environment", lambda: (thing,))
    assert traced(keep(), *arguments(8)) == 1
    assert len({path.parent for path in files(tmp_path)}) == 2


@pytest.mark.parametrize("damage", ["cut", "changed", "foreign", "empty"])
def test_damaged_code_is_made_again(damage: str, keep: Callable[[], KeptCode], tmp_path: Path) -> None:
    assert traced(keep(), *arguments(8)) == 1
    [path] = files(tmp_path)
    content = path.read_bytes()
    if damage == "foreign":
        content = b"not what torch wrote"
        path = path.rename(path.with_stem(kept_code.digest_of(content)))
    path.write_bytes(
        {"cut": content[:-9], "changed": content[:-9] + bytes(9), "foreign": content, "empty": b""}[damage]
    )
    assert traced(keep(), *arguments(8)) == 1
    assert traced(keep(), *arguments(9)) == 0
    assert len(files(tmp_path)) == 1


def test_a_directory_that_cannot_be_written_costs_only_the_keeping(
    tmp_path: Path, keep: Callable[[], KeptCode]
) -> None:
    (tmp_path / "kept").write_text("a file, not a directory")
    code = keep()
    assert [traced(code, *arguments(size)) for size in (8, 9)] == [1, 0]


def test_where_torch_keeps_no_code_it_compiles(
    keep: Callable[[], KeptCode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.compiler, "load_compiled_function")
    code = keep()
    assert [traced(code, *arguments(size)) for size in (8, 9)] == [1, 0]
    assert not files(tmp_path)


@pytest.mark.parametrize("step", ["aot_compile", "save_compiled_function"])
def test_code_that_torch_fails_to_keep_runs_all_the_same(
    step: str, keep: Callable[[], KeptCode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError(step)

    code = keep()
    owner = code._compiled if step == "aot_compile" else aot_compile.AOTCompiledFunction
    monkeypatch.setattr(owner, step, fail)
    assert [traced(code, *arguments(size)) for size in (8, 9)] == [1, 0]
    assert not files(tmp_path)


def test_variants_are_limited(keep: Callable[[], KeptCode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_code, "MOST_VARIANTS", 1)
    code = keep()
    assert [traced(code, *given) for given in (arguments(8), arguments(8, same=True), arguments(9, same=True))] == [
        1,
        1,
        0,
    ]
    assert len(files(tmp_path)) == 1
