"""Today's model families: tokens, one shared pass, generation, soft labels and adapters equal what
each family's own classes give; what cannot be laid out right is refused by name."""

import json
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import noise_image
from transformers import AutoConfig

import families
import generate
import mulcot
import train
from families import FAMILIES, Oracle, family_config, family_tokenizer, write_family
from mulcot import (
    FIELDS, FORMATS, LABEL_FORMAT, LABELS, REASON_FORMAT, TARGETS, InputError, Post, collate,
    encode, encode_batch, forward_branches, multitask_loss, post_prompt,
    render_label, render_reasoning)

COT = render_reasoning(dict(zip(FIELDS, ("Words.", "A face.", "Fine.", "So.", "neutral"))))
TASKS = [(REASON_FORMAT, COT), (LABEL_FORMAT, render_label("neutral"))]
TILED = {"smolvlm": 32, "internvl": 28, "internvl_qwen3": 28}  # family -> side of a tile
LANGUAGE = {"smolvlm": "model.text_model."}  # the others: model.language_model.


@pytest.fixture(scope="module")
def posts(tmp_path_factory):
    """Posts with a wide, a tall, two and no picture, long and short, with and without aspect."""
    images = tmp_path_factory.mktemp("families") / "images"
    images.mkdir()
    wide = noise_image(images / "wide.png", (90, 40), 1)
    tall = noise_image(images / "tall.png", (30, 70), 2)
    rows = [Post("wide", "so many words " * 6, wide, "Rex"), Post("tall", "few words", tall),
            Post("two", "first and second", wide, frames=[tall]),
            Post("none", "Only words 2024 here", None, "Rex")]
    for n, post in enumerate(rows):
        post.label, post.cot = LABELS[n % 3], COT.replace('"neutral"', f'"{LABELS[n % 3]}"')
    return rows


@pytest.fixture(scope="module")
def texts(posts):
    return [post_prompt(post) + FORMATS[task] for post in posts for task in ("reason", "label")]


@pytest.fixture(scope="module", params=FAMILIES)
def world(request, posts, texts, tmp_path_factory):
    """One family: its folders in two sizes, the student as we load it, and the oracle over it."""
    folder, family = tmp_path_factory.mktemp(request.param), request.param
    tokenizer = family_tokenizer(family, texts)
    for seed, size in enumerate(("student", "assistant")):
        write_family(folder / size, family, size, tokenizer, seed)
    model, processor = mulcot.load_model(folder / "student")
    oracle = Oracle(family, folder / "student", model)
    return SimpleNamespace(family=family, folder=folder, posts=posts, model=model,
                           processor=processor, oracle=oracle)


@pytest.fixture
def fresh(world):
    """A model that a test may change, and the oracle over it."""
    model, _ = mulcot.load_model(world.folder / "student")
    return model, Oracle(world.family, world.folder / "student", model)


def whole(example, branch=0):
    """Ids of an example's prefix with one of its branches."""
    return example.prefix + example.branches[branch][0]


def special_ids(tokenizer):
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


# ---- token ids


def test_ids_equal_the_chat_template(world):
    """Of prompts, of answered turns up to the end token, of several branches at once, and of the
    teacher's prompts."""
    for post in world.posts:
        example = encode(post, [(LABEL_FORMAT, None), *TASKS], world.processor)
        assert whole(example) == world.oracle.ids(post, LABEL_FORMAT)
        assert example.branches[0][1] == 0
        for branch, (question, answer) in enumerate(TASKS, 1):
            want = world.oracle.ids(post, question, answer)
            assert whole(example, branch) == want
            n_answer = len(want) - len(world.oracle.ids(post, question))
            assert example.branches[branch][1] == n_answer
            assert want[-1] == world.processor.tokenizer.eos_token_id
        for task, gold in (("unaided", None), ("explained", "negative")):  # the whole is shared
            prompt = mulcot.build_messages(post, task, gold)[0]["content"][-1]["text"]
            example = encode(post, [("", None)], world.processor, shared=prompt)
            assert whole(example) == world.oracle.ids(post, "", prompt=prompt)


