"""`fastgpt generate`, and the stream of text behind it."""

import io
import json
import sys

import pytest
import torch
from runs import needs_table

import fastgpt
from fastgpt import cli
from fastgpt.tokenizer import TextStream
from fastgpt.training.settings import load_model

TEXT = "naïve 猫 café — 👩‍🚀 so what\n"
CONFIG = {
    "vocab_size": 50257,
    "context_length": 24,
    "emb_dim": 16,
    "n_heads": 2,
    "n_layers": 1,
    "drop_rate": 0.1,
    "qkv_bias": False,
}


@pytest.fixture(scope="module")
def encoding():
    return needs_table()


@pytest.fixture(scope="module")
def model(tmp_path_factory, encoding):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    fastgpt.GPTModel(CONFIG).save_pretrained(folder)
    return folder


def streamed(encoding, ids, stops=()):
    stream = TextStream(encoding, stops)
    parts = [stream.add(token) for token in ids]
    return [*parts, stream.end()], stream.stopped


def test_characters_come_whole(encoding):
    ids = encoding.encode(TEXT)
    parts, _ = streamed(encoding, ids)
    assert "".join(parts) == TEXT
    assert len(ids) > sum(map(bool, parts))  # some tokens end no character
    assert not any("\ufffd" in part for part in parts)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):  # most of these bytes are no characters at all
        ids = torch.randint(0, 256, (30,), generator=generator).tolist()
        assert "".join(streamed(encoding, ids)[0]) == encoding.decode(ids)
    assert streamed(encoding, [10**6])[0] == ["\ufffd", ""]


def test_what_is_not_shown_but_written_is_utf_8(model, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    assert cli.main(["generate", "--model", str(model), "猫", "--max-new-tokens", "2"]) == 0
    sys.stdout.flush()
    assert written.getvalue().decode("utf-8").startswith("猫")


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


def test_a_terminal_that_lacks_a_character_shows_another(model, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", Terminal(written, encoding="cp1252"))
    assert cli.main(["generate", "--model", str(model), "é猫", "--max-new-tokens", "2"]) == 0
    assert written.getvalue().startswith(b"\xe9?")


def test_prompts_in_bytes_that_python_did_not_decode(capsys, model):
    undecoded = "猫".encode().decode("ascii", "surrogateescape")  # UTF-8 where LC_ALL is C
    assert run(capsys, model, undecoded, "--max-new-tokens", "2")[0].startswith("猫")
    for arguments in (["caf\udce9"], ["x", "--stop", "\udce9"]):
        assert cli.main(["generate", "--model", str(model), *arguments]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.endswith("\\udce9' is not UTF-8 text\n")
        assert said.err.count("\n") == 1
    assert cli.main(["generate", "--model", "caf\udce9", "x"]) == 2
    assert "caf\\udce9 is n" in capsys.readouterr().err


@pytest.mark.parametrize("temperature", ["1e-45", "1e-320"])
def test_a_tiny_temperature_takes_the_likeliest(capsys, model, temperature):
    greedy = run(capsys, model, "Every", "--max-new-tokens", "8")[0]
    tiny = run(capsys, model, "Every", "--max-new-tokens", "8", "--temperature", temperature)[0]
    assert tiny == greedy


def test_stop_strings_never_show(encoding):
    ids = encoding.encode("one two three two one")
    for stops, text in (
        (["two"], "one "),
        (["three two"], "one two "),
        (["zzz", "ee", "three"], "one two "),
        (["one two x"], "one two three two one"),
        ([""], "one two three two one"),
    ):
        parts, stopped = streamed(encoding, ids, stops)
        assert "".join(parts) == text
        assert stopped == (len(text) < 21)
    assert streamed(encoding, encoding.encode("abab"), ["abc"])[0][-1] == "ab"


def run(capsys, model, *arguments):
    assert cli.main(["generate", "--model", str(model), "--device", "cpu", *arguments]) == 0
    return capsys.readouterr()


def test_greedy_text_is_that_of_generate(capsys, model, encoding):
    out, err = run(capsys, model, "Every effort", "--max-new-tokens", "40")
    ids = torch.tensor([encoding.encode("Every effort")])
    with torch.no_grad():
        loaded = load_model(model).eval()
        expected = fastgpt.generate(loaded, ids, 40, 24, eos_id=encoding.eot_token)
    assert out == encoding.decode(expected[0].tolist()) + "\n"
    assert err.startswith("40 tokens in ")
    assert err.endswith(" tokens/s\n")
    file = run(capsys, model / "model.safetensors", "Every effort", "--max-new-tokens", "40")
    assert file[0] == out
    half = out[: len(out) // 2]
    stop = out[len(half) : len(half) + 3]
    assert run(capsys, model, "Every effort", "--stop", stop)[0] == out.partition(stop)[0] + "\n"


def test_sampling_repeats_under_a_seed(capsys, model):
    def sampled(seed):
        options = ("--temperature", "1.2", "--top-k", "500", "--top-p", "0.9", "--seed", seed)
        return run(capsys, model, "Once", "--max-new-tokens", "20", *options)[0]

    assert sampled("1") == sampled("1") != sampled("2")


def test_a_file_of_prompts(capsys, model, tmp_path):
    prompts = ["Every effort", "a", "Hello there", "", "b\x0cd", "c"]
    text = "\r\n".join(prompts) + "\r\n"
    (tmp_path / "prompts.txt").write_bytes(text.encode("utf-8-sig"))  # as Windows writes it
    file = ("--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "6")
    out, err = run(capsys, model, *file, "--batch", "2")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    assert err.startswith("36 tokens in ")
    for row in rows:
        alone = run(capsys, model, row["prompt"], "--max-new-tokens", "6")[0]
        assert alone == row["prompt"] + row["text"] + "\n"
    stop = rows[1]["text"][2:5]
    again = [json.loads(line) for line in run(capsys, model, *file, "--stop", stop)[0].splitlines()]
    assert [row["text"] for row in again] == [row["text"].partition(stop)[0] for row in rows]


def test_what_cannot_be(capsys, model, tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "empty").write_bytes(b"")
    small = tmp_path / "small"
    small.mkdir()
    fastgpt.GPTModel(CONFIG | {"vocab_size": 256}).save_pretrained(small)
    for arguments, message in (
        ([], "give either a prompt or --prompts FILE"),
        (["x", "--prompts", "y"], "give either a prompt or --prompts FILE"),
        (["--prompts", str(tmp_path / "gone")], "No such file"),
        (["--prompts", str(tmp_path / "latin")], "is not UTF-8 text"),
        (["--prompts", str(tmp_path / "empty")], "is empty"),
        (["x", "--top-k", "5"], "need a --temperature above 0"),
        (["x", "--model", str(tmp_path)], "contains none of model.safetensors"),
        (["Hello", "--model", str(small)], "token 15496, but the vocabulary has 256 tokens"),
    ):
        assert cli.main(["generate", "--model", str(model), *arguments]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1
        assert message in said.err
    for option, value in (
        ("--top-p", "0"),
        ("--seed", str(1 << 64)),
        ("--seed", "one"),
        ("--threads", "0"),
        ("--threads", "100000"),  # which OpenMP would not survive
    ):
        with pytest.raises(SystemExit):
            cli.main(["generate", "--model", str(model), "x", option, value])
