"""Low-rank adapters: PEFT's format both ways, where they sit, modes, merging, errors."""

import json
import shutil

import peft
import pytest
import torch
from conftest import pass_inputs
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

import mulcot
from families import qwen_config
from mulcot import InputError, LoRALinear

KEY = "base_model.model.model.language_model.layers.0.self_attn.q_proj.{}.weight"


@pytest.fixture
def model(toy):
    return mulcot.load_model(toy / "student")[0]


@pytest.fixture(scope="module")
def inputs(student, posts):
    """An ordinary forward's arguments for one post with an image."""
    example = mulcot.encode(posts[0], [(mulcot.LABEL_FORMAT, None)], student[1])
    return pass_inputs(student[1], example, 1)


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def fill(model, seed=0):
    """Small random values into every adapter's B."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        if name.endswith("lora_B") or ".lora_B." in name:
            p.data.copy_(0.1 * torch.randn(p.shape, generator=generator))


def with_adapters(model, **options):
    mulcot.add_lora(model, 4, 12, 0.0, **options)
    fill(model)
    return model


# ---- PEFT (that PEFT reads what we write stands in test_families.py)

@pytest.mark.parametrize("targets, endings", [
    (list(mulcot.TARGETS), mulcot.TARGETS),  # by endings, so in the vision tower's MLPs too
    (r".*language_model.*\.(q|v)_proj", ("q_proj", "v_proj"))])  # an expression for whole names
def test_we_read_what_peft_writes(model, toy, inputs, tmp_path, targets, endings):
    """All of it, with its alpha and rank; half of it is refused, unless PEFT was told to leave some
    layers out."""
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets)
    theirs = peft.get_peft_model(mulcot.load_model(toy / "student")[0], config).eval()
    fill(theirs)
    theirs.save_pretrained(tmp_path)
    names = mulcot.load_adapter(model, tmp_path)
    assert {name.rpartition(".")[2] for name in names} == set(endings)
    assert any("visual" in name for name in names) == (targets == list(mulcot.TARGETS))
    assert (logits(model, inputs) - logits(theirs, inputs)).abs().max() < 1e-5
    file = tmp_path / "adapter_model.safetensors"
    halved = {key: tensor for key, tensor in load_file(file).items() if ".layers.0." in key}
    save_file(halved, file)
    with pytest.raises(InputError, match="half a file"):
        mulcot.load_adapter(mulcot.load_model(toy / "student")[0], tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    mulcot.write_json(tmp_path / "adapter_config.json", settings | dict(layers_to_transform=[0]))
    names = mulcot.load_adapter(mulcot.load_model(toy / "student")[0], tmp_path)
    assert len(names) == len(halved) / 2


# ---- which layers

def test_targets_are_whole_last_names():
    """A name that merely contains a target is another layer."""
    tree = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("q_proj", "q_proj2", "my_q_proj")})
    tree["a"] = nn.ModuleDict({"q_proj": nn.Linear(3, 3)})
    assert mulcot.add_lora(tree) == ["q_proj", "a.q_proj"]


@pytest.mark.parametrize("size, scope, count", [
    ("7B", "all", 47_589_376), ("7B", "language", 40_370_176),
    ("3B", "all", 37_152_768), ("3B", "language", 29_933_568)])
def test_trainable_counts_at_rank_16(size, scope, count):
    """The real models' shapes, without their memory."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(qwen_config(size))
    mulcot.add_lora(model, 16, 32, scope=scope)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@pytest.mark.parametrize("target", ["c_attn", "embed_tokens"])  # the second is no linear
def test_no_match_is_refused(model, target):
    """An adapter on nothing would train nothing."""
    with pytest.raises(InputError, match="no linear"):
        mulcot.add_lora(model, targets=(target,))


# ---- in training, merged

def test_merge_into_bf16_rounds_once():
    """The sum is taken in fp32: as the float64 sum, rounded once, save for rare ties."""
    base = nn.Linear(256, 192, bias=False).bfloat16()
    layer = LoRALinear(base, 8, 20)
    layer.lora_B.data.normal_(std=0.1)
    A, B, W = layer.lora_A.double(), layer.lora_B.double(), base.weight.double()
    want = (W + 2.5 * B @ A).bfloat16()
    mulcot.merge_lora(nn.ModuleDict({"q_proj": layer}))
    assert base.weight.dtype == torch.bfloat16
    assert (base.weight != want).float().mean() < 1e-4
    rounded_early = (W + (2.5 * B @ A).bfloat16().double()).bfloat16()
    assert (rounded_early != want).float().mean() > 0.01


