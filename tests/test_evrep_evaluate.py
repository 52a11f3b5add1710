"""The evaluation: its numbers, its table, and that a killed one asks nothing twice and ends the same.

One file: all of it looks at the same small evaluation.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from evrep_server import ChatServer, Fault, question_of, serve

from downstream.llm_evrep import evaluate
from downstream.llm_evrep.config import ReaderConfig
from downstream.llm_evrep.fidelity import fidelity_loss
from downstream.llm_evrep.readers import Answers, CachedReader, to_uint8
from downstream.llm_evrep.recognition import table
from downstream.llm_evrep.sources import build_source
from downstream.llm_evrep.words import words
from gep.config import ConfigError
from gep.data.config import DataConfig
from gep.data.paired import collate
from gep.demo.digits import Digits
from gep.demo.recordings import simulate_digits
from gep.models.teacher import ImageModel

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = (str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "--num_processes", "2")
NUM = 20
PROMPT = "Describe the image in one short sentence."


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 test recordings of random strokes with their images, and a random tagger in `teacher/`."""
    rng = np.random.default_rng(0)
    images = np.zeros((NUM, 28, 28), np.uint8)
    for image in images:
        x, y = rng.integers(6, 18, 2)
        image[y : y + rng.integers(4, 10), x : x + rng.integers(2, 8)] = 255
    folder = tmp_path_factory.mktemp("world") / "nmnist"
    simulate_digits(Digits(images, np.arange(NUM) % 10, np.arange(NUM) // 10), folder, split="test", copies=1, seed=0)
    torch.manual_seed(0)
    model = ImageModel({"arch": "nano", "in_chans": 3, "img_size": (36, 36)}, list("0123456789"))
    model.save(folder.parent / "teacher")
    return folder


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def digest(pixels: np.ndarray, prompt: str) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes() + prompt.encode()).hexdigest()[:12]


def says(pixels: np.ndarray, prompt: str) -> str:
    """A model that answers by the hash of what it sees: digits as words and figures, refusals, descriptions."""
    number = int(digest(pixels, prompt), 16)
    if prompt == PROMPT:
        return f"A {('small', 'large', 'bright')[number % 3]} {('bar', 'box')[number % 2]} on black"
    forms = ("It is a {}.", "{}", "The digit {}", "I cannot tell, {} perhaps")
    word = ("zero", "one", "two", "3", "4", "5", "six", "seven", "8", "nine")[number // 4 % 10]
    return forms[number % 4].format(word)


def arguments(root: Path, run: Path, server: ChatServer, *more: str) -> list[str]:
    return [
        str(ROOT / "configs/downstream/llm_evrep/evaluate/nmnist.yaml"),
        f"run={run}",
        f"data.root={root}",
        "sources=[tencode,histogram,rgb]",
        "llm.name=openai:tiny",
        f"llm.base_url={server.url}",
        "llm.concurrency=3",
        "batch_size=6",
        "draws=200",
        "gallery=0",
        "progress=false",
        *more,
    ]


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


# ---- the numbers ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error:llm")
def test_two_readers_several_sources_against_a_loop(root: Path, tmp_path: Path) -> None:
    tagger = f"tagger:{root.parent / 'teacher'}"
    with serve(says) as server:
        found = evaluate.main(arguments(root, tmp_path / "run", server, f"readers=[{tagger}]"))
    assert found == json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(found) == ["openai:tiny", tagger]
    assert all(list(sources) == ["tencode", "histogram", "rgb"] for sources in found.values())

    data = DataConfig(root=str(root), eval_split="test", windows=1, window_us=0)
    test = evaluate.open_test(data)
    question = server.seen[0].payload["messages"][0]["content"][0]["text"]
    assert sorted(re.findall(r"\d", question)) == list("0123456789")
    for name, row in found["openai:tiny"].items():
        right, refused, shared, errors = 0, 0, [], []
        for index in range(NUM):
            batch = collate([test.sample(index, None)])
            frame = batch["image"]
            image = to_uint8(build_source(name, data=data).images(batch))
            pixels, rgb = (x[0].permute(1, 2, 0).numpy() for x in (image, frame))
            text = says(pixels, question)
            said = -1
            if not text.startswith("I cannot"):
                written = re.search(r"zero|one|two|six|seven|nine|\d", text).group()
                spelt = {"zero": 0, "one": 1, "two": 2, "six": 6, "seven": 7, "nine": 9}
                said = spelt.get(written, written if written in spelt else int(written) if written.isdigit() else -1)
            right, refused = right + (said == test.listing.labels[index]), refused + (said == -1)
            a, b = words(says(pixels, PROMPT)), words(says(rgb, PROMPT))
            shared.append(len(a & b) / len(a | b))
            errors.append(fidelity_loss(image.float() / 255, frame.float() / 255).item())
        assert row["accuracy"] == pytest.approx(100 * right / NUM) and row["refused"] == refused
        assert row["jaccard"] == pytest.approx(np.mean(shared))
        assert row["sobel_error"] == pytest.approx(np.mean(errors), rel=1e-5)
        assert row["num"] == NUM and row["low"] <= row["accuracy"] <= row["high"]
        if name != "tencode":
            assert row["gain"] == pytest.approx(row["accuracy"] - found["openai:tiny"]["tencode"]["accuracy"])
            assert row["gain_low"] <= row["gain"] <= row["gain_high"]
    rgb = found["openai:tiny"]["rgb"]
    assert rgb["jaccard"] == 1 and rgb["sobel_error"] == 0 and rgb["refused"] > 0
    assert 0 < found["openai:tiny"]["tencode"]["jaccard"] < 1 and found[tagger]["tencode"]["refused"] == 0
    assert "gain" not in found["openai:tiny"]["tencode"]
    # A question and a description of each image; equal images (the frames, of a source and as the reference) once.
    assert len(server.seen) == 3 * NUM * 2
    shown = table(found)
    assert shown.count("\n") == 10 and f"{rgb['accuracy']:.2f}" in shown and f"read by {tagger}" in shown


def test_the_same_run_again_asks_nothing(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(says) as server:
        first = evaluate.main(arguments(root, tmp_path, server, "llm.price_in=1e6", "llm.price_out=0"))
        asked = len(server.seen)
        shown = capsys.readouterr().out
        assert "cost 12000.0000" in shown, "120 answers of 100 tokens at a dollar a token"
        text = (tmp_path / "results.json").read_bytes()
        again = evaluate.main(arguments(root, tmp_path, server, "llm.concurrency=1", "batch_size=20"))
        assert len(server.seen) == asked and again == first and (tmp_path / "results.json").read_bytes() == text
        assert f"{asked + NUM} answers known before; this time calls 0" in capsys.readouterr().out
        # Another prompt, seed or model are other questions.
        evaluate.main(arguments(root, tmp_path, server, "seed=1", "sources=[tencode]"))
        assert len(server.seen) == asked + NUM


def test_the_report_shows_images_and_answers(root: Path, tmp_path: Path) -> None:
    with serve(lambda pixels, prompt: "a <b>seven</b>") as server:
        evaluate.main(arguments(root, tmp_path, server, "gallery=2", "limit=3"))
    page = (tmp_path / "report.html").read_text()
    assert "a &lt;b&gt;seven&lt;/b&gt;" in page and "histogram" in page and page.count("data:image/png") >= 6
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["key"] in page for line in lines] == [True, True, False], "two of three, spread evenly"


def test_without_descriptions_the_answers_words_are_compared(root: Path, tmp_path: Path) -> None:
    with serve(says) as server:
        found = evaluate.main(arguments(root, tmp_path, server, "describe=false"))["openai:tiny"]
        assert len(server.seen) == 3 * NUM and all(PROMPT not in str(seen.payload) for seen in server.seen)
    assert found["rgb"]["jaccard"] == 1 and found["tencode"]["jaccard"] < 1


def test_sets_without_images_have_accuracy_alone(root: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "Test").symlink_to(root / "Test", target_is_directory=True)
    with serve(says) as server:
        found = evaluate.main(arguments(bare, tmp_path / "run", server, "sources=[tencode]"))["openai:tiny"]
        assert found["tencode"]["jaccard"] is None and found["tencode"]["sobel_error"] is None
        assert len(server.seen) == NUM and "   -  " in table({"r": found})
        with pytest.raises(ValueError, match=r"sources: rgb needs images beside the recordings"):
            evaluate.main(arguments(bare, tmp_path / "run", server))


def test_class_names_and_limit(root: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join("cat dog cow pig hen fox owl bee ant ape".split()))
    keys: list[str] = []

    def answer(pixels: np.ndarray, prompt: str) -> str:
        keys.append(prompt)
        return "A hen, not a fox"

    with serve(answer) as server:
        more = (f"class_names={names}", "sources=[event_image]", "limit=7", "describe=false")
        found = evaluate.main(arguments(root, tmp_path / "run", server, *more))
    assert all(f" {name}" in keys[0] for name in names.read_text().split())
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    chosen = [0, 2, 5, 8, 11, 14, 17]
    test = evaluate.open_test(DataConfig(root=str(root), eval_split="test", windows=1, window_us=0))
    assert [line["key"] for line in lines] == [test.listing.keys[i] for i in chosen]
    hens = sum(test.listing.labels[i] == 4 for i in chosen)
    assert found["openai:tiny"]["event_image"]["accuracy"] == pytest.approx(100 * hens / 7)


@pytest.mark.parametrize(
    "count, most, expected", [(5, 0, range(5)), (5, 9, range(5)), (10, 4, [0, 2, 5, 7]), (3, 1, [0])]
)
def test_evenly(count: int, most: int, expected: list[int]) -> None:
    assert evaluate.evenly(count, most).tolist() == list(expected)


@pytest.mark.parametrize(
    "override, error, message",
    [
        ("llm.name=", ValueError, "llm.name is empty"),
        ("readers=[openai:tiny]", ConfigError, "readers: openai:tiny is named twice"),
        ("readers=[oracle:x]", ValueError, "oracle"),
        ("sources=[]", ConfigError, "sources is empty"),
        ("sources=[tencode,tencode]", ConfigError, "sources: tencode is named twice"),
        ("sources=[a=tencode,a=rgb]", ValueError, "two are called a"),
        ("sources=[sepia]", ValueError, "sepia"),
        ("limit=-1", ConfigError, "limit=-1"),
        ("level=95", ConfigError, "level=95"),
        ("template=Which?", ValueError, "{classes}"),
        ("class_names=/nowhere/names.txt", FileNotFoundError, "/nowhere/names.txt"),
        ("data.clip=true", ConfigError, "data.clip"),
        ("cache=${ROOT}/Test/0/00001.bin", ValueError, "00001.bin"),
    ],
)
def test_mistakes_are_named(root: Path, tmp_path: Path, override: str, error: type, message: str) -> None:
    override = override.replace("${ROOT}", str(root))
    with serve(says) as server, pytest.raises(error, match=re.escape(message)):
        evaluate.main(arguments(root, tmp_path, server, override))
    assert not server.seen


def test_ranks_share_the_samples(root: Path, tmp_path: Path) -> None:
    """Each on its own, as ranks are before they tell each other."""
    data = DataConfig(root=str(root), eval_split="test", windows=1, window_us=0)
    cfg = evaluate.EvaluateConfig(data=data, llm=ReaderConfig(name="openai:tiny"), batch_size=3, progress=False)
    test = evaluate.open_test(data)
    indices = evaluate.evenly(len(test), 19)
    sources = [build_source("tencode", data=data)]
    seen: list[str] = []
    with serve(says) as server:
        for rank in range(3):
            accelerator = SimpleNamespace(
                process_index=rank, num_processes=3, is_main_process=False, device=torch.device("cpu")
            )
            config = ReaderConfig(name="openai:tiny", base_url=server.url)
            reader = CachedReader(config.build(), Answers(tmp_path, rank=rank))
            rows = evaluate.ask(cfg, test, indices, sources, {"r": reader}, "digit?", accelerator)
            assert 6 <= len(rows) <= 7 and all(list(row.answers["r"]) == ["tencode"] for row in rows)
            seen += [row.key for row in rows]
    assert sorted(seen) == sorted(test.listing.keys[i] for i in indices)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"answers-{rank}.jsonl" for rank in range(3)]


# ---- killed and started again -----------------------------------------------------------------------


class Killer:
    """Kills a process as its n-th request arrives."""

    def __init__(self, at: int) -> None:
        self.at, self.count, self.process = at, 0, None

    def __call__(self, pixels: np.ndarray, prompt: str) -> str:
        self.count += 1
        if self.process is not None and self.count == self.at:
            own = psutil.Process(self.process.pid)
            for each in [own, *own.children(recursive=True)]:
                each.send_signal(signal.SIGKILL)
        return f"{says(pixels, prompt)} (reference {digest(pixels, prompt)})"


def asked(server: ChatServer, begin: int = 0) -> list[str]:
    return [digest(*question_of(seen.payload)) for seen in server.seen[begin:]]


def kept(folder: Path) -> set[str]:
    """What the endpoint's answers on disk answer; a torn last line is none."""
    lines = [line for file in folder.glob("answers-*.jsonl") for line in file.read_text().splitlines(keepends=True)]
    whole = [json.loads(line)["text"] for line in lines if line.endswith("\n")]
    return {found.group(1) for text in whole if (found := re.search(r"\(reference (\w+)\)", text))}


def kill_and_resume(root: Path, folder: Path, at: int, *more: str, command: tuple[str, ...] = ()) -> None:
    killer = Killer(at)
    with serve(killer, delay_s=0.005) as server:
        whole = evaluate.main(arguments(root, folder / "whole", server, *more))
        everything = asked(server)
        assert max(Counter(everything).values()) == 1, "even an uninterrupted run asks nothing twice"
        assert at <= len(everything)

        killer.count, run, begin = 0, folder / f"killed{at}", len(server.seen)
        program = [*(command or (sys.executable,)), "downstream/llm_evrep/evaluate.py"]
        killer.process = subprocess.Popen(
            [*program, *arguments(root, run, server, *more)],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        _, errors = killer.process.communicate(timeout=200)
        assert killer.process.returncode == -signal.SIGKILL, errors[-2000:]
        killer.process = None
        assert not (run / "results.json").exists()
        before = kept(run / "answers")
        first = asked(server, begin)
        assert at - 6 <= len(before) < len(everything) and before <= set(first)

        begin = len(server.seen)
        assert evaluate.main(arguments(root, run, server, *more)) == whole
        second = asked(server, begin)
    assert not before & set(second), "an answered request was repeated"
    assert before | set(second) == set(everything) and len(second) == len(everything) - len(before)
    for name in ("results.json", "samples.jsonl"):
        assert (run / name).read_bytes() == (folder / "whole" / name).read_bytes()


def test_killed_evaluation_repeats_nothing_and_ends_the_same(root: Path, tmp_path: Path) -> None:
    kill_and_resume(root, tmp_path, 31)


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 60, 120])
def test_killed_anywhere(root: Path, tmp_path: Path, at: int) -> None:
    kill_and_resume(root, tmp_path, at, f"readers=[tagger:{root.parent / 'teacher'}]")


