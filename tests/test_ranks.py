"""torchrun: two processes do what one does, and go on after a kill."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import generate
import mulcot
import train

FEW = ["--batch", "3", "--accumulate", "2", "--epochs", "2", "--lr", "0.01", "--log-every", "1",
       "--save-every", "1", "--dropout", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def chains(toy, posts, tmp_path_factory):
    """13 rows with chains, one without an image: steps of 6, 6 and 1, so one process idles."""
    path = tmp_path_factory.mktemp("ranks") / "chains.jsonl"
    lines = []
    for i, post in enumerate(posts[:13]):
        said = f"It says {post.text}." * (1 + i % 3)
        fields = [said, "A face.", "They agree.", "So.", post.label]
        cot = mulcot.render_reasoning(dict(zip(mulcot.FIELDS, fields)))
        row = post.row() | dict(cot=cot, split="train")
        row.pop("image") if i == 4 else None
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return path


def training(toy, chains, out):
    return ["assistant", "--data", str(chains), "--images", str(toy / "images"), "--dev",
            str(toy / "posts.jsonl"), "--model", str(toy / "assistant"), "--out", str(out), *FEW]


def torchrun(script, argv, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", str(ROOT / script), *argv]
    env = os.environ | dict(OMP_NUM_THREADS="1")
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True, **options)


def finished(process):
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err[-3000:]
    return out


def log_of(folder):
    return [{k: v for k, v in row.items() if k != "tokens_per_s"}
            for row in mulcot.read_rows(folder / "log.jsonl")]


def test_two_processes_train_as_one(toy, chains, tmp_path):
    """Loss curve, gradients' norm, dev numbers and weights, although a share may be empty; killed
    and started again too."""
    assert train.main(training(toy, chains, tmp_path / "one")) == 0
    out = tmp_path / "two"
    process = torchrun("train.py", training(toy, chains, out))
    deadline = time.time() + 120
    while not mulcot.read_rows(out / "log.jsonl")[1:]:
        assert time.time() < deadline and process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on; workers have sessions of their own
    process.communicate(timeout=60)
    begun = torch.load(out / "state.pt", weights_only=True)
    assert not begun["finished"] and len(begun["drawn"]) == 2
    said = finished(torchrun("train.py", training(toy, chains, out)))
    assert said.count("resumed") == 1 and said.count("best dev accuracy") == 1
    one, two = log_of(tmp_path / "one"), log_of(out)
    assert len(one) == len(two) == 8
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    a, b = (torch.load(f / "state.pt", weights_only=True)["trained"]
            for f in (tmp_path / "one", out))
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


def test_two_processes_write_the_rows_of_one(toy, chains, tmp_path, monkeypatch):
    """predict and soft labels: the union is the single run's, and what a killed run left behind
    in a process's own file is kept."""
    predict = ["predict", "--data", str(toy / "posts.jsonl"), "--model", str(toy / "student"),
               "--batch", "4", "--max-new-tokens", "6", "--out"]
    assert generate.main([*predict, str(tmp_path / "one.jsonl")]) == 0
    one = {row["id"]: row for row in mulcot.read_rows(tmp_path / "one.jsonl")}
    left = next(iter(one.values())) | dict(raw="kept from before")
    (tmp_path / "two.rank16.jsonl").write_text('{"id": "of another run"}\n')
    (tmp_path / "two.jsonl").touch()
    (tmp_path / "two.settings.json").write_bytes((tmp_path / "one.settings.json").read_bytes())
    (tmp_path / "two.of-process-1.jsonl").write_text(json.dumps(left) + '\n{"id": "torn')
    said = finished(torchrun("generate.py", [*predict, str(tmp_path / "two.jsonl")]))
    assert "wrote 24 rows" in said and not (tmp_path / "two.of-process-1.jsonl").exists()
    assert (tmp_path / "two.rank16.jsonl").exists()
    two = mulcot.read_rows(tmp_path / "two.jsonl")
    assert len(two) == 24 and two[0]["raw"] == "kept from before"
    drop = lambda row: {k: v for k, v in row.items() if k != "seconds"}
    assert all(drop(row) == drop(one[row["id"]]) for row in two[1:])
    soft = ["soft", "--data", str(chains), "--images", str(toy / "images"), "--model",
            str(toy / "assistant"), "--batch", "4", "--out"]
    assert generate.main([*soft, str(tmp_path / "s1")]) == 0
    finished(torchrun("generate.py", [*soft, str(tmp_path / "s2")]))
    s1, s2 = (mulcot.SoftLabels(tmp_path / f) for f in ("s1", "s2"))
    assert s1.index.keys() == s2.index.keys() and s1.about == s2.about
    for name in s1.index:
        assert torch.equal(s1.read(name)[0], s2.read(name)[0])


def test_two_processes_share_the_members(toy, tmp_path):
    """The first trains member 0, the second members 1 and 2; together they are what one process
    trains."""
    data = str(toy / "posts.jsonl")
    ubm = ["ubm", "--data", data, "--dev", data, "--text-encoder", "tiny", "--epochs", "1",
           "--members", "3", "--batch", "4", "--device", "cpu", "--out"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun sets it
    assert train.main([*ubm, str(tmp_path / "one")]) == 0
    torch.set_num_threads(threads)
    assert "3 members together" in finished(torchrun("train.py", [*ubm, str(tmp_path / "two")]))
    one, two = (mulcot.load_ubm(tmp_path / name) for name in ("one", "two"))
    assert one.temperature == two.temperature
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def test_what_needs_one_process_says_so(monkeypatch, tmp_path, capsys):
    """An endpoint has its workers; the toy set is written once."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert generate.main(["toy", "--out", str(tmp_path)]) == 2
    assert train.main(["--out", str(tmp_path)]) == 2
    assert "one process" in capsys.readouterr().err
