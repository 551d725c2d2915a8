"""Preference training on chains: the loss, the pairs, the samples they come from, a dpo run."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import generate
import mulcot
import toy as toy_world
import train
from mulcot import LABELS, InputError, preference_loss, preference_margin

# METHOD's check: log π_c -12, log ref_c -14, log π_r -15, log ref_r -13, 24 tokens
CHECK = [torch.tensor([x]) for x in (-12.0, -15.0, -14.0, -13.0)]
TOKENS = torch.tensor([24])


# ---- the loss


def test_check_values():
    """Δ = 4, at β 0.1: DPO 0.5130, RPO 1.0130."""
    assert preference_margin(*CHECK, beta=0.1).item() == pytest.approx(0.4)
    assert preference_loss(*CHECK, TOKENS, beta=0.1, alpha=0.0).item() == pytest.approx(
        0.5130, abs=5e-5)
    assert preference_loss(*CHECK, TOKENS).item() == pytest.approx(1.0130, abs=5e-5)


def test_gradient_is_that_of_the_written_out_formula():
    """And the value is the sum over the pairs; far pairs neither overflow nor vanish."""
    g = torch.Generator().manual_seed(1)
    pairs = [(-50 * torch.rand(6, generator=g, dtype=torch.float64)).requires_grad_(n < 2)
             for n in range(4)]
    tokens = torch.randint(20, 90, (6,), generator=g)
    c, r, ref_c, ref_r = pairs
    for beta, alpha in ((0.1, 1.0), (0.5, 0.0), (0.3, 0.25)):
        delta = (c - ref_c) - (r - ref_r)
        written = (-torch.log(1 / (1 + torch.exp(-beta * delta))) - alpha * c / tokens).sum()
        loss = preference_loss(*pairs, tokens, beta, alpha)
        assert loss.item() == pytest.approx(written.item(), rel=1e-12)
        for a, b in zip(torch.autograd.grad(loss, (c, r)), torch.autograd.grad(written, (c, r))):
            assert torch.allclose(a, b, rtol=1e-10)
    far = [torch.tensor([x]) for x in (-9000.0, -1.0, -1.0, -9000.0)]
    assert preference_loss(*far, TOKENS, alpha=0.0).item() == pytest.approx(1799.8)


def pair_example(post, processor, which=(0, 1)):
    """The post with a right and a wrong chain, or with one of the two."""
    branches = [(mulcot.REASON_FORMAT, chain) for chain in chains(post, 0)]
    return mulcot.encode(post, [branches[n] for n in which], processor)


def test_shared_row_equals_two_passes_and_gradients_too(student, posts, monkeypatch):
    """log π of both chains behind one prefix, in chunks of 7 positions, against a plain pass each
    over all logits at once."""
    model, processor = student
    monkeypatch.setattr(mulcot, "CHUNK_LOGITS", 7 * model.lm_head.out_features)
    batch = mulcot.collate([pair_example(p, processor) for p in posts[:3]], processor.pad_id)
    hidden = mulcot.forward_branches(model, batch).detach().requires_grad_()
    got = mulcot.answer_log_probs(model, batch, hidden)
    for branch in (1, 2):
        alone = mulcot.collate([pair_example(p, processor, (branch - 1,)) for p in posts[:3]],
                               processor.pad_id)
        with torch.no_grad():
            logits = model.lm_head(mulcot.forward_branches(model, alone))
        log_p = -F.cross_entropy(logits.mT, alone.targets, reduction="none").sum(1)
        assert torch.allclose(got[:, branch - 1], log_p, rtol=1e-5)
    at = batch.targets != -100
    dense = -F.cross_entropy(model.lm_head(hidden[at]), batch.targets[at], reduction="none")
    weight = torch.tensor([[1.0, -2.0], [0.5, 3.0], [-1.0, 0.25]])
    each = weight[at.nonzero()[:, 0], batch.branch_ids[at] - 1]
    (a,) = torch.autograd.grad((got * weight).sum(), hidden)
    (b,) = torch.autograd.grad((dense * each).sum(), hidden)
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)


# ---- samples


def rows(path):
    """Rows of a file without what a clock decides."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")}
            for row in mulcot.read_rows(path)]


