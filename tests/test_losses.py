"""Losses against hand-computed numbers; soft labels; one step's normalisation."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import generate
import mulcot
import train
from mulcot import InputError, SoftLabels

TEACHER, STUDENT = torch.tensor([[2.1, 0.3, -1.5]]), torch.tensor([[1.0, 0.8, 0.2]])


def drawn(*shape, scale=2.0, seed=0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the pure functions

def test_distill_kl_by_hand():
    """The worked example, with and without tau squared."""
    assert mulcot.distill_kl(STUDENT, TEACHER, 2.0).item() == pytest.approx(0.1395, abs=5e-5)
    squared = mulcot.distill_kl(STUDENT, TEACHER, 2.0, t_squared=True).item()
    assert squared == pytest.approx(0.5580, abs=5e-5)


def test_distill_kl_is_teacher_against_student():
    """p (log p - log q) with the teacher as p; the other way round is another number; 0 if same."""
    p, q = (x[0].div(2).softmax(0).tolist() for x in (TEACHER, STUDENT))
    forward = sum(a * math.log(a / b) for a, b in zip(p, q))
    backward = sum(b * math.log(b / a) for a, b in zip(p, q))
    assert abs(forward - backward) > 1e-3
    assert mulcot.distill_kl(STUDENT, TEACHER, 2.0).item() == pytest.approx(forward, abs=1e-6)
    assert mulcot.distill_kl(TEACHER, STUDENT, 2.0).item() == pytest.approx(backward, abs=1e-6)
    assert mulcot.distill_kl(TEACHER + 3, TEACHER).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_distill_kl_equals_torchs(temperature):
    """The mean over positions of torch's own kl_div."""
    s, t = drawn(7, 30), drawn(7, 30, seed=1)
    want = F.kl_div((s / temperature).log_softmax(-1), (t / temperature).softmax(-1),
                    reduction="batchmean")
    assert mulcot.distill_kl(s, t, temperature).item() == pytest.approx(want.item(), abs=1e-6)


def test_distill_kl_cuts_to_the_shared_ids():
    """Rows that only one of the two has are left out before the softmax, on either side."""
    s, t = drawn(4, 20), drawn(4, 20, seed=1)
    want, more = mulcot.distill_kl(s, t), torch.full((4, 5), 9.0)
    assert torch.equal(mulcot.distill_kl(torch.cat([s, more], 1), t), want)
    assert torch.equal(mulcot.distill_kl(s, torch.cat([t, more], 1)), want)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_tokens_kept_is_the_full_kl(temperature):
    """With K = V nothing is left for the tail; also K beyond V."""
    s, t = drawn(6, 25), drawn(6, 25, seed=1)
    want = [mulcot.distill_kl(s[i : i + 1], t[i : i + 1], temperature) for i in range(6)]
    for k in (25, 99):
        got = mulcot.soft_kl(s, mulcot.top_k_soft(t, k, temperature), temperature)
        assert (got - torch.stack(want)).abs().max() < 1e-6


def binned(logits, ids, temperature):
    """Probabilities of the kept ids and of all others together, in float64, with plain loops."""
    rows = []
    for row, keep in zip((logits.double() / temperature).softmax(-1).tolist(), ids.tolist()):
        rows.append([row[i] for i in keep] + [sum(p for i, p in enumerate(row) if i not in keep)])
    return rows


@pytest.mark.parametrize("k", [1, 5, 24])
def test_soft_kl_is_the_kl_of_the_bins(k):
    """K tokens and one bin for the rest, on both sides."""
    s, t = drawn(6, 25), drawn(6, 25, seed=1)
    soft = mulcot.top_k_soft(t, k, 2.0)
    want = [sum(a * math.log(a / b) for a, b in zip(p, q))
            for p, q in zip(binned(t, soft[0], 2.0), binned(s, soft[0], 2.0))]
    assert (mulcot.soft_kl(s, soft, 2.0) - torch.tensor(want)).abs().max() < 1e-6


def test_top_k_keeps_the_likeliest_and_the_rest_sums_to_one():
    """Sorted by probability; what they lack to one is the tail."""
    t = drawn(6, 25)
    ids, log_p, tail = mulcot.top_k_soft(t, 5, 2.0)
    assert torch.equal(ids, t.argsort(descending=True)[:, :5])
    assert (log_p.exp().sum(-1) + tail.exp() - 1).abs().max() < 1e-6
    assert (log_p.exp() - (t / 2).softmax(-1).gather(1, ids)).abs().max() < 1e-6


