"""What a cascade's stage counts: its error on dev, its thresholds, its passes and seconds, with a
UBM and an MLLM whose answers are given."""

import json
import time
from types import SimpleNamespace

import pytest
import torch

import generate
import mulcot

MLLM = [0.01, 0.01, 0.98]  # says positive of every post, surely


class GivenUBM:
    """probs of a post by its text."""

    def __init__(self, classes, probs):
        self.classes, self.given = classes, probs
        self.target = "label" if classes == mulcot.LABELS else "score"

    def probs(self, posts):
        time.sleep(0.002)  # so that it costs seconds
        return torch.tensor([self.given[post.text] for post in posts])

    def tokenizer(self, *texts):
        return SimpleNamespace(input_ids=[1, 2, 3])


@pytest.fixture
def cascade(toy, tmp_path, monkeypatch):
    """cascade(UBM, dev rows, test rows, budget) -> (cascade.json, rows, questions that the MLLM was
    asked, on dev and test)."""
    asked = []

    def score_labels(model, batch):
        asked.extend(batch.input_ids)
        return torch.tensor(MLLM).log().expand(len(batch.input_ids), 3)

    def start(ubm, dev, test, budget):
        monkeypatch.setattr(generate, "load_ubm", lambda *_: ubm)
        mulcot.write_rows(tmp_path / "dev.jsonl", dev)
        mulcot.write_rows(tmp_path / "test.jsonl", test)
        out = tmp_path / "rows.jsonl"
        assert generate.main([
            "cascade", "--ubm", "given", "--mllm", f"{toy}/student", "--dev",
            f"{tmp_path}/dev.jsonl", "--data", f"{tmp_path}/test.jsonl", "--out", str(out),
            "--device", "cpu", "--budget", str(budget)]) == 0
        summary = json.loads((tmp_path / "rows.cascade.json").read_text())
        return summary, mulcot.read_rows(out), len(asked)

    monkeypatch.setattr(generate, "score_labels", score_labels)
    return start


def test_labels_by_hand(cascade):
    """Ten posts, all positive. The UBM says so of six, ever less surely, and says negative of the
    other four, less surely still: a budget of 0.4 passes buys every error back. The judged posts
    are as those of dev, so six stay with the UBM and four are the MLLM's. Asked are, on dev, ten
    posts, and four of them again; then no more than those four of test."""
    said = {f"a day {n}": [0.02 + 0.03 * n, 0.02, 0.96 - 0.03 * n] for n in range(6)}
    said |= {f"a day {n}": [0.38, 0.3, 0.32] for n in range(6, 10)}
    rows = {name: [dict(id=f"{name}-{n}", text=text, label="positive")
                   for n, text in enumerate(said)] for name in ("dev", "test")}
    summary, rows, asked = cascade(GivenUBM(mulcot.LABELS, said), rows["dev"], rows["test"], 0.4)
    assert asked == 10 + 4 + 4
    assert (summary["dev_passes"], summary["dev_error"]) == pytest.approx((0.4, 0.0))
    u = mulcot.uncertainty(torch.tensor(said["a day 5"])).item()
    assert summary["taus"] == pytest.approx([u, 1.0], abs=1e-5)  # the MLLM is always sure enough
    assert summary["routes"] == dict(ubm=6, mllm=4)
    assert [row["prediction"] for row in rows] == ["positive"] * 10
    assert all(row["passes"]["ubm"]["tokens"] == 3 for row in rows)  # as GivenUBM's tokenizer has
    assert summary["costs"]["passes"] == pytest.approx(0.4)
    spent = [stage["seconds"] for row in rows for stage in row["passes"].values()]
    assert summary["costs"]["seconds"] == pytest.approx(sum(spent) / 10) and sum(spent) > 0.02


@pytest.mark.parametrize("classes, said, golds, error", [
    (mulcot.LABELS, ([0.1, 0.1, 0.8], [0.1, 0.8, 0.1], [0.8, 0.1, 0.1], [0.2, 0.2, 0.6]),
     ("positive", "neutral", "negative", "negative"), 1 / 4),
    (mulcot.SCORE_BINS, [[1 / 7] * 7] * 3, (-2.0, 1.0, 3.0), (2 + 1 + 3) / 3)])
def test_errors_on_dev(cascade, classes, said, golds, error):
    """Without a budget the UBM answers alone, also a post less sure than any of dev: wrong labels
    are counted, scores are distances (one that knows nothing says 0)."""
    name = "label" if classes == mulcot.LABELS else "score"
    dev = [{"id": text, "text": text, name: gold} for text, gold in zip("abcd", golds)]
    ubm = GivenUBM(classes, dict(zip("abcd", said)) | dict(e=[1 / len(classes)] * len(classes)))
    summary, _, _ = cascade(ubm, dev, [dict(id="t", text="e")], 0)
    assert summary["routes"] == dict(ubm=1)
    assert (summary["dev_passes"], summary["dev_error"]) == (0, pytest.approx(error))