def samples(toy, out, k, *more):
    return generate.main(["augment", "--data", str(toy / "posts.jsonl"), "--model",
                          str(toy / "student"), "--max-new-tokens", "6", "--batch", "5",
                          "--samples", str(k), "--out", str(out), *more])


def test_one_sample_is_todays_and_more_are_added(toy, student, tmp_path):
    """K = 1 draws from the seeds it always did, and its rows have no new column; K = 3 begins with
    the same rows, then come two more draws a post."""
    assert samples(toy, tmp_path / "one.jsonl", 1) == 0
    one = rows(tmp_path / "one.rejects.jsonl")
    posts = [p for p in mulcot.read_posts(toy / "posts.jsonl") if p.split == "train"]
    order = sorted(posts, key=lambda post: len(post.text))
    model, processor = student
    for n, part in enumerate(mulcot.chunks(order, 5)):
        torch.manual_seed(42 * 100_003 + n)
        batch = mulcot.encode_batch(part, [(mulcot.REASON_FORMAT, None)], model, processor)
        texts = mulcot.generate_text(model, processor, batch, 6, 0.7)
        got = {row["id"]: row["raw"] for row in one}
        assert [got[post.id] for post in part] == [text for text, _ in texts]
    assert len(one) == 12 and not any("post_id" in row for row in one)

    assert samples(toy, tmp_path / "three.jsonl", 3) == 0
    three = rows(tmp_path / "three.rejects.jsonl")
    assert three[:12] == one and len(three) == 36
    by_post = {}
    for row in three[12:]:
        assert row["id"].startswith(row["post_id"] + "#")
        by_post.setdefault(row["post_id"], {})[row["id"]] = row["raw"]
    assert set(by_post) == {row["id"] for row in one} and all(map(len, by_post.values()))
    draws = [[row["raw"] for row in three[n : n + 12]] for n in (0, 12, 24)]
    assert draws[0] != draws[1] != draws[2] != draws[0]

    # a finished --out of one sample grows to three
    assert samples(toy, tmp_path / "one.jsonl", 3) == 0
    assert rows(tmp_path / "one.rejects.jsonl") == three