@pytest.mark.parametrize("k", [1, 5, 25])
def test_gradient_of_soft_kl(k):
    """(q - p) / tau on kept ids; in the tail q times its bin's (1 - p / q) / tau."""
    s, soft = drawn(6, 25).requires_grad_(), mulcot.top_k_soft(drawn(6, 25, seed=1), k, 2.0)
    (got,) = torch.autograd.grad(mulcot.soft_kl(s, soft, 2.0).sum(), s)
    q = (s / 2).softmax(-1)
    kept = torch.zeros_like(q, dtype=torch.bool).scatter(1, soft[0], True)
    q_tail = q.masked_fill(kept, 0).sum(-1, keepdim=True)
    p = torch.zeros_like(q).scatter(1, soft[0], soft[1].exp())
    p = torch.where(kept, p, soft[2].exp()[:, None] * q / q_tail)
    assert torch.isfinite(got).all() and (got - (q - p) / 2).abs().max() < 1e-6


def test_soft_kl_stays_finite_at_extreme_logits():
    """A student that is sure, and a tail far below what exp can hold."""
    s = torch.tensor([[300.0, -300, -300, -300], [0, 0, -1e4, -1e4]]).requires_grad_()
    kl = mulcot.soft_kl(s, mulcot.top_k_soft(drawn(2, 4), 2, 1.0), 1.0)
    kl.sum().backward()
    assert torch.isfinite(kl).all() and torch.isfinite(s.grad).all()


def test_multitask_and_student_loss():
    """The paper's weights."""
    assert mulcot.multitask_loss(1.0, 2.0) == pytest.approx(1.2)
    assert mulcot.multitask_loss(1.0, 2.0, 0.5, 3.0) == pytest.approx(6.5)
    assert mulcot.student_loss(2.0, 1.0) == pytest.approx(1.7)
    assert mulcot.student_loss(2.0, 1.0, 0.9) == pytest.approx(1.1)


@pytest.mark.parametrize("lam, temperature", [(0.0, 2.0), (0.3, 3.0), (1.0, 0.5)])
def test_dense_ce_kl_by_hand(lam, temperature):
    """Weighted sums over positions, each kind with its own weights, ids beyond `vocab` cut off."""
    hidden, weight = drawn(5, 8), drawn(30, 8, seed=1)
    targets, w, kw = torch.tensor([0, 29, 3, 3, 7]), torch.rand(5), torch.rand(5)
    soft = mulcot.top_k_soft(drawn(5, 20, seed=2), 6, temperature)
    logits = hidden @ weight.T
    ce = sum(-w[n] * logits[n].log_softmax(0)[targets[n]] for n in range(5))
    kl = sum(kw[n] * sum(a * math.log(a / b) for a, b in zip(*pair)) for n, pair in enumerate(zip(
        binned(drawn(5, 20, seed=2), soft[0], temperature),
        binned(logits[:, :20], soft[0], temperature))))
    loss, terms = mulcot.dense_ce_kl(hidden, weight, targets, w, soft, lam, temperature, kw, 20)
    assert loss.item() == pytest.approx(((1 - lam) * ce + lam * kl).item(), rel=1e-5)
    assert terms["ce"].item() == pytest.approx(ce.item(), rel=1e-5)
    assert terms["kl"].item() == pytest.approx(kl.item() if lam else 0.0, rel=1e-5)


def test_dense_ce_kl_defaults():
    """Without weights the mean; without KL weights the same ones for both."""
    hidden, weight, targets = drawn(5, 8), drawn(30, 8, seed=1), torch.arange(5)
    soft = mulcot.top_k_soft(drawn(5, 30, seed=2), 6)
    ce = F.cross_entropy(hidden @ weight.T, targets)
    kl = mulcot.soft_kl(hidden @ weight.T, soft).mean()
    assert mulcot.dense_ce_kl(hidden, weight, targets)[0].item() == pytest.approx(ce.item())
    both = mulcot.dense_ce_kl(hidden, weight, targets, soft=soft, lam=0.3)[0].item()
    assert both == pytest.approx((0.7 * ce + 0.3 * kl).item(), rel=1e-5)


def test_no_positions_give_zero_with_a_gradient():
    """An empty selection is 0, not NaN, and backward still runs."""
    soft = mulcot.top_k_soft(torch.zeros(0, 9), 4)
    for loss_of in (lambda x: mulcot.distill_kl(x, torch.zeros(0, 9)),
                    lambda x: mulcot.dense_ce_kl(x, torch.ones(9, 9), torch.zeros(0).long())[0],
                    lambda x: mulcot.dense_ce_kl(x, torch.ones(9, 9), torch.zeros(0).long(),
                                                 soft=soft, lam=0.3)[0]):
        x = torch.zeros(0, 9, requires_grad=True)
        loss = loss_of(x)
        loss.backward()
        assert loss.item() == 0 and x.grad is not None