@pytest.mark.parametrize("p", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_torchs_in_distribution(p, dtype):
    """Each element by itself is zero with probability p, else x / (1 - p), in the gradient too; an
    element count that four does not divide; another draw each time; the same after a seed."""
    ours, theirs = mulcot.Dropout(p), torch.nn.Dropout(p)
    x = torch.full((501, 401), 3.0, dtype=dtype, requires_grad=True)
    torch.manual_seed(0)
    y, other = ours(x), ours(x)
    kept = y != 0
    assert torch.equal(y[kept].unique(), theirs(x).unique()[1:])
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(float((~kept).float().mean()) - p) < 4 * deviation
    both = float((~kept & (other == 0)).float().mean())  # two draws know nothing of each other
    assert abs(both - p**2) < 4 * (p**2 / x.numel()) ** 0.5
    beside = float((~kept[:, 1:] & ~kept[:, :-1]).float().mean())  # nor two neighbours
    assert abs(beside - p**2) < 4 * (p**2 / x.numel()) ** 0.5
    y.sum().backward()
    assert torch.equal(x.grad * 3, y)
    torch.manual_seed(0)
    assert torch.equal(ours(x), y)
    assert ours.eval()(x) is x and mulcot.Dropout(0.0)(x) is x


def test_dropout_is_that_of_the_layers_mode(model, toy, inputs, tmp_path):
    """The story: adapters put on a model in eval mode, drawn or loaded, drop nothing out; in train
    mode they do, each time anew. Fresh ones leave the base model as it is, exactly."""
    base = logits(model, inputs)
    mulcot.add_lora(model, 4, 12, 0.5)
    assert torch.equal(logits(model, inputs), base)
    fill(model)
    want = logits(model, inputs)
    assert torch.equal(logits(model, inputs), want)
    mulcot.save_adapter(model, tmp_path)
    other = mulcot.load_model(toy / "student")[0]
    mulcot.load_adapter(other, tmp_path)
    assert torch.equal(logits(other, inputs), want)
    other = mulcot.load_model(toy / "student")[0].train()
    mulcot.load_adapter(other, tmp_path)
    a, b = logits(other, inputs), logits(other, inputs)
    assert not torch.equal(a, b) and not torch.equal(a, want)


# ---- reading

@pytest.fixture
def saved(model, tmp_path):
    """An adapter folder and edit(tensors, config), which changes what it holds."""
    mulcot.save_adapter(with_adapters(model), tmp_path)
    mulcot.merge_lora(model)

    def edit(change):
        file, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
        tensors, config = load_file(file), json.loads(settings.read_text())
        change(tensors, config)
        save_file(tensors, file), settings.write_text(json.dumps(config))
        return tmp_path

    return edit


NORM = "base_model.model.model.language_model.norm.{}.weight"
DAMAGE = [  # what the message must say, and what was done to (tensors, config)
    ("layers.9.* fits no linear layer",
     lambda t, c: t.update({KEY.format("lora_A").replace("0", "9"): torch.zeros(4, 96)})),
    ("lm_head.* fits no linear layer", lambda t, c: t.update({"lm_head.weight": torch.zeros(4)})),
    ("norm fits no linear layer", lambda t, c: t.update(
        {NORM.format(half): torch.ones(4, 4) for half in ("lora_A", "lora_B")})),
    ("unfilled .*q_proj.lora_B", lambda t, c: t.pop(KEY.format("lora_B"))),
    ("(?s)does not fit.*q_proj.lora_B.*96, 5",
     lambda t, c: t.update({KEY.format("lora_B"): torch.zeros(96, 5)})),
    ("use_dora", lambda t, c: c.update(use_dora=True)),
    ("rank_pattern", lambda t, c: c.update(rank_pattern={"q_proj": 2})),
    ("only plain LoRA", lambda t, c: c.update(bias="all")),
    ("another adapter type", lambda t, c: c.update(peft_type="IA3"))]


@pytest.mark.parametrize("message, damage", DAMAGE, ids=[message for message, _ in DAMAGE])
def test_what_does_not_fit_is_refused(model, saved, message, damage):
    """Nothing is loaded in part and in silence; the message names the culprit. Whole it loads."""
    assert len(mulcot.load_adapter(model, saved(lambda t, c: None))) == 14
    mulcot.merge_lora(model)
    with pytest.raises(InputError, match=message):
        mulcot.load_adapter(model, saved(damage))


def test_adapters_that_the_file_does_not_fill_are_refused(model, saved):
    """A model that already wears more adapters than the file holds."""
    mulcot.add_lora(model, scope="all")
    with pytest.raises(InputError, match="unfilled"):
        mulcot.load_adapter(model, saved(lambda t, c: None))


def test_older_spellings_are_mapped(model, toy, inputs, tmp_path):
    """Checkpoints from before the language model's own prefix: same layers, same logits."""
    old = mulcot.load_model(toy / "student")[0]
    mulcot.save_adapter(with_adapters(old, scope="all"), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {k.replace("base_model.model.model.language_model.", "base_model.model.model.")
               .replace("base_model.model.model.visual.", "base_model.model.visual."): v
               for k, v in load_file(file).items()}
    assert any(k.startswith("base_model.model.model.layers.0.") for k in tensors)
    assert any(k.startswith("base_model.model.visual.blocks.0.") for k in tensors)
    save_file(tensors, file)
    assert len(mulcot.load_adapter(model, tmp_path)) == 20
    assert torch.equal(logits(model, inputs), logits(old, inputs))


def test_a_model_saved_with_wrappers_on_is_refused(model, toy, tmp_path):
    """Its base weights have other names, so it would come back with random layers."""
    folder = shutil.copytree(toy / "student", tmp_path / "saved")
    with_adapters(model).save_pretrained(folder)
    with pytest.raises(InputError, match="merge_lora"):
        mulcot.load_model(folder)
    mulcot.merge_lora(model).save_pretrained(folder)
    mulcot.load_model(folder)
