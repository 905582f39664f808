"""`fastgpt bench`: what it measures, writes and refuses."""

import dataclasses
import json
import math
import re
import sys

import pytest
import torch

from benchmarks import figures
from fastgpt import cli, cpu
from fastgpt.bench import measure, memory, peers, rounds, rule, workloads
from fastgpt.bench.formatting import UNTRUSTED
from fastgpt.bench.workloads import Work

TINY = (
    Work("forward", "toy", 1, 8),
    Work("train", "toy", 1, 8, weigh=True),
    Work("decode", "toy", 1, 4, 4, uncached=True),
    Work("decode", "toy", 1, 4, 4),
    Work("batch", "toy", 5, 6, 4, shortest=2, fewest=1),
    Work("score", "toy", 5, 9, shortest=2),
    Work("lookup", "toy in loops", 1, 4, 4),
    Work("lookup", "toy", 1, 4, 4, drawn=True),
)


@pytest.fixture
def tiny(monkeypatch):
    """The command on work that takes no time, its memory unmeasured."""
    monkeypatch.setattr(workloads, "QUICK", TINY)
    monkeypatch.setattr("fastgpt.bench.quality.STEPS", 1)
    monkeypatch.setattr(rule, "CONFIG", workloads.CONFIGS["toy"] | {"context_length": 128})
    monkeypatch.setattr(rule, "ROUNDS", 1)
    monkeypatch.setattr(rounds, "ENOUGH_SECONDS", 0.0)
    monkeypatch.setattr(measure, "peak_memory", lambda work, peer, threads: 3 * 2**20)
    monkeypatch.setattr(rounds, "MOST_SPREAD", math.inf)  # however busy this machine is
    monkeypatch.setattr(rounds, "MOST_BUSY", math.inf)
    workloads._models.cache_clear()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    workloads._models.cache_clear()


def bench(folder, *arguments):
    out = folder / "made" / "report.html"
    code = cli.main(["bench", "--quick", "--rounds", "3", "--out", str(out), *arguments])
    return code, out


@pytest.mark.parametrize(
    ("taken", "why", "words"),
    [
        (rule.KERNELS, None, "auto takes the C++ kernels; nothing here is faster."),
        (
            rule.PYTORCH,
            "slow",
            "auto takes PyTorch's own form (slow); something else is faster in: b.",
        ),
    ],
)
def test_whether_auto_takes_what_is_fastest(taken, why, words):
    seconds = {
        "a": {rule.BOOK: 4.0, rule.PYTORCH: 2.0, rule.KERNELS: 2.0},
        "b": {rule.BOOK: 4.0, rule.PYTORCH: 2.0, rule.KERNELS: 1.0},
    }
    found = rule.Rule(taken, why, seconds, "it is busy")
    text = "\n".join(found.lines())
    assert found.broken() == ([] if taken == rule.KERNELS else ["b"])
    assert words in text
    assert "  b              1.00                2.00             4.00" in text
    assert "cannot be trusted: it is busy" in text


@pytest.mark.usefixtures("tiny")
def test_quick_says_whether_auto_takes_what_is_fastest(tmp_path, capsys):
    code, _ = bench(tmp_path)
    assert code == 0
    out = capsys.readouterr().out
    taken = rule.KERNELS if cpu.isa() else rule.PYTORCH
    assert f"On the CPU auto takes {taken}" in out
    for work in ("forward [1, 128]", "training step [1, 128]", "generation [1, 32] + 16"):
        assert work in out


