"""torchrun: two processes do what one does, and go on after a kill."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, chain
from test_pipeline import rows as without_clock

import generate
import mulcot
import train

FEW = ["--batch", "3", "--accumulate", "2", "--epochs", "2", "--lr", "0.01", "--log-every", "1",
       "--save-every", "1", "--dropout", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def chains(toy, posts, tmp_path_factory):
    """13 rows with chains, one without an image: steps of 6, 6 and 1, so one process idles."""
    path = tmp_path_factory.mktemp("ranks") / "chains.jsonl"
    rows = []
    for i, post in enumerate(posts[:13]):
        cot = chain(post.label, f"It says {post.text}." * (1 + i % 3))
        rows.append(post.row() | dict(cot=cot, split="train"))
    del rows[4]["image"]
    mulcot.write_rows(path, rows)
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


def test_two_processes_train_as_one(toy, chains, tmp_path):
    """Loss curve, gradients' norm, dev numbers and weights, although a process may idle; killed and
    started again too."""
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
    assert begun["step"] < 6 and len(begun["processes"]) == 2
    printed = finished(torchrun("train.py", training(toy, chains, out)))
    assert printed.count("resumed") == 1 and printed.count("best dev accuracy") == 1
    one, two = (without_clock(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 8
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    a, b = (torch.load(f / "state.pt", weights_only=True)["trained"]
            for f in (tmp_path / "one", out))
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


def test_two_processes_write_the_rows_of_one(toy, chains, tmp_path):
    """predict and soft labels: the rows are the single run's, in its order, and those that a killed
    run wrote are kept."""
    predict = ["predict", "--data", str(toy / "posts.jsonl"), "--split", "all", "--model",
               str(toy / "student"), "--batch", "4", "--max-new-tokens", "6", "--out"]
    assert generate.main([*predict, str(tmp_path / "one.jsonl")]) == 0
    one = without_clock(tmp_path / "one.jsonl")
    mulcot.write_rows(tmp_path / "two.jsonl", [one[0] | dict(raw="kept from before")])
    with open(tmp_path / "two.jsonl", "a") as file:
        file.write('{"id": "torn')
    (tmp_path / "two.settings.json").write_bytes((tmp_path / "one.settings.json").read_bytes())
    printed = finished(torchrun("generate.py", [*predict, str(tmp_path / "two.jsonl")]))
    assert printed.count("wrote 24 rows") == 1
    two = without_clock(tmp_path / "two.jsonl")
    assert two == [one[0] | dict(raw="kept from before"), *one[1:]]
    soft = ["soft", "--data", str(chains), "--images", str(toy / "images"), "--model",
            str(toy / "assistant"), "--batch", "4", "--out"]
    assert generate.main([*soft, str(tmp_path / "s1")]) == 0
    finished(torchrun("generate.py", [*soft, str(tmp_path / "s2")]))
    s1, s2 = (mulcot.SoftLabels(tmp_path / name) for name in ("s1", "s2"))
    s1.settings.pop("command"), s2.settings.pop("command")
    assert s1.parts.keys() == s2.parts.keys() and s1.settings == s2.settings
    assert all(torch.equal(s1.parts[name].get_tensor(name), s2.parts[name].get_tensor(name))
               for name in s1.parts)


def test_two_processes_share_the_members(toy, encoders, tmp_path):
    """The first trains members 0 and 2, the second member 1; together they are what one process
    trains."""
    data = str(toy / "posts.jsonl")
    ubm = ["ubm", "--data", data, "--dev", data, "--text-encoder", f"{encoders}/text",
           "--epochs", "1", "--members", "3", "--batch", "4", "--device", "cpu", "--out"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun sets it
    assert train.main([*ubm, str(tmp_path / "one")]) == 0
    torch.set_num_threads(threads)
    assert "3 members together" in finished(torchrun("train.py", [*ubm, str(tmp_path / "two")]))
    one, two = (generate.load_ubm(tmp_path / name) for name in ("one", "two"))
    assert one.temperature == two.temperature
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def test_processes_that_cannot_be_are_refused(toy, monkeypatch, tmp_path, capsys):
    """An endpoint has its workers; the whole road is walked once; too few GPUs are refused by every
    process alike, before the first of them waits for the others."""
    for name, value in dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", LOCAL_RANK="0").items():
        monkeypatch.setenv(name, value)
    teacher = ["teacher", "--data", str(toy / "posts.jsonl"), "--model", "big", "--endpoint",
               "https://example.com/v1", "--out", str(tmp_path / "chains.jsonl")]
    for script, argv in ((generate, teacher), (train, ["--out", str(tmp_path)])):
        assert script.main(argv) == 2 and "one process" in capsys.readouterr().err
    assert not any(tmp_path.glob("[!.]*"))
    with pytest.raises(mulcot.InputError, match="2 processes need 2 GPUs here, 0 found"):
        mulcot.init_distributed("cuda")
