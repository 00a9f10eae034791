"""Calibration data in every format it comes in: the prompts read, their order, and what happens to bad ones."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from operator import length_hint
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_checkpoint import image_bytes, tiny_image, write_checkpoint

from flowmm.errors import InputError
from flowmm.models import LoadedModel, load_model
from flowmm.profiler import CalibrationSample, UnreadableSample, load_calibration, open_calibration, profile
from flowmm.profiler.calibration import calibration_name
from flowmm.profiler.milebench import MileBenchSample

COLOURS = ("red", "green", "blue", "white")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(write_checkpoint(tmp_path_factory.mktemp("checkpoint"))))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for colour in COLOURS:
        tiny_image(colour=colour).save(tmp_path / f"{colour}.png")
    return tmp_path


def hashes(samples: Sequence[CalibrationSample]) -> list[str]:
    return [sample.sha256() for sample in samples]


def expected_hashes(pairs: list[tuple[str, list[str]]]) -> list[str]:
    """Of prompts whose images come first."""
    samples = []
    for text, colours in pairs:
        images: list[dict[str, Any]] = [{"type": "image", "image": tiny_image(colour=colour)} for colour in colours]
        samples.append(CalibrationSample("x", [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]))
    return hashes(samples)


PAIRS = [("What colour?", ["red"]), ("And these?", ["green", "blue"]), ("Nothing here.", [])]


def hub_images(colours: list[str]) -> list[dict[str, Any]]:
    return [{"bytes": image_bytes(tiny_image(colour=colour)), "path": f"{colour}.png"} for colour in colours]


def test_the_same_prompts_hash_alike_in_every_format(folder: Path) -> None:
    expected = expected_hashes(PAIRS)
    lines = [{"prompt": text, "images": [f"{colour}.png" for colour in colours]} for text, colours in PAIRS]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "prompts.json").write_text(json.dumps(lines))
    chats = [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        *({"type": "image_url", "image_url": {"url": f"{colour}.png"}} for colour in colours),
                        {"type": "text", "text": text},
                    ],
                }
            ]
        }
        for text, colours in PAIRS
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    table = {"question": [text for text, _ in PAIRS], "images": [hub_images(colours) for _, colours in PAIRS]}
    pq.write_table(pa.table(table), folder / "prompts.parquet", row_group_size=2)
    for name in ("prompts.jsonl", "prompts.json", "chats.jsonl", "prompts.parquet"):
        assert hashes(load_calibration(str(folder / name))) == expected, name


def test_one_conversation_in_a_json_file(folder: Path) -> None:
    chat = [{"role": "user", "content": [{"type": "image", "image": "red.png"}, {"type": "text", "text": "?"}]}]
    (folder / "chat.json").write_text(json.dumps(chat))
    assert hashes(load_calibration(str(folder / "chat.json"))) == expected_hashes([("?", ["red"])])


def test_further_questions_come_with_the_prompt_and_count(folder: Path) -> None:
    record = {"images": ["red.png"], "prompt": "?", "questions": ["how many?", "what colour?"]}
    (folder / "prompts.jsonl").write_text(json.dumps(record))
    (sample,) = load_calibration(str(folder / "prompts.jsonl"))
    assert sample.opened().further == sample.further == ("how many?", "what colour?")
    assert hashes([sample]) != expected_hashes([("?", ["red"])])
    (folder / "prompts.jsonl").write_text(json.dumps(record | {"questions": "how many?"}))
    with pytest.raises(InputError, match='"questions" to be a list of texts'):
        load_calibration(str(folder / "prompts.jsonl"))


def parquet_hashes(path: Path, columns: dict[str, Any]) -> list[str]:
    pq.write_table(pa.table(columns), path)
    return hashes(load_calibration(str(path)))


def test_parquet_images_as_struct_bytes_list_or_path(folder: Path) -> None:
    expected = expected_hashes([("?", ["red"])])
    red = image_bytes(tiny_image(colour="red"))
    for images in (
        {"image": [{"bytes": red, "path": None}]},
        {"image": [{"bytes": None, "path": "red.png"}]},
        {"image": [red]},
        {"images": [[red]]},
    ):
        assert parquet_hashes(folder / "x.parquet", {"text": ["?"], **images}) == expected


def test_parquet_messages_take_the_images_in_order(folder: Path) -> None:
    images = [hub_images(["red", "green"])]
    expected = CalibrationSample(
        "x",
        [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "first "},
                    {"type": "image", "image": tiny_image(colour="red")},
                    {"type": "text", "text": " then "},
                    {"type": "image", "image": tiny_image(colour="green")},
                ],
            }
        ],
    ).sha256()
    marked = [{"role": "user", "content": "first <image> then <image>"}]
    parts = [
        {"type": "text", "text": "first "},
        {"type": "image", "text": None},
        {"type": "text", "text": " then "},
        {"type": "image", "text": None},
    ]
    for messages in (json.dumps(marked), marked, [{"role": "user", "content": parts}]):
        assert parquet_hashes(folder / "x.parquet", {"messages": [messages], "images": images}) == [expected]
    unmarked = json.dumps([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "what?"}])
    (found,) = load_calibration(str(folder / "x.parquet"))
    pq.write_table(pa.table({"messages": [unmarked], "images": images}), folder / "x.parquet")
    (found,) = load_calibration(str(folder / "x.parquet"))
    assert [part["type"] for part in found.messages[1]["content"]] == ["image", "image", "text"]
    few = json.dumps([{"role": "user", "content": "only <image>"}])
    pq.write_table(pa.table({"messages": [few], "images": images}), folder / "x.parquet")
    with pytest.raises(InputError, match=r"x\.parquet:1.*1 places.*2 images"):
        load_calibration(str(folder / "x.parquet"))


def test_a_folder_of_parquet_shards_is_read_in_order_of_names(folder: Path) -> None:
    for shard, (text, colours) in enumerate(PAIRS):
        columns = {"prompt": [text], "images": pa.array([hub_images(colours) or None], HUB_IMAGES)}
        pq.write_table(pa.table(columns), folder / f"train-{shard}.parquet")
    assert hashes(load_calibration(str(folder))) == expected_hashes(PAIRS)


HUB_IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def test_parquet_without_text_and_damaged_parquet(folder: Path) -> None:
    pq.write_table(pa.table({"picture": [b"x"]}), folder / "x.parquet")
    with pytest.raises(InputError, match=r"no column messages, prompt.*found picture"):
        load_calibration(str(folder / "x.parquet"))
    (folder / "y.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="not a readable parquet file"):
        load_calibration(str(folder / "y.parquet"))


def write_milebench(root: Path, dataset: str, choices: list[str] | None = None) -> None:
    (root / dataset / "images").mkdir(parents=True)
    for colour in COLOURS:
        tiny_image(colour=colour).save(root / dataset / "images" / f"{colour}.png")
    instance = {"context": "{image#1} and {table#2}: which?", "images_path": ["red.png", "green.png"]}
    content = {
        "meta_data": {"dataset": dataset, "task_instruction": ["First.", "Look. "]},
        "data": [
            {
                "sample_id": 7,
                "task_instruction_id": "1",
                "task_instance": instance | ({"choice_list": choices} if choices else {}),
                "response": "red",
            }
        ],
    }
    (root / dataset / f"{dataset}.json").write_text(json.dumps(content))


def test_milebench_folder_with_choices(tmp_path: Path) -> None:
    write_milebench(tmp_path, "StateChange", ["up", "down"])
    write_milebench(tmp_path, "GPR1200", ["up", "down"])
    first, second = load_calibration(str(tmp_path))
    assert (first.name, second.name) == ("GPR1200:7", "StateChange:7")
    parts = second.messages[0]["content"]
    assert [part.get("text", part["type"]) for part in parts] == [
        "Look. \n",
        "image",
        " and ",
        "image",
        ": which?\nChoice list: \nA. up\nB. down\nYour answer is: ",
    ]
    assert first.messages[0]["content"][-1]["text"].startswith(": which?\nChoice list: \nup\ndown\n")
    alone = load_calibration(str(tmp_path / "StateChange"))
    assert hashes(alone) == hashes([second])
    assert hashes(load_calibration(str(tmp_path / "StateChange" / "StateChange.json"))) == hashes([second])


def test_milebench_markers_and_images_need_not_match() -> None:
    images = [Path("a.png"), Path("b.png"), Path("c.png")]
    sample = MileBenchSample("D", "0", "Do.", "see {image#2}{image#9} {image#2}", images, [])
    parts = sample.messages()[0]["content"]
    shown = [part["text"] if part["type"] == "text" else part["image"].name for part in parts]
    assert shown == ["a.png", "c.png", "Do.\nsee ", "b.png", " ", "b.png"]


def test_malformed_milebench_samples_are_skipped_and_named(tmp_path: Path) -> None:
    write_milebench(tmp_path, "StateChange")
    file = tmp_path / "StateChange" / "StateChange.json"
    content = json.loads(file.read_text())
    good = content["data"][0]
    without = good | {"sample_id": 8, "task_instance": {"images_path": []}}
    content["data"] = [without, good, "text", good | {"sample_id": 9, "task_instruction_id": "5"}]
    file.write_text(json.dumps(content))
    prompts = open_calibration([str(tmp_path)])
    assert length_hint(prompts, -1) == 4
    samples = list(prompts)
    assert [sample.name for sample in samples] == [
        "StateChange:8",
        "StateChange:7",
        "StateChange:number 3",
        "StateChange:9",
    ]
    assert [isinstance(sample, UnreadableSample) for sample in samples] == [True, False, True, True]
    assert isinstance(samples[0], UnreadableSample)
    assert samples[0].reason.startswith("not a MileBench sample (KeyError: 'context'); expected")
    with pytest.raises(InputError, match="StateChange:8: not a MileBench sample"):
        load_calibration(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"meta_data": {"task_instruction": []}, "data": {}}'])
def test_damaged_milebench_file_is_named(tmp_path: Path, text: str) -> None:
    write_milebench(tmp_path, "StateChange")
    (tmp_path / "StateChange" / "StateChange.json").write_text(text)
    with pytest.raises(InputError, match=r"StateChange\.json: not a MileBench file"):
        load_calibration(str(tmp_path))


def test_lines_from_stdin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    line = json.dumps({"prompt": "?", "images": ["red.png"]})
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{line}\n\n{line}\n{line}\n"))
    prompts = open_calibration(["-"], limit=2)
    assert length_hint(prompts, -1) == 2
    samples = list(prompts)
    assert [sample.name for sample in samples] == ["stdin:1", "stdin:3"]
    assert isinstance(samples[0], CalibrationSample)
    assert hashes([samples[0]]) == expected_hashes([("?", ["red"])])
    assert length_hint(open_calibration(["-"]), -1) == -1


def test_several_sources_in_order_under_one_limit(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    prompts = open_calibration([str(folder / "a.jsonl"), str(folder), "pocket"], limit=40)
    assert length_hint(prompts) == 40
    everything = [s.name for s in open_calibration([str(folder / "a.jsonl"), str(folder)])]
    assert everything == ["a.jsonl:1", "a.jsonl:2", "blue.png", "green.png", "red.png", "white.png"]
    chosen = [sample.name for sample in prompts]
    assert len(chosen) == 40
    assert chosen == [sample.name for sample in prompts], "a source can be read again"


def test_names_of_sources_hold_no_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert calibration_name(["."]) == folder.name
    assert calibration_name(["-"]) == "stdin"
    assert calibration_name([str(folder / "red.png"), "pocket"]) == "red.png+pocket"


def test_a_stream_reads_a_part_at_a_time(folder: Path) -> None:
    """A broken row far into a parquet file does not keep the first ones from being used."""
    rows = 100
    table = {"prompt": ["?"] * rows, "image": hub_images(["red"]) * (rows - 1) + [{"bytes": None, "path": None}]}
    pq.write_table(pa.table(table), folder / "x.parquet", row_group_size=10)
    samples = list(open_calibration([str(folder / "x.parquet")]))
    assert len(samples) == rows
    assert samples[-1] == UnreadableSample(f"x.parquet:{rows}", "an image has neither bytes nor a path")
    assert all(isinstance(sample, CalibrationSample) for sample in samples[:-1])


def bad_lines(folder: Path, good: int) -> str:
    lines = [json.dumps({"prompt": f"{number}?", "images": ["red.png"]}) for number in range(good)]
    lines.insert(1, '{"prompt": "x", "images": ["missing.png"]}')
    lines.insert(3, "{broken")
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return str(folder / "prompts.jsonl")


def test_bad_samples_are_skipped_counted_and_named(model: LoadedModel, folder: Path) -> None:
    data = bad_lines(folder, 4)
    skipped: list[UnreadableSample] = []
    plan = profile(model, open_calibration([data]), source="prompts", max_bad=0.5, on_skip=skipped.append)
    assert plan.calibration is not None
    assert (plan.calibration.n_samples, plan.calibration.n_skipped) == (4, 2)
    assert [sample.name for sample in skipped] == ["prompts.jsonl:2", "prompts.jsonl:4"]
    assert "missing.png" in skipped[0].reason
    assert '"n_skipped": 2' in plan.dumps()


def test_too_many_bad_samples_fail_early(model: LoadedModel, folder: Path) -> None:
    measured: list[int] = []
    with pytest.raises(InputError, match=r"1 of 42 .*more than 0.01 of all.*prompts\.jsonl:2.*missing\.png"):
        profile(
            model,
            open_calibration([bad_lines(folder, 40)]),
            source="prompts",
            progress=lambda done, total: measured.append(done),
        )
    assert measured == [1]


def test_too_many_bad_samples_of_a_stream_fail_at_its_end(
    model: LoadedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO(Path(bad_lines(folder, 4)).read_text()))
    with pytest.raises(InputError, match="2 of 6 "):
        profile(model, open_calibration(["-"]), source="stdin")
