"""Losses against hand-computed numbers; chunks; soft labels; a training step's normalisation."""

import math
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import chain, pass_inputs
from torch.utils._python_dispatch import TorchDispatchMode

import generate
import mulcot
import train
from mulcot import LABELS, InputError, SoftLabels
from toy import tiny_tokenizer

TEACHER, STUDENT = torch.tensor([[2.1, 0.3, -1.5]]), torch.tensor([[1.0, 0.8, 0.2]])


def drawn(*shape, scale=2.0, seed=0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the pure functions

def test_distill_kl_by_hand():
    """The worked example, with and without tau squared: p (log p - log q) with the teacher as p;
    the other way round is another number; 0 if same."""
    p, q = (x[0].div(2).softmax(0).tolist() for x in (TEACHER, STUDENT))
    forward = sum(a * math.log(a / b) for a, b in zip(p, q))
    backward = sum(b * math.log(b / a) for a, b in zip(p, q))
    assert abs(forward - backward) > 1e-3 and forward == pytest.approx(0.1395, abs=5e-5)
    assert mulcot.distill_kl(STUDENT, TEACHER, 2.0).item() == pytest.approx(forward, abs=1e-6)
    assert mulcot.distill_kl(TEACHER, STUDENT, 2.0).item() == pytest.approx(backward, abs=1e-6)
    assert mulcot.distill_kl(TEACHER + 3, TEACHER).item() == pytest.approx(0, abs=1e-6)
    squared = mulcot.distill_kl(STUDENT, TEACHER, 2.0, t_squared=True).item()
    assert squared == pytest.approx(4 * forward, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_distill_kl_equals_torchs(temperature):
    """The mean, the sum and each position's own of torch's kl_div; of (B, T, V) as of (N, V)."""
    s, t = drawn(6, 30), drawn(6, 30, seed=1)
    each = F.kl_div((s / temperature).log_softmax(-1), (t / temperature).softmax(-1),
                    reduction="none").sum(-1)
    for shape in ((6,), (2, 3), (1, 3, 2)):
        kl = partial(mulcot.distill_kl, s.view(*shape, 30), t.view(*shape, 30), temperature)
        assert torch.allclose(kl(reduction="none"), each.view(shape), atol=1e-6)
        assert kl(reduction="sum").item() == pytest.approx(each.sum().item(), abs=1e-5)
        assert kl().item() == pytest.approx(each.mean().item(), abs=1e-6)


def test_distill_kl_refuses_unequal_positions():
    """Also those that would broadcast."""
    for shape in ((7, 30), (1, 30), (30,), (6, 1, 30)):
        with pytest.raises(AssertionError, match="6, 30"):
            mulcot.distill_kl(drawn(6, 30), drawn(*shape))


def test_distill_kl_cuts_to_the_shared_ids():
    """Rows that only one of the two has are left out before the softmax, on either side."""
    s, t = drawn(4, 20), drawn(4, 20, seed=1)
    want, more = mulcot.distill_kl(s, t), torch.full((4, 5), 9.0)
    assert torch.equal(mulcot.distill_kl(torch.cat([s, more], 1), t), want)
    assert torch.equal(mulcot.distill_kl(s, torch.cat([t, more], 1)), want)


def test_gradient_of_distill_kl():
    """(q - p) / tau, also where a student is sure of something else than a sure teacher."""
    sure = 300 * torch.tensor([[1.0, -1, -1, -1], [-1, 1, -1, -1], [0, 0, -30, -30]])
    for s, t in ((drawn(6, 25), drawn(6, 25, seed=1)), (sure, drawn(3, 4)), (sure, sure.flip(0))):
        kl = mulcot.distill_kl(s.requires_grad_(), t, 2.0, reduction="sum")
        kl.backward()
        want = ((s / 2).softmax(-1) - (t / 2).softmax(-1)) / 2
        assert torch.isfinite(kl) and (s.grad - want).abs().max() < 1e-6
        s.grad = None


def test_multitask_and_student_loss():
    """The paper's weights."""
    assert mulcot.multitask_loss(1.0, 2.0) == pytest.approx(1.2)
    assert mulcot.multitask_loss(1.0, 2.0, 0.5, 3.0) == pytest.approx(6.5)
    assert mulcot.student_loss(2.0, 1.0) == pytest.approx(1.7)
    assert mulcot.student_loss(2.0, 1.0, 0.9) == pytest.approx(1.1)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_positions_give_zero_with_a_gradient(reduction):
    """An empty selection is 0, not NaN, and backward still runs."""
    x = torch.zeros(0, 9, requires_grad=True)
    loss = mulcot.distill_kl(x, torch.zeros(0, 9), reduction=reduction).sum()
    loss.backward()
    assert loss.item() == 0 and x.grad is not None


# ---- the same loss in chunks

def make_loss(N, V=50, vocab=50, lam=0.3, tau=2.5, soft=True, dtype=torch.float32):
    """(hidden (N, 9), loss_of as training has it: every third position without a target)."""
    hidden, weight = drawn(N, 9, scale=1.0).to(dtype), drawn(V, 9, scale=1.0, seed=1).to(dtype)
    targets = (torch.arange(N) * 7 % V).masked_fill(torch.arange(N) % 3 == 2, -100)
    theirs, head = drawn(N, 7, scale=1.0, seed=4), drawn(vocab, 7, scale=1.0, seed=5)

    def loss_of(h, part):
        logits = (h @ weight.T).float()
        hard = F.cross_entropy(logits, targets[part], reduction="sum")
        if not soft:
            return hard
        kl = mulcot.distill_kl(logits, theirs[part] @ head.T, tau, reduction="sum")
        return mulcot.student_loss(hard, kl, lam)

    return hidden.requires_grad_(), loss_of


CASES = [dict(vocab=vocab, lam=lam) for vocab in (50, 40) for lam in (0.0, 0.3, 1.0)]
CASES += [dict(soft=False), dict(tau=1.0), dict(N=1), dict(N=0), dict(N=3, soft=False),
          dict(dtype=torch.bfloat16), dict(dtype=torch.bfloat16, vocab=40)]


def chunked_loss(loss_of, hidden, size):
    return mulcot.in_chunks(lambda h, rows: dict(loss=loss_of(h, rows)), hidden, size)["loss"]


@pytest.mark.parametrize("size", [1, 6, 23, 2**25])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_chunks_equals_dense(case, size):
    """Value and gradient, whatever the chunk, temperature, weights and vocabularies."""
    hidden, loss_of = make_loss(**dict(N=23) | case)
    dense = loss_of(hidden, slice(0, len(hidden)))
    chunked = chunked_loss(loss_of, hidden, size)
    (want,), (got,) = (torch.autograd.grad(4 * loss, hidden) for loss in (dense, chunked))
    assert chunked.shape == () and chunked.item() == pytest.approx(dense.item(), rel=1e-6)
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("own", ["head", "bias"])
def test_in_chunks_refuses_a_trainable_head(own):
    """Its gradient would be lost without a word; frozen it is taken."""
    hidden, head, bias = drawn(5, 3).requires_grad_(), drawn(4, 3, seed=1), drawn(4, seed=2)
    trained = dict(head=head, bias=bias)[own].requires_grad_()
    loss_of = lambda h, rows: F.linear(h, head, bias).logsumexp(-1).sum()
    with pytest.raises(AssertionError, match="not frozen"):
        chunked_loss(loss_of, hidden, 2)
    trained.requires_grad_(False)
    chunked_loss(loss_of, hidden, 2).backward()
    assert hidden.grad.norm() > 0


class Largest(TorchDispatchMode):
    """Notes the most rows that any tensor of a width had: {width: rows}."""

    def __init__(self):
        super().__init__()
        self.rows = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(t) and t.dim() > 1:
                width = t.shape[-1]
                self.rows[width] = max(self.rows.get(width, 0), t.numel() // max(1, width))
        return out


# ---- soft labels as files

def two_tasks(cot, label):
    return [(mulcot.REASON_FORMAT, cot), (mulcot.LABEL_FORMAT, mulcot.render_label(label))]


@pytest.fixture(scope="module")
def rows(toy, posts, tmp_path_factory):
    """Eight posts with chains of differing length, two of them without an image."""
    path = tmp_path_factory.mktemp("rows") / "chains.jsonl"
    rows = [post.row() | dict(cot=chain(post.label, f"It says {post.text}." * (1 + i % 3)))
            for i, post in enumerate(posts[:8])]
    del rows[2]["image"], rows[5]["image"]
    mulcot.write_rows(path, rows)
    return path


@pytest.fixture(scope="module")
def examples(toy, rows, student):
    return [mulcot.encode(p, two_tasks(p.cot, p.label), student[1])
            for p in mulcot.read_posts(rows, toy / "images")]


@pytest.fixture(scope="module")
def soft(toy, rows, tmp_path_factory):
    """A folder of soft labels."""
    out = str(tmp_path_factory.mktemp("soft") / "soft")
    assert generate.main(["soft", "--data", str(rows), "--images", str(toy / "images"), "--model",
                          str(toy / "assistant"), "--batch", "3", "--out", out]) == 0
    return out


def test_stale_soft_labels_are_not_found(toy, rows, student, soft):
    """Another word, image, answer or label names another entry."""
    processor, labels = student[1], SoftLabels(soft)
    labels.load_head("cpu")
    post, other = mulcot.read_posts(rows, toy / "images")[:2]
    encoded = lambda **changed: mulcot.encode(
        mulcot.Post(**vars(post) | changed),
        two_tasks(changed.get("cot", post.cot), changed.get("label", post.label)),
        processor)
    same = SoftLabels.names(encoded())
    assert all(len(labels.hidden([encoded()], branch)) for branch in (1, 2))
    label = next(x for x in LABELS if x != post.label)
    for gone, changed in [((0, 1), dict(text=post.text + "!")), ((0, 1), dict(image=other.image)),
                          ((0, 1), dict(image=None)), ((0,), dict(cot=post.cot + " ")),
                          ((1,), dict(label=label))]:
        names = SoftLabels.names(encoded(**changed))
        for k in (0, 1):
            if k in gone:
                with pytest.raises(InputError, match="no soft labels"):
                    labels.hidden([encoded(**changed)], k + 1)
            else:
                assert names[k] == same[k]


def test_foreign_soft_labels_are_refused(student, soft, tmp_path):
    """Of another tokenizer, whose ids would be other words; without the output matrix, whose rows
    are those of the tokenizer."""
    args = student_args("--soft", soft)
    head = train.open_soft_labels(args, student[1]).head
    assert len(head) == len(student[1].tokenizer) < student[0].lm_head.out_features
    alien = SimpleNamespace(tokenizer=tiny_tokenizer(["quite other words " * 9], 500))
    with pytest.raises(InputError, match="another tokenizer"):
        train.open_soft_labels(args, alien)
    folder = shutil.copytree(soft, tmp_path / "soft")
    (folder / "head.safetensors").unlink()
    with pytest.raises(InputError, match="head.safetensors is missing"):
        train.open_soft_labels(student_args("--soft", str(folder)), student[1])


# ---- one optimiser step

def student_args(*options):
    return train.parse_args(["student", "--data", "d", "--dev", "d", "--model", "m", "--out", "o",
                             "--device", "cpu", *(options or ["--no-soft"])])


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


def run_step(args, learner, examples, size, processor):
    """Loss terms and gradient of one optimiser step in micro-batches of `size`."""
    model, trained = learner
    stage = train.ChainStage(args, processor)
    parts = [examples[i : i + size] for i in range(0, len(examples), size)]
    micro_batches = [(mulcot.collate(part, processor.pad_id), part) for part in parts]
    counts = train.step_counts(micro_batches)
    model.zero_grad()
    sums = {}
    for batch, part in micro_batches:
        loss, terms = stage.loss(model, batch, part, counts)
        loss.backward()
        for name, value in (terms | {"loss": loss}).items():
            sums[name] = sums.get(name, 0.0) + value.item()
    return sums, torch.cat([p.grad.flatten() for p in trained])


@pytest.mark.parametrize("stage", ["assistant", "student"])
def test_one_batch_equals_eight_micro_batches(learner, student, examples, soft, stage, monkeypatch):
    """Counting tokens over the whole step makes 1 x 8 and 8 x 1 the same step, in any chunks; and
    no logits are of more positions than a chunk (or a transposed output matrix has rows)."""
    args = student_args("--soft", soft) if stage == "student" else train.parse_args(
        ["assistant", "--data", "d", "--dev", "d", "--model", "m", "--out", "o"])
    whole, parts, uneven = (run_step(args, learner, examples, size, student[1])
                            for size in (8, 1, 3))
    monkeypatch.setattr(train, "CHUNK_LOGITS", 9000)
    with Largest() as seen:
        chunked = run_step(args, learner, examples, 8, student[1])
    for vocab in (learner[0].lm_head.out_features, len(student[1].tokenizer)):
        assert seen.rows.get(vocab, 0) <= 128 < sum(n for e in examples for _, n in e.branches)
    for terms, gradient in (parts, uneven, chunked):
        assert terms == pytest.approx(whole[0], rel=1e-6, abs=1e-6)
        assert (gradient - whole[1]).norm() < 1e-6 * max(1.0, whole[1].norm())


def by_hand(learner, student, assistant, examples, options):
    """The student's loss terms and gradient, the formula written out with loops over ordinary
    passes: no masks, no batch, no files, all logits."""
    vocab, terms = len(student[1].tokenizer), {}
    lam, squared, weights = (0.6, 9, (0.5, 0.1)) if options else (0.3, 1, (0.8, 0.2))
    for k, name in ((1, "reason"), (2, "label")):
        ce, kl = [], []
        for e in examples:
            inputs = pass_inputs(student[1], e, k)
            mine, theirs = (model(**inputs).logits[0] for model in (learner[0], assistant))
            ids, n = e.branches[k - 1]
            ce.append(F.cross_entropy(mine[-n - 1 : -1], torch.tensor(ids[-n:]), reduction="none"))
            p, q = (x[-n - 1 : -1, :vocab].div(3).softmax(-1) for x in (theirs.detach(), mine))
            kl.append(squared * (p * (p / q).log()).sum(-1))
        terms[f"ce_{name}"] = torch.cat(ce).mean()
        terms[f"kl_{name}"] = torch.cat(kl).mean()
    terms["loss"] = sum(weight * ((1 - lam) * terms[f"ce_{name}"] + lam * terms[f"kl_{name}"])
                        for weight, name in zip(weights, ("reason", "label")))
    gradient = torch.autograd.grad(terms["loss"], learner[1])
    return {k: v.item() for k, v in terms.items()}, torch.cat([g.flatten() for g in gradient])


OPTIONS = ["--t-squared", "--lam", "0.6", "--reasoning-weight", "0.5", "--label-weight", "0.1"]


@pytest.mark.parametrize("options", [[], OPTIONS], ids=["paper", "options"])
def test_step_by_hand(toy, learner, student, examples, soft, options):
    """Temperature, masks, weights and lambda end where the formula has them."""
    assistant, few = mulcot.load_model(toy / "assistant")[0], examples[1:4]
    want = by_hand(learner, student, assistant, few, options)
    args = student_args("--soft", soft, "--temperature", "3", *options)
    got = run_step(args, learner, few, 2, student[1])
    assert got[0] == pytest.approx(want[0], rel=2e-3)
    assert (got[1] - want[1]).norm() < 2e-3 * want[1].norm()


@pytest.mark.parametrize("name", ["multitask_loss", "student_loss", "distill_kl"])
def test_the_papers_equations_are_what_trains(learner, student, examples, soft, monkeypatch, name):
    """Without any one of them a student's step fails."""
    args = student_args("--soft", soft)
    monkeypatch.setattr(train, name, lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_step(args, learner, examples[:2], 2, student[1])