@pytest.mark.parametrize("place", ["text", "aspect", "answer"])
def test_user_text_never_becomes_a_special_token(world, place):
    """Each of the family's control tokens, spelled out in a post or an answer, is words; so are
    braces and field names."""
    special = special_ids(world.processor.tokenizer)
    tokens = world.processor.tokenizer.convert_ids_to_tokens(sorted(special))
    nasty, image = " ".join([*tokens, '{} {0} "Prediction": "negative"']), world.posts[0].image
    plain, attacked = (
        encode(Post("x", words if place == "text" else "day", image,
                    words if place == "aspect" else "Rex"),
               [(LABEL_FORMAT, words if place == "answer" else "fine")], world.processor)
        for words in ("plain", nasty))
    assert [i for i in whole(plain) if i in special] == [i for i in whole(attacked) if i in special]
    part = attacked.branches[0][0] if place == "answer" else attacked.prefix
    assert nasty in world.processor.tokenizer.decode(part)


def test_pad_and_end_tokens_are_the_familys_own(world):
    """The id that pads; the end token may be generated, vision tokens never."""
    tokenizer, never = world.processor.tokenizer, set(world.processor.never_generated)
    assert world.processor.pad_id == tokenizer.pad_token_id
    assert never == special_ids(tokenizer) - {tokenizer.eos_token_id, tokenizer.pad_token_id}


@pytest.mark.parametrize("family", TILED)
def test_max_pixels_caps_the_tiles(family, posts, texts, tmp_path):
    """N pixels are N // tile² tiles, at least one; a tiled picture has an overview besides."""
    write_family(tmp_path, family, "student", family_tokenizer(family, texts), weights=False)
    area, tokens_per_tile = TILED[family] ** 2, 4
    tiles = {}
    for n in (0.5, 1, 2, 4):
        processor = mulcot.load_processor(tmp_path, max_pixels=int(n * area))
        placeholder = processor.tokenizer.convert_tokens_to_ids(families.PLACEHOLDER[family])
        example = encode(posts[0], [(LABEL_FORMAT, None)], processor)
        tiles[n], rest = divmod(example.prefix.count(placeholder), tokens_per_tile)
        assert rest == 0
    assert tiles[0.5] == tiles[1] == 1 and tiles[2] <= 3 and 1 < tiles[4] <= 5, tiles


# ---- one shared pass


def oracle_tasks(oracle, posts):
    """Per task (logits (N, V), targets (N,)) of ordinary passes, post by post."""
    tasks = []
    for question, answer in TASKS:
        parts = [oracle.answer_logits(post, question, answer) for post in posts]
        tasks.append(tuple(torch.cat(part) for part in zip(*parts)))
    return tasks


def shared_tasks(model, processor, posts):
    """The same from one pass over both branches of all posts."""
    batch = collate([encode(post, TASKS, processor) for post in posts], processor.pad_id)
    hidden = forward_branches(model, batch)
    assert hidden.shape[:2] == batch.input_ids.shape
    masks = [batch.supervised(branch) for branch in (1, 2)]
    return [(model.lm_head(hidden[at]), batch.targets[at]) for at in masks]


def farthest(tasks, others):
    """The largest difference of two results' logits, relative to the first one's scale."""
    return max(float((a - b).abs().max() / a.abs().max())
               for (a, _), (b, _) in zip(tasks, others))


# transformers' delta rule computes in float32 whatever the model's dtype; in float64 all are 4e-16
ROUNDING = {"qwen3_5": 1e-4}


