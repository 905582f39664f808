"""`fastgpt generate`, and the stream of text behind it."""

import io
import json
import re
import sys
import time

import pytest
import torch
from runs import Run, needs_table

import fastgpt
from fastgpt import cli
from fastgpt.atomic_files import only_writer
from fastgpt.cli import generate as command
from fastgpt.cli.prompts import answer_line
from fastgpt.tokenizer import TextStream
from fastgpt.training import format_input
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


@pytest.fixture(autouse=True)
def _one_thread():
    """Several wait for each other longer than they work on a model this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    out, err = run(capsys, model, *file, "--stop", stop)
    again = [json.loads(line)["text"] for line in out.splitlines()]
    assert again == [row["text"].partition(stop)[0] for row in rows]
    assert int(err.split()[0]) < 36  # a prompt that has stopped does not go on


PROMPTS = ["Every effort", "a", "", "more than the context " * 8, "Hello there", "b", "c d e"]
SAMPLED = ("--temperature", "1.2", "--top-k", "500", "--max-new-tokens", "6")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def test_prompt_i_is_answered_as_alone_with_seed_plus_i(capsys, model, prompts):
    batches = [
        run(capsys, model, "--prompts", str(prompts), *SAMPLED, "--seed", "-3", "--batch", size)[0]
        for size in ("1", "3", "32")
    ]
    assert batches[0] == batches[1] == batches[2]
    for i, line in enumerate(batches[0].splitlines()):
        alone = run(capsys, model, PROMPTS[i], *SAMPLED, "--seed", str(i - 3))[0]
        assert alone == PROMPTS[i] + json.loads(line)["text"] + "\n"


def test_entries_of_chapter_7_keep_their_fields(capsys, model, tmp_path):
    entries = [
        {"instruction": "Name a colour.", "input": "", "output": "Blue, or 猫."},
        {"instruction": "Give the plural.", "input": "mouse", "id": 7},
        {"instruction": "Greet."},
        {"prompt": "Every effort", "output": "moves you", "text": "an earlier answer"},
    ]
    (tmp_path / "data.json").write_text(json.dumps(entries, indent=1))
    lines = "\n\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    (tmp_path / "data.jsonl").write_text(lines + "\n", encoding="utf-8")
    outs = [
        run(capsys, model, "--prompts", str(tmp_path / name), "--max-new-tokens", "6")[0]
        for name in ("data.json", "data.jsonl")
    ]
    assert outs[0] == outs[1]
    rows = [json.loads(line) for line in outs[0].splitlines()]
    for entry, row in zip(entries, rows, strict=True):
        name = "text" if "prompt" in entry else "model_response"
        prompt = entry.get("prompt") or format_input(entry)
        alone = run(capsys, model, prompt, "--max-new-tokens", "6")[0]
        answer = alone[len(prompt) : -1]
        assert row == entry | {name: answer.strip() if name == "model_response" else answer}
    file = ("--prompts", str(tmp_path / "data.json"), "--max-new-tokens", "6", "--format", "text")
    texts = run(capsys, model, *file)[0].split("\n")
    expected = [row.get("model_response", row.get("text")) for row in rows]
    assert texts == [*(" ".join(text.splitlines()) for text in expected), ""]


def test_prompt_and_answer_are_those_of_the_book():
    entry = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    asked = (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd."
    )
    assert format_input(entry) == asked + "\n\n### Input:\n1, 2"
    assert format_input(entry | {"input": ""}) == format_input({"instruction": "Add."}) == asked
    said = "\n\n### Response:\nThe sum\nis 3.\n"
    assert json.loads(answer_line(entry, said, "jsonl")) == entry | {
        "model_response": "The sum\nis 3."
    }
    assert answer_line(entry, said, "text") == "The sum is 3."
    assert answer_line({"prompt": "x"}, said, "text") == "  ### Response: The sum is 3."
    assert json.loads(answer_line({"prompt": "x"}, said, "jsonl"))["text"] == said


def test_lines_are_written_as_soon_as_each_is_next(capsys, model, tmp_path, monkeypatch):
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    written = []

    def stream(model, prompts, *, ends, **options):
        for number in (1, 0, 2):
            for token in (number, number + 10):
                ends(number, token)
                yield number, token
            written.append((tmp_path / "out").read_text().count("\n"))

    monkeypatch.setattr(command, "generate_batch_stream", stream)
    file = ("--prompts", str(tmp_path / "three.txt"), "--output", str(tmp_path / "out"))
    run(capsys, model, *file, "--max-new-tokens", "2")
    assert written == [0, 2, 3]


def test_a_reader_of_the_stream_ends_a_prompt():
    torch.manual_seed(0)
    model = fastgpt.GPTModel(CONFIG | {"vocab_size": 60, "drop_rate": 0.0}).eval()
    prompts = [[1, 2], [3], [4, 5, 6], [7]]
    whole = fastgpt.generate_batch(model, prompts, 9)
    asked = []

    def ends(number, token):
        asked.append((number, token))
        return number != 2 and [n for n, _ in asked].count(number) == number + 1

    for size in (1, 2, 32):
        asked.clear()
        stream = list(fastgpt.generate_batch_stream(model, prompts, 9, batch_size=size, ends=ends))
        assert stream == asked
        for number, prompt in enumerate(prompts):
            new = [token for n, token in stream if n == number]
            assert prompt + new == whole[number][: len(prompt) + (9 if number == 2 else number + 1)]
    asked.clear()
    model.register_forward_hook(lambda *_: None)
    with pytest.warns(fastgpt.BackendWarning, match="one by one"):
        one_by_one = list(fastgpt.generate_batch_stream(model, prompts, 9, ends=ends))
    assert one_by_one == sorted(stream, key=lambda step: step[0])


def with_output(prompts, out, *more):
    return ["--prompts", str(prompts), "--output", str(out), *SAMPLED, *more]


@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_a_file_cut_anywhere_is_completed_to_the_same_bytes(capsys, model, prompts, tmp_path, kind):
    out = tmp_path / "answers"
    arguments = with_output(prompts, out, "--format", kind)
    assert run(capsys, model, *arguments)[0] == ""
    whole = out.read_bytes()
    assert whole.count(b"\n") == len(PROMPTS)
    second = whole.index(b"\n", whole.index(b"\n") + 1)
    for cut in (0, 1, second, second + 1, len(whole) - 1, len(whole)):
        out.write_bytes(whole[:cut])
        kept = whole[:cut].count(b"\n")
        err = run(capsys, model, *arguments, "--batch", "2")[1]
        assert out.read_bytes() == whole
        assert err.count("were done before") == (kept > 0)
        assert f"{6 * (len(PROMPTS) - kept)} tokens in " in err


def slowly():
    """Gives the test time to kill the process between two lines."""
    fast = command.generate_batch_stream

    def stream(*args, **options):
        for step in fast(*args, **options):
            time.sleep(0.01)
            yield step

    command.generate_batch_stream = stream


def test_a_killed_run_goes_on(capsys, model, prompts, tmp_path):
    prompts.write_text("\n".join(PROMPTS * 3))
    arguments = with_output(prompts, tmp_path / "whole", "--batch", "2")
    run(capsys, model, *arguments)
    whole = (tmp_path / "whole").read_bytes()
    out = tmp_path / "out"
    arguments = with_output(prompts, out, "--batch", "2")
    killed = Run(tmp_path, ["generate", "--model", str(model), *arguments], before=slowly)
    killed.wait_for(lambda: out.exists() and out.read_bytes().count(b"\n") >= 3)
    killed.processes[0].kill()
    killed.codes()
    left = out.read_bytes()
    assert whole.startswith(left)
    assert 3 <= left.count(b"\n") < 3 * len(PROMPTS)
    assert "were done before" in run(capsys, model, *arguments)[1]
    assert out.read_bytes() == whole


def test_ctrl_c_leaves_whole_lines(capsys, model, prompts, tmp_path, monkeypatch):
    arguments = with_output(prompts, tmp_path / "out", "--batch", "2")
    run(capsys, model, *arguments)
    whole = (tmp_path / "out").read_bytes()
    (tmp_path / "out").write_bytes(b"")

    def interrupted(*args, **options):
        for step, token in enumerate(fastgpt.generate_batch_stream(*args, **options)):
            if step == 20:
                raise KeyboardInterrupt
            yield token

    with monkeypatch.context() as patch:
        patch.setattr(command, "generate_batch_stream", interrupted)
        assert cli.main(["generate", "--model", str(model), *arguments]) == 130
    left = (tmp_path / "out").read_bytes()
    assert left.endswith(b"\n")
    assert whole.startswith(left)
    run(capsys, model, *arguments)
    assert (tmp_path / "out").read_bytes() == whole


def test_answers_to_something_else_are_left_alone(capsys, model, prompts, tmp_path):
    out, beside = tmp_path / "out", tmp_path / "out.settings.json"
    run(capsys, model, *with_output(prompts, out, "--stop", "x"))
    whole, settings = out.read_bytes(), beside.read_bytes()
    torch.manual_seed(1)
    fastgpt.GPTModel(CONFIG).save_pretrained(tmp_path / "other")
    (tmp_path / "longer.txt").write_text(prompts.read_text() + "\nanother")

    def refused(message, *more, file=prompts, left=whole):
        out.write_bytes(left)
        arguments = with_output(file, out, "--stop", "x", *more)
        assert cli.main(["generate", "--model", str(model), *arguments]) == 2
        said = capsys.readouterr()
        assert said.err.startswith(f"fastgpt generate: {message}")
        assert said.err.count("\n") == 1
        assert out.read_bytes() == left

    for option, value in (
        ("--seed", "5"),
        ("--temperature", "1.1"),
        ("--top-k", "400"),
        ("--top-p", "0.5"),
        ("--max-new-tokens", "7"),
        ("--stop", "y"),
        ("--format", "text"),
        ("--model", str(tmp_path / "other")),
    ):
        refused(f"{out} was written with another {option}; choose", option, value)
        refused(f"{out} was written with another {option}; choose", option, value, left=whole[:5])
    refused(f"{out} was written with another --prompts; choose", file=tmp_path / "longer.txt")
    both = "--temperature and --seed"
    refused(f"{out} was written with another {both};", "--seed", "5", "--temperature", "2")
    assert beside.read_bytes() == settings
    refused(f"{out} has 8 lines for 7 prompts", left=whole + b"one more\n")
    for broken in (b"", b"[]", settings[:-5]):
        beside.write_bytes(broken)
        refused(f"{out} exists, and no out.settings.json says how it was made")
    beside.unlink()
    refused(f"{out} exists, and no out.settings.json says how it was made", left=b"a diary")
    assert not beside.exists()


def test_one_process_writes_a_file(capsys, model, prompts, tmp_path):
    pytest.importorskip("fcntl")
    out = tmp_path / "out"
    out.touch()
    with only_writer(out):
        arguments = with_output(prompts, out)
        assert cli.main(["generate", "--model", str(model), *arguments]) == 2
    assert capsys.readouterr().err.endswith(f"another process is writing {out}\n")


def test_a_terminal_shows_a_bar_and_the_output_stays_its_own(
    capsys, model, prompts, tmp_path, monkeypatch
):
    pytest.importorskip("rich")
    shown = io.StringIO()
    shown.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    printed = run(capsys, model, "--prompts", str(prompts), *SAMPLED)[0]
    assert printed.count("\n") == len(PROMPTS)
    for line in printed.splitlines():
        json.loads(line)
    assert "7/7" in shown.getvalue()
    assert re.search(r"42 tokens in .* tokens/s\n$", shown.getvalue())
    shown.truncate(0)
    run(capsys, model, *with_output(prompts, tmp_path / "out"))
    assert "7/7" in shown.getvalue()
    assert (tmp_path / "out").read_text(encoding="utf-8") == printed


def test_what_cannot_be(capsys, model, tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "empty").write_bytes(b"")
    for name, text in (
        ("none.json", " []"),
        ("none.jsonl", "\n\n"),
        ("broken.json", '[{"prompt": "a"},\n x]'),
        ("broken.jsonl", '{"prompt": "a"}\n\n{"prompt": '),
        ("deep.jsonl", '{"prompt": ' + "[" * 100_000),
        ("number.json", '[{"prompt": "a"}, 7]'),
        ("neither.jsonl", '{"input": "a", "output": "b"}'),
        ("null.jsonl", '{"prompt": "a"}\n{"prompt": null}'),
        ("input.json", '[{"instruction": "a", "input": 3}]'),
        ("half.jsonl", '{"prompt": "a", "id": "\\ud83d"}'),
    ):
        (tmp_path / name).write_text(text)
    (tmp_path / "ok").write_text("a\nb\n")
    ok = ("--prompts", str(tmp_path / "ok"))
    small = tmp_path / "small"
    small.mkdir()
    fastgpt.GPTModel(CONFIG | {"vocab_size": 256}).save_pretrained(small)
    for arguments, message in (
        ([], "give either a prompt or --prompts FILE"),
        (["x", "--prompts", "y"], "give either a prompt or --prompts FILE"),
        (["--prompts", str(tmp_path / "gone")], "No such file"),
        (["--prompts", str(tmp_path / "latin")], "is not UTF-8 text"),
        (["--prompts", str(tmp_path / "empty")], "is empty"),
        *(
            (["--prompts", str(tmp_path / name)], f"{name}{message}")
            for name, message in (
                ("none.json", " contains no prompts"),
                ("none.jsonl", " contains no prompts"),
                ("broken.json", " is not JSON: Expecting value: line 2 column 2"),
                ("broken.jsonl", ", line 3, is not JSON: Expecting value"),
                ("deep.jsonl", ", line 1, is not JSON: "),
                ("number.json", ', entry 2, is not an object with a "prompt" or an "instruction"'),
                ("neither.jsonl", ', line 1, is not an object with a "prompt"'),
                ("null.jsonl", ', line 2: "prompt" is not a string'),
                ("input.json", ', entry 1: "input" is not a string'),
                ("half.jsonl", ", line 1, contains half a surrogate pair"),
            )
        ),
        (["x", "--output", "y"], "--output and --format need --prompts FILE"),
        (["x", "--format", "text"], "--output and --format need --prompts FILE"),
        ([*ok, "--output", str(tmp_path)], "Is a directory"),
        ([*ok, "--output", str(tmp_path / "gone" / "out")], "No such file or directory"),
        ([*ok, "--seed", str((1 << 64) - 1)], f"--seed {(1 << 64) - 1} is too large for 2 prompts"),
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