def test_samples_resume_after_a_kill(toy, tmp_path):
    """Cut within the second draw and within a row: completed to the same rows."""
    assert samples(toy, tmp_path / "a.jsonl", 3) == 0
    for end in ("jsonl", "settings.json"):
        shutil.copy(tmp_path / f"a.{end}", tmp_path / f"b.{end}")
    lines = (tmp_path / "a.rejects.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "b.rejects.jsonl").write_bytes(b"".join(lines[:16]) + lines[16][:30])
    assert samples(toy, tmp_path / "b.jsonl", 3) == 0
    assert rows(tmp_path / "a.rejects.jsonl") == rows(tmp_path / "b.rejects.jsonl")


def test_samples_of_samples_are_refused(toy, tmp_path, capsys):
    """Rows that are further samples already would give ids that say nothing."""
    row = dict(id="x#1", post_id="x", text="so nice", label="positive")
    mulcot.write_rows(tmp_path / "more.jsonl", [row])
    assert generate.main(["augment", "--data", str(tmp_path / "more.jsonl"), "--model",
                          str(toy / "student"), "--samples", "2", "--out",
                          str(tmp_path / "out.jsonl")]) == 2
    assert "one row a post" in capsys.readouterr().err


# ---- pairs


def chains(post, seed):
    """(a right chain, a wrong one) of a toy post."""
    facts, written = post.columns["facts"], []
    wrong = LABELS[(LABELS.index(post.label) + 1) % 3]
    for label in (post.label, wrong):
        fields = toy_world.toy_findings(post.aspect, facts["word"], facts["scene"], facts["words"],
                                        facts["mood"], label, random.Random(seed))
        written.append(mulcot.render_reasoning(fields))
    return written


@pytest.fixture(scope="module")
def world(toy, tmp_path_factory):
    """kept.jsonl and aside.jsonl as `augment --samples 3` leaves them, and adapter/ of a student:
    of 12 posts 8 have a pair, 1 has no wrong chain, 2 no right one, 1 neither."""
    out = tmp_path_factory.mktemp("preference")
    posts = [p for p in mulcot.read_posts(toy / "posts.jsonl") if p.split == "train"]
    kept, aside = [], [dict(where="posts.jsonl:99", problem="not a row")]
    for n, post in enumerate(posts):
        right, wrong = chains(post, n)
        row = post.row() | dict(source="assistant")
        more = dict(id=f"{post.id}#1", post_id=post.id)
        last = dict(id=f"{post.id}#2", post_id=post.id)
        if n < 9:
            kept += [row | dict(cot=right, raw=right)]
        if n < 8:
            aside += [row | more | dict(raw=wrong, problem="predicts another")]
            longer = wrong.replace("which is", "which is, as one may see and say,")
            aside += [row | last | dict(raw=longer, problem="predicts another")]
        if n == 8:  # no wrong chain: one is right, one cut off
            kept += [row | more | dict(cot=right, raw=right)]
            aside += [row | last | dict(raw=wrong, problem="truncated")]
        if n in (9, 10):
            aside += [row | dict(raw=wrong, problem="predicts another")]
        if n == 11:
            aside += [row | dict(raw=wrong[:60], problem="missing Prediction")]
    for name, table in (("kept", kept), ("aside", aside)):
        mulcot.write_rows(out / f"{name}.jsonl", table)
    shutil.copytree(toy / "images", out / "images")
    model, processor = mulcot.load_model(toy / "student")
    torch.manual_seed(5)
    mulcot.add_lora(model, rank=4, alpha=12, dropout=0.1)
    for layer in mulcot.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    mulcot.save_adapter(model, out / "adapter")
    processor.image_processor.size = dict(shortest_edge=3136, longest_edge=56 * 56)
    processor.image_processor.save_pretrained(out / "adapter")
    return out


def dpo_args(toy, world, out, *more):
    return ["dpo", "--data", f"{world}/kept.jsonl", "--rejected", f"{world}/aside.jsonl", "--dev",
            f"{toy}/posts.jsonl", "--adapter", f"{world}/adapter", "--batch", "2", "--accumulate",
            "2", "--log-every", "1", "--lr", "0.005", "--seed", "1", "--out", str(out), *more]


@pytest.fixture(scope="module")
def trained(toy, world, tmp_path_factory):
    """A whole run of dpo_args over 12 epochs."""
    out = tmp_path_factory.mktemp("run") / "dpo"
    assert train.main(dpo_args(toy, world, out, "--epochs", "12")) == 0
    return out


def test_pairs_are_the_nearest_wrong_chain_of_each_post(toy, world, trained, capsys):
    """Posts without a pair are counted; so are the rows that give none."""
    args = train.parse_args(dpo_args(toy, world, trained))
    stage = train.PreferenceStage(args, mulcot.load_processor(f"{world}/adapter"))
    items, rejects = mulcot.training_items(args.data, None, stage.branches_of)
    assert [post.id for post, _ in items] == [f"train-{n:04d}" for n in range(8)]
    for n, (post, branches) in enumerate(items):
        assert branches == [(mulcot.REASON_FORMAT, chain) for chain in chains(post, n)]
    assert [where.rpartition(" ")[2] for where, _ in rejects] == ["train-0008"]
    assert mulcot.read_rows(trained / "log.jsonl") and json.loads(
        (trained / "set_aside.json").read_text())[0][1].startswith("no wrong chain")
    capsys.readouterr()
    assert train.main(dpo_args(toy, world, trained, "--epochs", "12")) == 0  # finished
    assert ("data       12 posts: 8 pairs, 3 posts without a right chain, 1 without a wrong one"
            in capsys.readouterr().out)


def test_of_several_right_chains_the_first_is_taken(toy, world):
    """Also where it is a further sample; a chain beyond --max-answer is set aside."""
    args = train.parse_args(dpo_args(toy, world, "none"))
    stage = train.PreferenceStage(args, mulcot.load_processor(f"{world}/adapter"))
    (first, *_) = mulcot.read_posts(world / "kept.jsonl")
    later = replace(first, id="train-0000#1", columns=first.columns | dict(post_id="train-0000"))
    assert len(stage.branches_of(later)[0]) == 2 and stage.branches_of(first) == (None, None)
    args.max_answer = 20
    short = train.PreferenceStage(args, stage.processor)
    assert not any(short.wrong.values()) and "longer than" in short.branches_of(first)[1]


# ---- a run


def steps(out):
    return [row for row in mulcot.read_rows(Path(out, "log.jsonl")) if "loss" in row]


def test_margin_grows_and_pairs_are_told_apart(trained):
    """The first step is at the reference: margin 0, its loss log 2 + -log π_c / tokens; then the
    margin grows, and the right chains become more likely, not less."""
    first, last = steps(trained)[0], steps(trained)[-1]
    assert first["margin"] == pytest.approx(0, abs=1e-4)
    assert first["chosen_gain"] == pytest.approx(0, abs=1e-3)
    assert last["margin"] > 0.5 and last["pair_accuracy"] > 0.9
    assert last["logp_chosen"] > first["logp_chosen"] and last["chosen_gain"] > 0
    assert last["logp_chosen"] > last["logp_rejected"] and last["loss"] < first["loss"]
    dev = [row for row in mulcot.read_rows(trained / "log.jsonl") if "dev_accuracy" in row]
    assert len(dev) == 12 and "dev_macro_f1" in dev[0]


def test_adapter_keeps_its_shape_and_image_size(world, trained):
    """Rank, alpha, layers, base and pixels are the adapter's; what is written loads as one."""
    old, new = (json.loads((folder / "adapter_config.json").read_text())
                for folder in (world / "adapter", trained / "best"))
    assert new == old | dict(lora_dropout=0.0)
    assert mulcot.load_processor(trained / "best").image_processor.size["longest_edge"] == 3136
    model, _ = mulcot.load_model(trained / "best")
    before, _ = mulcot.load_model(world / "adapter")
    assert mulcot.fingerprint(model) != mulcot.fingerprint(before)
    ours, theirs = model.state_dict(), before.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours if ".lora_" not in k)