# ---- the same loss in chunks

def both_losses(V=50, D=9, N=23, vocab=50, lam=0.3, tau=2.5, form="short", k=5,
                dtype=torch.float32, train_weight=False):
    """[(loss, terms, gradients of 3 x loss)] of the dense and of the chunked loss."""
    hidden, weight = drawn(N, D, scale=1.0), drawn(V, D, scale=1.0, seed=1).to(dtype)
    targets = torch.arange(N) * 7 % V
    w, kw = drawn(N, seed=2).abs(), drawn(N, seed=3).abs()
    theirs, head = drawn(N, 7, scale=1.0, seed=4), drawn(vocab, 7, scale=1.0, seed=5)
    soft = (theirs, head) if form == "exact" else mulcot.top_k_soft(theirs @ head.T, k, tau)
    results = []
    for loss_of in (mulcot.dense_ce_kl, mulcot.chunked_ce_kl):
        h = hidden.clone().requires_grad_()
        out = weight.clone().requires_grad_(train_weight)
        loss, terms = loss_of(h, out, targets, w, None if form is None else soft, lam, tau, kw,
                              vocab)
        (3 * loss).backward()
        results.append((loss.item(), terms, h.grad, out.grad))
    return results


CASES = [dict(form=form, vocab=vocab, lam=lam) for form in ("short", "exact")
         for vocab in (50, 40) for lam in (0.0, 0.3, 1.0)]
CASES += [dict(form=None), dict(form=None, train_weight=True), dict(train_weight=True),
          dict(form="exact", tau=1.0), dict(k=50), dict(N=1), dict(dtype=torch.bfloat16),
          dict(form="exact", dtype=torch.bfloat16, vocab=40)]


@pytest.mark.parametrize("chunk", [1, 300, 2**25])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunked_equals_dense(case, chunk, monkeypatch):
    """Value, parts and gradients, whatever the chunk, temperature, weights and vocabularies."""
    monkeypatch.setattr(mulcot, "CHUNK", chunk)
    (a, terms, *gradients), (b, got, *others) = both_losses(**case)
    assert b == pytest.approx(a, rel=1e-6)
    for name in ("ce", "kl"):
        assert got[name].item() == pytest.approx(terms[name].item(), rel=1e-6, abs=1e-6)
        assert not got[name].requires_grad
    for x, y in zip(gradients, others):
        assert (x is None) == (y is None)
        assert x is None or (x - y).norm() <= 1e-6 * x.norm()


def test_chunked_survives_a_student_that_is_sure_of_something_else():
    """A tail of which the student keeps nothing: finite, and the dense loss's gradient."""
    hidden, weight = torch.tensor([[400.0]]), torch.tensor([[1.0], [0.0], [-1.0], [0.5]])
    soft = mulcot.top_k_soft(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), 1, 1.0)
    results = []
    for loss_of in (mulcot.dense_ce_kl, mulcot.chunked_ce_kl):
        h = hidden.clone().requires_grad_()
        loss, _ = loss_of(h, weight, torch.tensor([0]), None, soft, 0.5, 1.0)
        loss.backward()
        results.append((loss.item(), h.grad.item()))
    assert results[1] == pytest.approx(results[0], rel=1e-5) and math.isfinite(results[1][1])


def test_chunked_without_positions():
    """A batch in which nothing is supervised costs nothing and has a zero gradient."""
    h = torch.zeros(0, 9, requires_grad=True)
    for soft in (None, (torch.zeros(0, 3), torch.ones(9, 3))):
        loss, terms = mulcot.chunked_ce_kl(h, torch.ones(9, 9), torch.zeros(0).long(), soft=soft,
                                           lam=0.3)
        loss.backward()
        assert loss.item() == terms["ce"].item() == terms["kl"].item() == 0
        assert h.grad.shape == (0, 9)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the most elements that any one tensor had."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(t):
                self.most = max(self.most, t.numel())
        return out