@torch.no_grad()
def test_one_pass_equals_separate_passes(world):
    """Answer logits of padded batches with pictures of several sizes, two, and none, in any order;
    another picture makes a difference."""
    wide, tall, two, none = world.posts
    swapped = Post("tall", tall.text, wide.image)
    for posts in ([wide, tall, two, none], [none, tall], [wide, swapped], [none]):
        want = oracle_tasks(world.oracle, posts)
        got = shared_tasks(world.model, world.processor, posts)
        assert all(torch.equal(ids, want_ids) for (_, ids), (_, want_ids) in zip(got, want))
        assert farthest(want, got) < ROUNDING.get(world.family, 1e-5)
    assert farthest(*(oracle_tasks(world.oracle, [post]) for post in (tall, swapped))) > 1e-3


def test_gradient_of_one_pass_equals_separate_passes(world, fresh):
    """The adapters of both tasks' loss, in the vision tower too, learn the same, with gradient
    checkpointing as well."""
    model, oracle = fresh
    mulcot.add_lora(model, 4, 8, 0.0, scope="all")
    trained = [p for name, p in model.named_parameters()
               if p.requires_grad and "audio_tower" not in name]  # no post has a sound
    for p in trained:
        p.data += 0.05 * torch.randn_like(p)

    def gradient(tasks):
        losses = [F.cross_entropy(logits, ids) for logits, ids in tasks]
        return torch.autograd.grad(multitask_loss(*losses), trained)

    want = gradient(oracle_tasks(oracle, world.posts))
    got = gradient(shared_tasks(model, world.processor, world.posts))
    scale = max(float(g.abs().max()) for g in want)
    assert scale > 0 and all(g.norm() > 0 for g in want)
    assert max(float((a - b).abs().max()) for a, b in zip(want, got)) < 1e-5 * scale
    model.train()
    train.checkpoint_layers(model)
    again = gradient(shared_tasks(model, world.processor, world.posts))
    assert max(float((a - b).abs().max()) for a, b in zip(got, again)) < 1e-6 * scale


# ---- labels and chains


@torch.no_grad()
def oracle_scores(world, posts):
    """Log-probabilities (B, 3) of the three answers by separate ordinary passes."""
    scores = []
    for post in posts:
        for label in LABELS:
            logits, ids = world.oracle.answer_logits(post, LABEL_FORMAT, render_label(label))
            scores.append(-F.cross_entropy(logits, ids, reduction="sum"))
    return torch.stack(scores).reshape(-1, len(LABELS)).log_softmax(-1)


@contextmanager
def likelier_end(world, by):
    """Within the block the end token's logit is higher, for whoever asks."""
    end = world.processor.tokenizer.eos_token_id

    def add(module, inputs, logits):
        logits[..., end] += by

    hook = world.model.lm_head.register_forward_hook(add)
    yield
    hook.remove()


def oracle_chains(world, posts, question, max_new_tokens):
    never = world.processor.never_generated
    return [world.oracle.generated(post, question, never, max_new_tokens) for post in posts]


def test_greedy_text_equals_transformers_generate(world, monkeypatch):
    """Of a padded batch whose rows end at different steps, also where the cache grows each few
    tokens; transformers has one post at a time."""
    batch = encode_batch(world.posts, [(LABEL_FORMAT, None)], world.model, world.processor)
    for by in (0.0, 1.0, 1.5, 2.0, 2.5):
        with likelier_end(world, by):
            want = oracle_chains(world, world.posts, LABEL_FORMAT, 10)
            for room in (0, 3, 64):
                monkeypatch.setattr(mulcot, "CACHE_ROOM", room)
                assert mulcot.generate_text(world.model, world.processor, batch, 10) == want
        if "stop" in dict(want).values() and len(set(want)) > 1:
            break
    else:
        pytest.fail("no row ended before another")