def test_reference_is_that_of_the_starting_weights(world, trained):
    """Two numbers a pair: the adapter's own log-probabilities in eval mode."""
    model, processor = mulcot.load_model(world / "adapter")
    reference = json.loads((trained / "reference.json").read_text())
    assert len(reference) == 8
    for n, post in enumerate(mulcot.read_posts(world / "kept.jsonl")[:8]):
        branches = [(mulcot.REASON_FORMAT, chain) for chain in chains(post, n)]
        batch = mulcot.collate([mulcot.encode(post, branches, processor)], processor.pad_id)
        with torch.no_grad():
            got = mulcot.answer_log_probs(model, batch, mulcot.forward_branches(model, batch))
        assert got[0].tolist() == pytest.approx(reference[post.id], rel=1e-5)


def test_training_calls_the_loss(toy, world, tmp_path, monkeypatch):
    """The function that the tests judge is the one that runs."""
    def raising(*args):
        raise InputError("preference_loss was called")

    monkeypatch.setattr(train, "preference_loss", raising)
    assert train.main(dpo_args(toy, world, tmp_path / "run")) == 2


def test_batches_and_accumulation_are_the_same_step(toy, world, tmp_path):
    """1 x 4 pairs, 4 x 1 pairs: equal up to rounding."""
    tensors = []
    for batch, accumulate in (("1", "4"), ("4", "1")):
        out = tmp_path / batch
        more = ("--batch", batch, "--accumulate", accumulate)
        assert train.main(dpo_args(toy, world, out, *more)) == 0
        tensors.append(torch.load(out / "state.pt")["trained"])
    for name, tensor in tensors[0].items():
        assert torch.allclose(tensor, tensors[1][name], atol=2e-4), name