@pytest.mark.slow
def test_two_processes_killed_and_resumed_by_one(root: Path, tmp_path: Path) -> None:
    kill_and_resume(root, tmp_path, 40, "batch_size=3", command=LAUNCHER)
    assert len(list((tmp_path / "killed40" / "answers").glob("answers-*.jsonl"))) == 2


@pytest.mark.slow
def test_two_processes_end_as_one_and_ask_each_question_once(root: Path, tmp_path: Path) -> None:
    with serve(says) as server:
        evaluate.main(arguments(root, tmp_path / "one", server))
        begin = len(server.seen)
        done = launch(
            *(*LAUNCHER, "downstream/llm_evrep/evaluate.py", *arguments(root, tmp_path / "two", server)),
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert sorted(asked(server, begin)) == sorted(asked(server)[:begin])
    for name in ("results.json", "samples.jsonl"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert len(list((tmp_path / "two" / "answers").glob("answers-*.jsonl"))) == 2


@pytest.mark.slow
def test_a_failing_endpoint_is_one_line_and_what_was_answered_stays(root: Path, tmp_path: Path) -> None:
    with serve(says, faults=[Fault(500, "busy")] * 2) as server:
        server.faults += [Fault(401, "who are you?")]
        failed = launch(sys.executable, "downstream/llm_evrep/evaluate.py", *arguments(root, tmp_path, server))
        assert failed.returncode == 2 and "Traceback" not in failed.stderr
        assert "HTTP 401: who are you?; set OPENAI_API_KEY" in failed.stderr
        evaluate.main(arguments(root, tmp_path, server))
    assert max(Counter(asked(server)[3:]).values()) == 1
