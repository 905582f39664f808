"""Damaged and hostile files of every kind that fastgpt reads: the content or one sentence.

Each is read in a process of its own, which may neither hang nor take memory, and in which nothing
of the file may run.
"""

import copy
import functools
import json
import os
import pickle
import shutil
import sys
import zipfile

import pytest
import torch
from forked import Server
from hypothesis import given
from hypothesis import strategies as st
from pairs import CONFIG, pair
from reports import full_document
from runs import needs_table, write_inputs

from fuzz.readers import Hostile
from fuzz.tried import count

safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the limits of Linux")

MEMORY = 64 << 20  # what a file of some hundred kilobytes may take; imports are in it
MODULES = ("fastgpt.cli", "fastgpt.training.run_setup", "safetensors.torch", "fuzz.readers")
MODULES += ("matplotlib.figure", "jinja2", "fastgpt.bench.charts", "fastgpt.bench.page")
MODULES += ("torch._dynamo", "huggingface_hub")
CFG = CONFIG | {"emb_dim": 32, "n_heads": 2, "n_layers": 1}
# Values that a JSON file may have where another belongs.
VALUES = st.sampled_from(
    [None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"), "", "1", "..",
     "\ud800", "\0", "x" * 5000, [], [[]], {}, {"a": 1}, [2**62, 4], [-1], "../model.safetensors",
     "/etc/passwd", "F64", "BOOL", "F8_E4M3", [0, 1], [0, 2**63]]
)  # fmt: skip


@pytest.fixture(scope="module")
def forked():
    server = Server(*MODULES, HF_HUB_OFFLINE="1")
    yield server
    server.close()


def _weights(folder):
    """A folder of each form of weights, in each the names of its files."""
    model, _ = pair(CFG)
    model.save_pretrained(folder / "safetensors")
    (folder / "shards").mkdir()
    state = safetensors.load_file(folder / "safetensors" / NAME)
    parts = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(state)}
    for part in set(parts.values()):
        chosen = {name: t for name, t in state.items() if parts[name] == part}
        safetensors.save_file(chosen, folder / "shards" / part)
    (folder / "shards" / f"{NAME}.index.json").write_text(json.dumps({"weight_map": parts}))
    shutil.copy(folder / "safetensors" / "config.json", folder / "shards")
    for name, whole in (("zip", True), ("legacy", False)):
        (folder / name).mkdir()
        content = {"model_state_dict": model.state_dict(), "optimizer_state_dict": {"state": {}}}
        path = folder / name / "model.pth"
        torch.save(content, path, _use_new_zipfile_serialization=whole)
        (folder / name / "config.json").write_text(json.dumps(CFG))
    import fastgpt

    fastgpt.quantize(model, "int4").save_pretrained(folder / "quantised")


NAME = "model.safetensors"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    _weights(folder)
    return folder


def bytes_damaged(draw, data):
    """The bytes, with one kind of damage."""
    data, size = bytearray(data), len(data)
    how = draw(st.sampled_from(["cut", "flip", "zero", "swap", "grow", "empty", "noise", "repeat"]))
    at = st.integers(0, max(0, size - 1)) | st.integers(0, min(size, 600)).map(lambda n: n)
    at = at | st.integers(max(0, size - 300), max(0, size - 1))
    a, b = sorted((draw(at), draw(at)))
    if how == "cut":
        del data[a:]
    elif how == "flip" and size:
        for _ in range(draw(st.integers(1, 4))):
            data[min(draw(at), size - 1)] ^= 1 << draw(st.integers(0, 7))
    elif how == "zero":
        data[a:b] = bytes(b - a)
    elif how == "swap":
        data = data[b:] + data[a:b] + data[:a]
    elif how == "grow":
        data[a:a] = draw(st.binary(min_size=1, max_size=64))
    elif how == "empty":
        data = bytearray()
    elif how == "noise":
        data[a : a + 32] = draw(st.binary(min_size=32, max_size=32))
    else:
        data = data + data
    return bytes(data), how