@pytest.mark.parametrize("form", [None, "short", "exact"])
def test_chunked_never_holds_all_logits(form, monkeypatch):
    """No tensor on the way is larger than a chunk, however many positions there are."""
    monkeypatch.setattr(mulcot, "CHUNK", 800)
    sizes = {}
    for N in (40, 400):
        h, weight = drawn(N, 2), drawn(200, 2)
        soft = {None: None, "short": mulcot.top_k_soft(drawn(N, 200), 3, 2.0),
                "exact": (drawn(N, 2), weight)}[form]
        with Largest() as seen:
            mulcot.chunked_ce_kl(h, weight, torch.zeros(N).long(), soft=soft, lam=0.3)
        sizes[N] = seen.most
    assert sizes[40] <= 800 and sizes[400] <= max(800, 400 * 3)


# ---- soft labels as files

def two_tasks(cot, label):
    return [(mulcot.task_format("reason"), cot),
            (mulcot.task_format("label"), mulcot.render_label(label))]


def soft_folder(toy, rows, out, *options):
    code = generate.main(["soft", "--data", str(rows), "--images", str(toy / "images"), "--device",
                          "cpu", "--model", str(toy / "assistant"), "--out", str(out), *options])
    return code, out


@pytest.fixture(scope="module")
def rows(toy, posts, tmp_path_factory):
    """Eight posts with chains of differing length, two of them without an image."""
    path = tmp_path_factory.mktemp("rows") / "chains.jsonl"
    with open(path, "w") as f:
        for i, post in enumerate(posts[:8]):
            said = [" ".join([f"It says {post.text}."] * (1 + (i + j) % 3)) for j in range(4)]
            cot = mulcot.render_reasoning(dict(zip(mulcot.FIELDS, said + [post.label])))
            f.write(json.dumps(post.row() | dict(cot=cot, image=None if i in (2, 5)
                                                 else post.row()["image"])) + "\n")
    return path


@pytest.fixture(scope="module")
def examples(toy, rows, student):
    return [mulcot.encode(p, two_tasks(p.cot, p.label), student[1])
            for p in mulcot.read_posts(rows, toy / "images")]


@pytest.fixture(scope="module")
def soft_of(toy, rows, tmp_path_factory):
    """soft_of(positions): a folder of soft labels at temperature 3 with all tokens kept, as a list
    of all tokens or as hidden states and output matrix."""
    made = {}

    def make(positions, top_k=99999):
        key = positions, top_k
        if key not in made:
            code, made[key] = soft_folder(
                toy, rows, tmp_path_factory.mktemp("soft") / positions, "--kl-positions", positions,
                "--temperature", "3", "--top-k", str(top_k), "--batch", "3")
            assert code == 0
        soft = SoftLabels(made[key])
        soft.load_head("cpu")
        return soft

    return make


@torch.no_grad()
def branch_logits(model, processor, example, k):
    """Logits (T, V) of an ordinary pass over prefix and branch k, and the prefix's length."""
    ids = torch.tensor([example.prefix + example.branches[k - 1][0]])
    more = {} if example.pixels is None else dict(pixel_values=example.pixels,
                                                  image_grid_thw=example.grid)
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more,
                mm_token_type_ids=(ids == processor.image_pad).int())
    return out.logits[0], len(example.prefix)


@pytest.mark.parametrize("positions", ["response", "all"])
def test_soft_labels_are_the_assistants_distributions(toy, student, examples, soft_of, positions):
    """Read back they equal a direct computation, to the accuracy of 16 bits."""
    soft, vocab = soft_of(positions), len(student[1].tokenizer)
    assistant, processor = mulcot.load_model(toy / "assistant")
    for e in examples[:4]:
        names = SoftLabels.names(e)
        for k, (branch, answer) in enumerate(e.branches, 1):
            logits, start = branch_logits(assistant, processor, e, k)
            log_p = (logits[:, :vocab] / 3).log_softmax(-1)
            want = {"all": {0: log_p[:start], k: log_p[start:]},
                    "response": {k: log_p[-answer - 1 : -1]}}[positions]
            for part, rows_ in want.items():
                ids, got, tail = soft.read(names[part])
                assert ids.shape == (len(rows_), vocab) and torch.isinf(tail).all()
                assert torch.allclose(got, rows_.gather(1, ids), rtol=1e-3, atol=1e-4)