@pytest.mark.usefixtures("tiny")
def test_report_and_figures(tmp_path, capsys):
    code, out = bench(tmp_path, "--svg", str(tmp_path / "svg"), "--threads", "1")
    assert code == 0
    names = ["speed", *(["bound"] if cpu.isa() else []), "memory", "error"]
    files = [out, out.with_suffix(".json"), *(tmp_path / "svg" / f"{n}.svg" for n in names)]
    assert capsys.readouterr().out.splitlines()[-6:] == list(map(str, files))

    document = json.loads(files[1].read_text(), parse_constant=pytest.fail)
    assert document["agree"] is True
    assert document["machine"]["threads"] == 1
    forward, train, loop, decode, batch, score, lookup, drawn = document["works"]
    assert list(forward["peers"]) == ["reference", "torch", "products", "fastgpt"]
    assert list(train["peers"]) == ["reference", "products", "fastgpt", "loss"]
    assert list(loop["peers"]) == ["reference", "cached", "torch", "products", "fastgpt"]
    assert list(decode["peers"]) == ["reference", "torch", "products", "fastgpt"]
    assert list(score["peers"]) == ["reference", "fastgpt"]
    for row in (batch, lookup, drawn):
        assert list(row["peers"]) == ["plain", "fastgpt"]
    assert [row["base"] for row in document["works"]] == [
        *4 * ["reference"],
        "plain",
        "reference",
        *2 * ["plain"],
    ]
    assert lookup["bound"] is drawn["bound"] is None
    assert document["quality"] == []
    for row in document["works"]:
        seconds = {name: peer["seconds"] for name, peer in row["peers"].items()}
        for name, peer in row["peers"].items():
            assert peer["speed_up"] == pytest.approx(seconds[row["base"]] / seconds[name])
            if row["bound"] is None:
                assert peer["share_of_bound"] is None
            else:
                assert peer["share_of_bound"] == pytest.approx(row["bound"] / seconds[name])
            assert (peer["error"] is None) == (name == "products")
            if row is forward and name != "products":
                assert abs(peer["kl_mean"]) <= peer["kl_largest"] < 1e-12
            else:
                assert "kl_mean" not in peer
            low, high = peer["quartiles"]
            assert low <= peer["seconds"] <= high
        assert row["rounds"] == 3
    assert train["peers"]["loss"]["memory"] == 3 * 2**20
    assert "memory" not in train["peers"]["products"]

    html = out.read_text()
    assert re.findall(r'<figure id="(\w+)"', html) == names
    assert html.count("<svg") == len(names)
    assert not re.findall(r'(?:src|href)="(?!#)|url\((?!#)|@import|<script', html)


@pytest.mark.usefixtures("tiny")
def test_drawing_again_measures_nothing(tmp_path, monkeypatch):
    _, out = bench(tmp_path)
    monkeypatch.setattr(measure, "measure", None)
    again = tmp_path / "again.html"
    source = str(out.with_suffix(".json"))
    assert cli.main(["bench", "--from", source, "--out", str(again)]) == 0
    assert again.read_text() == out.read_text()
    assert again.with_suffix(".json").read_text() == out.with_suffix(".json").read_text()


def wrong_weights(model):
    model.out_head.weight.data.neg_()


def wrong_loss(model):
    right = model.loss
    model.loss = lambda *arguments: 1.01 * right(*arguments)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("loss is off", wrong_loss),
        ("fastgpt is off", wrong_weights),
        ("whose logit is", wrong_weights),
    ],
)
def test_a_wrong_result_exits_with_1(tmp_path, name, spoil):
    spoil(workloads._models("toy").fused)
    code, out = bench(tmp_path)
    assert code == 1
    assert "Does not agree" in out.read_text()
    document = json.loads(out.with_suffix(".json").read_text())
    assert document["agree"] is False
    assert name in " ".join(row["fault"] or "" for row in document["works"])


def one_id_off(texts):
    texts[-1][-1] = (int(texts[-1][-1]) + 1) % 256