def test_a_row_a_branch_is_the_same_step(toy, world, tmp_path, monkeypatch):
    """As recurrent layers need it: chosen and rejected are then passed one after the other."""
    tensors = []
    for recurrent in (False, True):
        monkeypatch.setattr(mulcot, "is_recurrent", lambda model: recurrent)
        out = tmp_path / str(recurrent)
        assert train.main(dpo_args(toy, world, out)) == 0
        tensors.append(torch.load(out / "state.pt")["trained"])
    for name, tensor in tensors[0].items():
        assert torch.allclose(tensor, tensors[1][name], atol=2e-4), name


@pytest.mark.parametrize("more", [(), ("--dropout", "0.2", "--alpha", "0")])
def test_resume_equals_uninterrupted_bit_for_bit(toy, world, tmp_path, monkeypatch, more):
    """Stopped within an epoch, twice: the same bytes and log, and the reference is not made by
    weights that have moved."""
    more = ("--epochs", "3", "--save-every", "1", *more)
    assert train.main(dpo_args(toy, world, tmp_path / "whole", *more)) == 0
    real, calls = train.preference_loss, []

    def stopping(*args):
        calls.append(1)
        if len(calls) in (4, 10):
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train, "preference_loss", stopping)
    codes = [train.main(dpo_args(toy, world, tmp_path / "broken", *more)) for _ in range(3)]
    assert codes == [130, 130, 0]
    for name in ("best/adapter_model.safetensors", "last/adapter_model.safetensors",
                 "reference.json", "set_aside.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    assert rows(tmp_path / "whole/log.jsonl") == rows(tmp_path / "broken/log.jsonl")


def test_plain_dpo_may_lower_both_and_says_so(toy, world, tmp_path, capsys):
    """--alpha 0 is DPO: the loss starts at log 2. A fall of log π_c below its start is told."""
    more = ("--alpha", "0", "--lr", "0.1", "--clip", "0", "--epochs", "3")
    assert train.main(dpo_args(toy, world, tmp_path / "run", *more)) == 0
    log = steps(tmp_path / "run")
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert min(row["chosen_gain"] for row in log) < -0.1
    assert "warning    log π_c is" in capsys.readouterr().out


# ---- what is refused


def test_what_gives_no_pair_or_does_not_fit_is_refused(toy, world, tmp_path, capsys):
    """One line and exit code 2 for each."""
    def told(*more):
        assert train.main(dpo_args(toy, world, tmp_path / "run", *more)) == 2
        out = capsys.readouterr()
        return out.out + out.err

    mulcot.write_rows(tmp_path / "none.jsonl", [])
    for aside in (tmp_path / "none.jsonl", world / "kept.jsonl"):
        assert "no wrong chain of this post" in told("--rejected", str(aside))
    assert "does not exist" in told("--rejected", str(tmp_path / "missing.jsonl"))
    assert "is no adapter folder" in told("--adapter", str(toy / "student"))
    shutil.copytree(world / "adapter", tmp_path / "run/best")
    assert "use" in told("--adapter", str(tmp_path / "run"))


def test_another_adapter_or_reference_is_refused(toy, world, tmp_path, capsys):
    """A begun run goes on with the adapter, the pairs and the reference that it began with."""
    shutil.copytree(world / "adapter", tmp_path / "adapter")
    args = dpo_args(toy, world, tmp_path / "run", "--adapter", str(tmp_path / "adapter"))
    assert train.main(args) == 0
    file = tmp_path / "run/reference.json"
    kept = file.read_text()
    file.write_text(kept[:-9])
    assert train.main(args) == 2 and "reference.json" in capsys.readouterr().err
    file.unlink()
    assert train.main(args) == 2 and "reference.json" in capsys.readouterr().err
    file.write_text(kept)
    assert train.main(args) == 0
    weights = tmp_path / "adapter/adapter_model.safetensors"
    tensors = mulcot.read_tensors(weights)
    mulcot.write_tensors(weights, {name: tensor + 1 for name, tensor in tensors.items()})
    assert train.main(args) == 2 and "adapter_digest" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--rank", "8"], ["--alpha", "-1"], ["--beta", "-0.1"]])
def test_flags_that_are_not_of_this_stage_are_refused(toy, world, flags):
    with pytest.raises(SystemExit) as e:
        train.parse_args(dpo_args(toy, world, "none", *flags))
    assert e.value.code == 2