def test_soft_labels_cost_and_tail(toy, rows, examples, tmp_path):
    """64 tokens and the rest take at most 512 bytes per position and sum to one."""
    code, folder = soft_folder(toy, rows, tmp_path / "soft", "--top-k", "64")
    soft = SoftLabels(folder)
    positions = sum(end - start for _, start, end in soft.index.values())
    size = sum(f.stat().st_size for f in folder.iterdir())
    assert code == 0 and len(soft.index) == 2 * len(examples)
    assert positions == sum(n for e in examples for _, n in e.branches)
    assert size / positions <= 512
    ids, log_p, tail = soft.read(SoftLabels.names(examples[0])[1])
    assert ids.shape[1] == 64 and tail.exp().min() > 0
    assert (log_p.exp().sum(-1) + tail.exp() - 1).abs().max() < 2e-3


def test_exact_soft_labels(toy, rows, examples, soft_of, tmp_path, capsys):
    """Hidden states (16 bits) and output matrix give the assistant's distributions; half of it
    missing is an error."""
    short, exact = soft_of("response"), soft_of("response", 0)
    for e in examples[:3]:
        for name in SoftLabels.names(e)[1:]:
            (hidden,), (ids, log_p, _) = exact.read(name), short.read(name)
            got = (hidden @ exact.head.T / 3).log_softmax(-1)
            assert torch.allclose(got.gather(1, ids), log_p, rtol=2e-3, atol=2e-3)
    code, folder = soft_folder(toy, rows, tmp_path / "soft")
    (folder / "head.safetensors").unlink()
    with pytest.raises(InputError, match="head.safetensors is missing"):
        SoftLabels(folder).load_head("cpu")
    assert soft_folder(toy, rows, folder, "--top-k", "64")[0] == 2
    assert "another top_k" in capsys.readouterr().err


def test_stale_soft_labels_are_not_found(toy, rows, student, soft_of):
    """Another word, image, answer or label names another entry."""
    processor, soft = student[1], soft_of("response")
    post, other = mulcot.read_posts(rows, toy / "images")[:2]
    encoded = lambda **changed: mulcot.encode(
        mulcot.Post(**vars(post) | changed),
        two_tasks(changed.get("cot", post.cot), changed.get("label", post.label)),
        processor)
    same = SoftLabels.names(encoded())
    assert all(len(soft.read(name)) == 3 for name in same[1:])
    label = next(x for x in mulcot.LABELS if x != post.label)
    for gone, changed in [((1, 2), dict(text=post.text + "!")), ((1, 2), dict(image=other.image)),
                          ((1, 2), dict(image=None)), ((1,), dict(cot=post.cot + " ")),
                          ((2,), dict(label=label))]:
        names = SoftLabels.names(encoded(**changed))
        for k in (1, 2):
            if k in gone:
                with pytest.raises(InputError, match="no soft labels"):
                    soft.read(names[k])
            else:
                assert names[k] == same[k]


def test_soft_labels_of_other_settings_are_not_mixed(toy, rows, soft_of, capsys):
    """The same folder again is fine, with another temperature or positions it is refused."""
    folder, options = soft_of("response").folder, ["--top-k", "99999", "--batch", "3"]
    before = sorted(p.name for p in mulcot.Path(folder).iterdir())
    assert soft_folder(toy, rows, folder, "--temperature", "3", *options)[0] == 0
    for changed, word in ((["--temperature", "2"], "temperature"),
                          (["--temperature", "3", "--kl-positions", "all"], "positions")):
        assert soft_folder(toy, rows, folder, *options, *changed)[0] == 2
        assert f"another {word}" in capsys.readouterr().err
    assert sorted(p.name for p in mulcot.Path(folder).iterdir()) == before


def test_soft_labels_of_another_tokenizer_are_refused(student, soft_of):
    """The same ids would be other words."""
    model, processor = student
    args = student_args("--soft", soft_of("response").folder)
    assert train.open_soft(args, processor, model).about["temperature"] == 3
    alien = SimpleNamespace(tokenizer=mulcot.tiny_tokenizer(["quite other words " * 9], 500))
    with pytest.raises(InputError, match="another tokenizer"):
        train.open_soft(args, alien, model)


# ---- one optimiser step

def student_args(*options):
    return train.parse_args(["student", "--data", "d", "--dev", "d", "--model", "m", "--out", "o",
                             *(options or ["--no-soft"])])


@pytest.fixture(scope="module")
def learner(toy):
    """A student with adapters that already do something, and what they consist of."""
    model, _ = mulcot.load_model(toy / "student")
    mulcot.add_lora(model, 4, 8, 0.0)
    generator = torch.Generator().manual_seed(0)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return model, trained