def one_score_off(scores):
    scores[3][0] *= 1.01


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("work", "spoil", "fault"),
    [
        (TINY[4], one_id_off, "fastgpt chose a token whose logit is"),
        (TINY[5], one_score_off, "fastgpt is off by"),
        (TINY[6], one_id_off, "fastgpt chose a token whose logit is"),
        (TINY[7], one_id_off, "fastgpt is off by"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_one_wrong_token_or_score_among_many_is_a_fault(work, spoil, fault):
    case = work.case()
    assert case.fault() is None
    case = work.case()
    right = case.peers["fastgpt"]

    def wrong():
        spoil(result := right())
        return result

    case.peers["fastgpt"] = wrong
    assert fault in case.fault()


@pytest.mark.usefixtures("tiny")
def test_work_of_minutes_takes_fewer_rounds():
    work = dataclasses.replace(TINY[4], rounds=2)
    assert [measure.timed(work.case(), rounds=n)[0]["rounds"] for n in (1, 3)] == [1, 2]


@pytest.mark.usefixtures("tiny")
def test_peers(tmp_path, capsys):
    code, out = bench(tmp_path, "--peers", "torch")
    assert code == 0
    document = json.loads(out.with_suffix(".json").read_text())
    assert list(document["works"][0]["peers"]) == ["reference", "torch", "fastgpt"]
    with pytest.raises(SystemExit):
        bench(tmp_path, "--peers", "fastgpt,fast")
    assert "unknown peer 'fast'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench(tmp_path, "--precisions", "int8,int3")
    assert "unknown precision 'int3'; known are float32, bfloat16," in capsys.readouterr().err


ABSENT = ("transformers", "ctranslate2", "openvino")


def test_what_is_missing_is_left_out_and_said(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name in ABSENT else True)
    code, out = bench(tmp_path, "--peers", "hf,ct2,openvino", "--precisions", "float32,int8")
    assert code == 0
    document = json.loads(out.with_suffix(".json").read_text())
    assert document["left_out"] == {
        "hf": "transformers not installed",
        "ct2": "transformers, ctranslate2 not installed",
        "openvino": "openvino not installed",
        "openvino int8": "openvino not installed",
    }
    assert [row["precision"] for row in document["quality"]] == ["float32", "int8"]
    assert "OpenVINO, int8 (openvino not installed)" in out.read_text()


def refuses(*arguments):
    raise ImportError("no GPT2LMHeadModel in\nthis version")


@pytest.mark.usefixtures("tiny")
def test_a_library_that_fails_is_left_out_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: True)
    monkeypatch.setattr(workloads.libraries, "hugging_face", refuses)
    code, out = bench(tmp_path, "--peers", "fastgpt,hf")
    assert code == 0
    document = json.loads(out.with_suffix(".json").read_text())
    assert document["left_out"] == {"hf": "ImportError: no GPT2LMHeadModel in"}


@pytest.mark.usefixtures("tiny")
def test_fastgpt_is_never_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(workloads._models("toy").fused, "forward", refuses)
    with pytest.raises(ImportError, match="no GPT2LMHeadModel"):
        bench(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "is not JSON"),
        ("[]", "no figures of this version"),
        ('{"format": 1, "works": []}', "no figures of this version"),
        ('{"format": 2, "works": []}', "no figures of this version"),
        ('{"format": 3, "works": [{}]}', "no figures of this version"),
    ],
)
def test_a_source_that_is_none(tmp_path, capsys, text, message):
    source, out = tmp_path / "old.json", tmp_path / "new.html"
    if text is not None:
        source.write_text(text)
    assert cli.main(["bench", "--from", str(source), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_figures_of_another_version_say_what_to_run(tmp_path, capsys, monkeypatch):
    document, page = tmp_path / "bench.json", tmp_path / "page.md"
    document.write_text('{"format": 1, "works": []}')
    page.write_text("as it was")
    monkeypatch.setattr(sys, "argv", ["figures", str(document), str(page)])
    with pytest.raises(SystemExit):
        figures.main()
    assert "run `make figures`" in capsys.readouterr().err
    assert page.read_text() == "as it was"


def test_bad_usage(tmp_path, capsys, monkeypatch):
    assert cli.main(["bench", "--out", str(tmp_path / "report.txt")]) == 2
    assert "does not end in .html" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert cli.main(["bench", "--out", str(tmp_path / "file" / "report.html")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert cli.main(["bench", "--out", str(tmp_path / "report.html")]) == 2
    assert "is not writable" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "fastgpt.bench.page", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert cli.main(["bench"]) == 2
    assert "pip install jinja2 matplotlib rich" in capsys.readouterr().err


def test_quartiles_lie_within_what_was_measured(tiny, monkeypatch):
    def two_rounds(peers, rounds, before_round=None):
        return {peer: [1.0, 9.0][:rounds] for peer in peers}

    monkeypatch.setattr(rounds, "interleaved", two_rounds)
    document = measure.measure(TINY[:1], ["fastgpt"], rounds=2)
    for peer in document["works"][0]["peers"].values():
        assert (peer["seconds"], peer["quartiles"]) == (5.0, [3.0, 7.0])


@pytest.mark.usefixtures("tiny")
def test_a_busy_machine_is_said_in_the_terminal_and_the_document(tmp_path, capsys, monkeypatch):
    def report():
        _, out = bench(tmp_path, "--peers", "fastgpt", "--rounds", "2")
        return capsys.readouterr().out, json.loads(out.with_suffix(".json").read_text())["works"]

    said, works = report()
    assert UNTRUSTED not in said
    assert {row["doubt"] for row in works} == {None}
    monkeypatch.setattr(rounds, "doubt_of_load", lambda others: "very busy")
    said, works = report()
    lines = said.splitlines()
    assert UNTRUSTED in lines
    assert f"{works[0]['name']}: very busy" in lines
    assert [(row["doubt"], row["rounds"]) for row in works] == [("very busy", 8)] * len(works)


def test_peak_memory_of_a_process_of_its_own():
    small, large = (Work("forward", "toy", batch, 64) for batch in (1, 512))
    peaks = [memory.peak_memory(work, "reference", 1) for work in (small, large)]
    logits = 512 * 64 * 256 * 4
    assert all(isinstance(peak, int) for peak in peaks), peaks
    assert peaks[1] - peaks[0] > logits
    assert "KeyError" in memory.peak_memory(small, "loss", 1)