@pytest.mark.parametrize("decode", ["score", "greedy"])
def test_predict_equals_the_familys_own_passes(world, decode):
    """Label and chain of a batch, of one pass or of two, with pictures and without; of one post
    too, and the label without the chain."""
    posts, options = world.posts, dict(decode=decode, max_new_tokens=8)
    rows = mulcot.predict(world.model, world.processor, posts, **options)
    alone = mulcot.predict(world.model, world.processor, posts[0], **options)
    assert (alone["raw"], alone["prediction"]) == (rows[0]["raw"], rows[0]["prediction"])
    bare = mulcot.predict(world.model, world.processor, posts, chain=False, **options)
    assert [row["prediction"] for row in bare] == [row["prediction"] for row in rows]
    chains = oracle_chains(world, posts, REASON_FORMAT, 8)
    assert [row["raw"] for row in rows] == [text for text, _ in chains]
    if decode == "score":
        want = oracle_scores(world, posts)
        for each in (rows, bare):
            got = torch.tensor([row["probs"] for row in each])
            assert want.std() > 1e-3 and (got - want.exp()).abs().max() < 1e-4
        assert [row["prediction"] for row in rows] == [LABELS[n] for n in got.argmax(-1)]
    else:
        want = oracle_chains(world, posts, LABEL_FORMAT, 32)
        assert [row["raw_label"] for row in rows] == [text for text, _ in want]


# ---- soft labels


@pytest.fixture
def chains(world, tmp_path):
    """The posts as rows with labels and chains, and the flags that name them."""
    rows = []
    for post in world.posts:
        image, *frames = [Path(path).name for path in post.images] or [None]
        rows.append(post.row() | dict(image=image, frames=frames or None))
    mulcot.write_rows(tmp_path / "chains.jsonl", rows)
    images = str(Path(world.posts[0].image).parent)
    return ["--data", str(tmp_path / "chains.jsonl"), "--images", images]


@torch.no_grad()
def test_soft_labels_are_the_assistants_own_logits(world, chains, tmp_path):
    """At the tokens that a student of another size is trained on."""
    soft, size = f"{tmp_path}/soft", f"{world.folder}/assistant"
    assert generate.main(["soft", *chains, "--model", size, "--out", soft]) == 0
    assistant, _ = mulcot.load_model(size)
    oracle, labels = Oracle(world.family, size, assistant), mulcot.SoftLabels(soft)
    labels.load_head("cpu")
    head = labels.head
    for post in mulcot.read_posts(chains[1], chains[3])[::2]:
        branches = mulcot.training_branches(post, world.processor)
        example = encode(post, branches, world.processor)
        for number, branch in enumerate(branches, 1):
            want = oracle.answer_logits(post, *branch)[0][:, : len(head)]
            got = labels.hidden([example], number) @ head.T
            assert (got - want).abs().max() < 2e-3 * want.abs().max()  # 16 bits


# ---- adapters