def run_step(args, learner, examples, size, pad, soft=None):
    """Loss terms and gradient of one optimiser step in micro-batches of `size`."""
    model, trained = learner
    parts = [examples[i : i + size] for i in range(0, len(examples), size)]
    batches = [mulcot.collate(part, pad) for part in parts]
    everywhere = soft is not None and soft.about["positions"] == "all"
    counts = train.token_counts(batches, everywhere)
    model.zero_grad()
    sums = {}
    for part, batch in zip(parts, batches):
        loss, terms = train.step_loss(args, model, batch, part, soft, counts)
        loss.backward()
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums, torch.cat([p.grad.flatten() for p in trained])


@pytest.mark.parametrize("soft", [None, "response", "all"])
def test_one_batch_equals_eight_micro_batches(learner, student, examples, soft_of, soft):
    """Counting tokens over the whole step makes 1 x 8 and 8 x 1 the same step."""
    args = student_args("--soft", "s") if soft else train.parse_args(
        ["assistant", "--data", "d", "--dev", "d", "--model", "m", "--out", "o"])
    whole, parts, uneven = (
        run_step(args, learner, examples, size, student[1].pad, soft and soft_of(soft))
        for size in (8, 1, 3))
    for terms, gradient in (parts, uneven):
        assert terms == pytest.approx(whole[0], rel=1e-6, abs=1e-6)
        assert (gradient - whole[1]).norm() < 1e-6 * max(1.0, whole[1].norm())


def by_hand(learner, student, assistant, examples, positions, options):
    """The student's loss with loops over ordinary passes: no masks, no batch, no files."""
    vocab, terms = len(student[1].tokenizer), {}
    for k, name in ((1, "reason"), (2, "label")):
        ce, kl = [], []
        for e in examples:
            (mine, start), (theirs, _) = (branch_logits(m, student[1], e, k)
                                          for m in (learner[0], assistant))
            ids, n = e.branches[k - 1]
            ce.append(F.cross_entropy(mine[-n - 1 : -1], torch.tensor(ids[-n:]), reduction="none"))
            at = slice(None) if positions == "all" else slice(-n - 1, -1)
            kl += [mulcot.distill_kl(a[None], b[None], 3.0)
                   for a, b in zip(mine[at, :vocab], theirs[at, :vocab])]
        terms[f"ce_{name}"] = torch.cat(ce).mean().item()
        terms[f"kl_{name}"] = torch.stack(kl).mean().item()
    lam, squared = (0.6, 9) if options else (0.3, 1)
    loss = {name: (1 - lam) * terms[f"ce_{name}"] + lam * squared * terms[f"kl_{name}"]
            for name in ("reason", "label")}
    terms["loss"] = (0.5 * loss["reason"] + 0.1 * loss["label"] if options
                     else 0.8 * loss["reason"] + 0.2 * loss["label"])
    return terms, squared


OPTIONS = ["--t-squared", "--lam", "0.6", "--reasoning-weight", "0.5", "--label-weight", "0.1"]


@pytest.mark.parametrize("options", [[], OPTIONS], ids=["paper", "options"])
@pytest.mark.parametrize("positions", ["response", "all"])
@pytest.mark.parametrize("top_k", [99999, 0], ids=["list", "exact"])
def test_step_loss_by_hand(toy, learner, student, examples, soft_of, positions, options, top_k):
    """Temperature, masks, weights and lambda end where the formula has them."""
    assistant, few = mulcot.load_model(toy / "assistant")[0], examples[1:4]
    want, squared = by_hand(learner, student, assistant, few, positions, options)
    args = student_args("--soft", "s", *options)
    got, _ = run_step(args, learner, few, 2, student[1].pad, soft_of(positions, top_k))
    for name in ("reason", "label"):
        want[f"kl_{name}"] *= squared
    assert got == pytest.approx(want, rel=2e-3)


def test_step_loss_without_soft_labels_or_reasoning(toy, rows, learner, student, examples):
    """The label task alone is its mean cross-entropy; both tasks hard are 0.8 and 0.2."""
    both, _ = run_step(student_args(), learner, examples, 4, student[1].pad)
    assert set(both) == {"loss", "ce_reason", "ce_label"}
    assert both["loss"] == pytest.approx(0.8 * both["ce_reason"] + 0.2 * both["ce_label"])
    only = [mulcot.encode(p, two_tasks(p.cot, p.label)[1:], student[1])
            for p in mulcot.read_posts(rows, toy / "images")]
    label, _ = run_step(student_args("--no-soft", "--no-reasoning"), learner, only, 4,
                        student[1].pad)
    assert label == pytest.approx(dict(loss=both["ce_label"], ce_label=both["ce_label"]), rel=1e-5)