def _set_somewhere(draw, tree):
    """Replaces, removes or adds something at a drawn place of what JSON holds."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            return
        key = draw(st.sampled_from(keys))
        if isinstance(tree[key], (dict, list)) and tree[key] and draw(st.integers(0, 4)):
            tree = tree[key]
            continue
        how = draw(st.integers(0, 3))
        if how == 0:
            del tree[key]
        else:
            tree[key] = copy.deepcopy(draw(VALUES))  # the next damage may be inside
        return


def json_damaged(draw, text):
    """The text of a JSON file, damaged: a value, or as a whole."""
    how = draw(st.sampled_from(["value", "value", "value", "deep", "digits", "twice", "encoding"]))
    if how == "value":
        tree = [json.loads(text)]
        for _ in range(draw(st.integers(1, 3))):
            _set_somewhere(draw, tree)
        return json.dumps(tree[0] if tree else None).encode(), how
    if how == "deep":
        opening = draw(st.sampled_from(["[", '{"a":']))
        return (opening * draw(st.sampled_from([500, 5000, 200_000]))).encode(), how
    if how == "digits":
        return text.replace("1", "1" * draw(st.sampled_from([30, 5000])), 1).encode(), how
    if how == "twice":
        return (text.rstrip()[:-1] + ', "model_type": 1, "n_embd": "x"}').encode(), how
    return text.encode(draw(st.sampled_from(["utf-16", "utf-32"]))), how


def header_damaged(draw, data):
    """A safetensors file with another header."""
    size = int.from_bytes(data[:8], "little")
    header, how = json_damaged(draw, data[8 : 8 + size].decode())
    length = draw(st.sampled_from([len(header)] * 6 + [2**63, 2**64 - 1, 0, 1 << 27]))
    return length.to_bytes(8, "little") + header + data[8 + size :], f"header, {how}"


def other_kind(draw, path):
    """Something else in the place of a file."""
    path.unlink()
    how = draw(st.sampled_from(["folder", "loop", "pipe", "device", "dangling"]))
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    else:
        target = {"loop": path.name, "device": "/dev/zero", "dangling": "nowhere"}[how]
        path.symlink_to(target)
    return how


def pickle_damaged(draw, path, mark):
    """A torch file with another content, or packed otherwise."""
    how = draw(st.sampled_from(sorted(PICKLES)))
    PICKLES[how](path, mark)
    return how


def _packed(path, mark, how=zipfile.ZIP_DEFLATED, extra=0):
    with zipfile.ZipFile(path) as old:
        entries = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(path, "w", how) as new:
        for name, data in entries.items():
            new.writestr(name, data + bytes(extra) * name.endswith("data.pkl"))


def _state(change):
    def write(path, mark):
        state = torch.load(path, weights_only=True)["model_state_dict"]
        change(state)
        torch.save(state, path)

    return write


PICKLES = {
    "compressed": _packed,
    "bomb": functools.partial(_packed, extra=1 << 28),
    "code": lambda path, mark: torch.save({"a": Hostile(mark)}, path),
    "code, legacy": lambda path, mark: path.write_bytes(pickle.dumps(Hostile(mark))),
    "numbers as names": _state(lambda state: state.update({1: torch.zeros(2)})),
    "sparse": _state(
        lambda s: s.update({"pos_emb.weight": torch.eye(32).to_sparse()})
    ),
    "on meta": _state(
        lambda s: s.update({"pos_emb.weight": torch.empty(32, 32, device="meta")})
    ),
    "expanded": _state(
        lambda s: s.update(
            {"tok_emb.weight": torch.zeros(1).expand(1 << 22, 32)}
            | {"out_head.weight": torch.zeros(1).expand(1 << 22, 32)}
        )
    ),
    "complex": _state(lambda s: s.update({"pos_emb.weight": torch.zeros(32, 32) * 1j})),
    "layers": _state(lambda s: s.update({"trf_blocks.99999999.norm1.scale": torch.ones(32)})),
}  # fmt: skip


def damaged(draw, path, mark):
    """Damages one file; the kind of damage."""
    if draw(st.integers(0, 12)) == 0:
        return other_kind(draw, path)
    if path.suffix in (".pth", ".pt") and zipfile.is_zipfile(path) and draw(st.booleans()):
        return pickle_damaged(draw, path, mark)
    data = path.read_bytes()
    if path.suffix == ".json" and draw(st.integers(0, 3)):
        data, how = json_damaged(draw, data.decode())
    elif path.suffix == ".safetensors" and draw(st.booleans()):
        data, how = header_damaged(draw, data)
    else:
        data, how = bytes_damaged(draw, data)
    path.write_bytes(data)
    return how


@given(data=st.data())
def test_weights(forked, weights, tmp_path_factory, data):
    kind = data.draw(st.sampled_from(["safetensors", "shards", "zip", "legacy", "quantised"]))
    place = tmp_path_factory.mktemp("damaged") / kind
    shutil.copytree(weights / kind, place)
    path = data.draw(st.sampled_from(sorted(place.iterdir())))
    how = damaged(data.draw, path, place.parent / "mark")
    single = data.draw(st.booleans()) and not path.name.startswith(("part", "config"))
    outcome = forked.call("fuzz.readers", "load", str(path if single else place), CFG, seconds=20)
    assert outcome.code == 0, (path.name, how, outcome.code, outcome.said[-3000:])
    assert outcome.memory < MEMORY, (path.name, how, outcome.memory)
    assert not (place.parent / "mark").exists()
    for said in outcome.value:
        assert not {"alloc", "Traceback"} & set(said.split()), said
    if how in ("compressed", "bomb", "empty", "deep"):
        assert all(outcome.value) or kind == "legacy" or path.name == "config.json", how
    count(f"weights: {kind}/{path.name}" if path.suffix == ".json" else f"weights: {kind}")
    shutil.rmtree(place.parent)


@pytest.fixture(scope="module")
def things(tmp_path_factory, forked):
    """A run of two steps, a report, prompts with two of their answers."""
    needs_table()
    folder = tmp_path_factory.mktemp("things")
    write_inputs(folder, 300, emb_dim=8, n_layers=1)
    arguments = ["train", folder / "text.txt", "--out", folder / "run", "--steps", 2, "--batch", 2]
    arguments += ["--config", folder / "config.json"]
    outcome = forked.call("fuzz.readers", "command", [str(a) for a in arguments])
    assert outcome.value == 0, outcome.said
    document = full_document()
    document |= {"works": document["works"][:1], "agree": True}
    (folder / "report.json").write_text(json.dumps(document))
    entries = [{"prompt": "a"}, {"instruction": "b", "input": "c"}]
    (folder / "prompts.json").write_text(json.dumps(entries))
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return folder


def _arguments(kind, place):
    if kind == "resume":
        return ["train", "--out", place / "run", "--resume", "--steps", 3]
    if kind == "train":
        more = ["--config", place / "config.json", "--steps", 1]
        return ["train", place / "text.txt", "--out", place / "new", *more]
    if kind == "report":
        return ["bench", "--from", place / "report.json", "--out", place / "report.html"]
    more = ["--prompts", place / kind, "--max-new-tokens", 1, "--output", place / "answers"]
    return ["generate", "--model", place / "run", *more]


@given(data=st.data())
def test_commands(forked, things, tmp_path_factory, data):
    kind = data.draw(
        st.sampled_from(["resume", "resume", "train", "report", "prompts.json", "prompts.jsonl"])
    )
    place = tmp_path_factory.mktemp("damaged") / "things"
    shutil.copytree(things, place)
    # run.json names where the tokens were, and looks beside itself only if they are gone.
    run = place / "run" / "run.json"
    run.write_text(run.read_text().replace(str(things), str(place)))
    read = {
        "resume": [path for path in (place / "run").rglob("*") if path.suffix != ".png"],
        "train": [place / "config.json", place / "text.txt"],
        "report": [place / "report.json"],
    }.get(kind, [place / kind])
    path = data.draw(st.sampled_from(sorted(path for path in read if path.is_file())))
    if path.suffix == ".jsonl":
        data_, how = bytes_damaged(data.draw, path.read_bytes())
        path.write_bytes(data_)
    else:
        how = damaged(data.draw, path, place.parent / "mark")
    if how == "pipe" and kind != "resume":
        return  # is waited for, as the shell's are
    arguments = [str(argument) for argument in _arguments(kind, place)]
    outcome = forked.call("fuzz.readers", "command", arguments, seconds=60)
    told = (path.name, how, outcome.code, outcome.value, outcome.said[-3000:])
    assert outcome.code == 0, told
    assert outcome.value in (0, 1, 2), told
    lines = [line for line in outcome.said.splitlines() if line.startswith("fastgpt ")]
    assert len(lines) == (outcome.value != 0), told
    assert "Traceback" not in outcome.said, told
    assert not (place.parent / "mark").exists()
    count(f"{kind}: {path.name}"[:40])
    shutil.rmtree(place.parent)