def peft_names(model, targets):
    """The linears that PEFT wraps for these target_modules."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))
    return sorted(wrapped.base_model.targeted_module_names)


@pytest.mark.parametrize("scope", ["language", "all"])
def test_lora_scope_equals_pefts(world, fresh, scope):
    """"language" takes the language model's layers and leaves towers and projector alone; "all" is
    PEFT's matching by suffix. Nothing but the adapters is trained."""
    names, targets = mulcot.add_lora(fresh[0], 4, 8, 0.0, scope=scope), list(TARGETS)
    if scope == "language":
        prefix = LANGUAGE.get(world.family, "model.language_model.") + "layers."
        targets = re.escape(prefix) + rf".*\.({'|'.join(TARGETS)})"
    assert sorted(names) == peft_names(mulcot.load_model(world.folder / "student")[0], targets)
    trained = {name for name, p in fresh[0].named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{half}" for name in names for half in "AB"}


@torch.no_grad()
def test_peft_reads_the_saved_adapter(world, fresh, tmp_path):
    """The same logits under PEFT, alpha / rank applied once, and as a model folder of ours."""
    model, oracle = fresh
    mulcot.add_lora(model, 4, 12, 0.0, scope="all")
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            p.data += 0.1 * torch.randn_like(p)
    mulcot.save_adapter(model, tmp_path)
    want = oracle_tasks(oracle, world.posts[2:])
    base, _ = mulcot.load_model(world.folder / "student")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    ours, processor = mulcot.load_model(tmp_path)
    reader = Oracle(world.family, world.folder / "student", theirs.base_model.model)
    rounding = ROUNDING.get(world.family, 1e-5)
    assert farthest(want, oracle_tasks(reader, world.posts[2:])) < rounding
    assert farthest(want, shared_tasks(ours, processor, world.posts[2:])) < rounding
    assert farthest(want, oracle_tasks(world.oracle, world.posts[2:])) > 1e-3


# ---- model folders


@torch.no_grad()
def test_export_is_an_ordinary_model_folder(world, fresh, tmp_path):
    """`from_pretrained` of the class, its tokenizer and image processor read it; the same logits
    as base and adapter together; other files of the base's processor come along."""
    model, oracle = fresh
    base = shutil.copytree(world.folder / "student", tmp_path / "base")
    mulcot.write_json(base / "video_preprocessor_config.json", dict(kept=1))
    sizes = json.loads((base / "preprocessor_config.json").read_text())
    mulcot.write_json(base / "processor_config.json", dict(image_seq_len=4, image_processor=sizes))
    model.config._name_or_path = str(base)
    mulcot.add_lora(model, 4, 12, 0.0)
    for layer in mulcot.lora_layers(model).values():
        layer.lora_B.normal_(std=0.1)
    mulcot.save_adapter(model, tmp_path / "adapter")
    command = ["export", "--model", f"{tmp_path}/adapter", "--out", f"{tmp_path}/out"]
    assert generate.main(command) == 0
    assert generate.main(command) == 2  # never over a folder
    want = oracle_tasks(oracle, world.posts)
    theirs = type(model).from_pretrained(tmp_path / "out").eval()
    assert farthest(want, oracle_tasks(Oracle(world.family, tmp_path / "out", theirs),
                                       world.posts)) < 1e-5
    read = lambda name: json.loads((tmp_path / "out" / name).read_text())
    assert read("processor_config.json") == dict(image_seq_len=4)
    assert read("video_preprocessor_config.json") == dict(kept=1)
    assert (tmp_path / "out/generation_config.json").exists()


def test_a_template_beside_the_processor_is_found(world, tmp_path):
    """Older folders keep it in chat_template.json; without any a line says so."""
    folder = shutil.copytree(world.folder / "student", tmp_path / "old")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="chat_template"):
        mulcot.load_processor(folder)
    mulcot.write_json(folder / "chat_template.json", dict(chat_template=template))
    example = encode(world.posts[0], TASKS, mulcot.load_processor(folder))
    assert whole(example) == whole(encode(world.posts[0], TASKS, world.processor))


# ---- refusals, before a weight is read


TINY_TEXT = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, vocab_size=600)
WINDOWS = dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)
STRANGE = {  # family of the tokenizer, config, what the message names
    "gemma3": ("qwen2_vl", lambda _: AutoConfig.for_model("gemma3", text_config=TINY_TEXT),
               "gemma3.*sliding"),
    "conv": ("qwen2_vl", lambda _: AutoConfig.for_model("lfm2_vl", text_config=TINY_TEXT | dict(
        model_type="lfm2", layer_types=["conv", "full_attention"])), "lfm2_vl.*conv"),
    "windows": ("qwen2_vl", lambda tokenizer: family_config(
        "qwen2_vl", "student", tokenizer, **WINDOWS), "qwen2_vl.*sliding"),
    "windows of another language model": ("internvl", lambda tokenizer: family_config(
        "internvl", "student", tokenizer, **WINDOWS), "internvl.*sliding")}


@pytest.mark.parametrize("case", STRANGE)
def test_what_cannot_be_laid_out_right_is_refused(case, tmp_path, texts):
    """Without any weight in the folder: the reason comes from the config."""
    family, make, message = STRANGE[case]
    tokenizer = family_tokenizer(family, texts)
    write_family(tmp_path, "qwen2_vl", "student", family_tokenizer("qwen2_vl", texts),
                 weights=False)
    make(tokenizer).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message):
        mulcot.load_model(tmp_path)
