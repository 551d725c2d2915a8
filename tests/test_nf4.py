"""NF4: bits as in bitsandbytes, LoRA on top, whole models, adapters that remember."""

import bitsandbytes
import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import nn
from transformers import (AutoModelForImageTextToText, BitsAndBytesConfig,
                          Qwen2_5_VLForConditionalGeneration)

import generate
import mulcot
import train
from families import qwen_config
from mulcot import NF4, LoRALinear, NF4Linear, nf4_dequantize, nf4_quantize
from test_lora import fill, inputs, logits, model, with_adapters  # noqa: F401


@pytest.fixture(autouse=True)
def eager():
    """bitsandbytes compiles its reference; here it runs as written."""
    with torch.compiler.set_stance("force_eager"):
        yield


# ---- codes and absmax

def weights():
    """{name: float32 weights}: random ones, and those that quantisers stumble over."""
    middles = (NF4[1:] + NF4[:-1]) / 2
    edges = torch.cat([NF4, middles, middles.nextafter(NF4[:-1]), middles.nextafter(NF4[1:]),
                       torch.zeros(3)])  # a block of 64
    huge = torch.randn(8, 64)
    huge[3, 5] = 60000.0
    return {"random": torch.randn(64, 192), "long rows": torch.randn(5, 1024),
            "width 96": torch.randn(80, 96), "zeros": torch.zeros(8, 64), "one huge value": huge,
            "levels and middles": edges[None], "scaled middles": 3.7 * edges[None],
            "tiny": 1e-30 * torch.randn(8, 64), "all equal": torch.full((2, 96), -0.3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", weights())
def test_bits_are_those_of_bitsandbytes(name, dtype):
    """Codes, absmax and dequantised weights, on CPU. The weights are given as one row: of rows
    whose width is a multiple of 16 but not of 64, bitsandbytes 0.50.2's AVX-512 kernel takes the
    scales from wrong blocks (errors above any gap), its generic code and ours do not."""
    weight = weights()[name].to(dtype)
    codes, absmax = nf4_quantize(weight)
    theirs, state = quantize_4bit(weight.reshape(1, -1), quant_type="nf4",
                                  compress_statistics=False)
    assert codes.dtype == torch.uint8 and absmax.dtype == torch.float32
    assert torch.equal(codes, theirs.flatten()) and torch.equal(absmax, state.absmax)
    ours = nf4_dequantize(codes, absmax, weight.shape, dtype)
    back = dequantize_4bit(theirs, state)
    assert ours.dtype == dtype and ours.shape == weight.shape
    assert torch.equal(ours.flatten(), back.flatten())


def test_levels_are_normal_quantiles():
    """The table from its definition: evenly spaced quantiles on both sides of zero, over the
    largest."""
    sides = [torch.linspace(0.9677083, 0.5, n, dtype=torch.float64)[:-1] for n in (9, 8)]
    high, low = map(torch.special.ndtri, sides)
    levels = torch.cat([-low, high.new_zeros(1), high.flip(0)]) / high[0]
    assert (levels - NF4).abs().max() < 2e-6


def test_other_block_sizes():
    """Also where the block's size is no power of two. A last block that is short is refused, and
    scales that model.half() has rounded."""
    weight = torch.randn(41, 96)
    codes, absmax = nf4_quantize(weight, 96)
    assert torch.equal(absmax, weight.abs().amax(1))
    back = nf4_dequantize(codes, absmax, weight.shape, torch.float32, 96)
    assert ((weight - back).abs() <= 0.16 * absmax[:, None]).all()
    with pytest.raises(AssertionError, match="7, 50.*64"):
        nf4_quantize(torch.randn(7, 50))
    with pytest.raises(AssertionError, match="float16"):
        nf4_dequantize(codes, absmax.half(), weight.shape, torch.float16, 96)


# ---- a layer, LoRA on it

def dense_twin(layer):
    """The nn.Linear that an NF4Linear stands for."""
    twin = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    twin.weight.data = layer.weight(layer.dtype)
    twin.bias = layer.bias
    return twin.requires_grad_(False)


def lora_pair(dtype, bias=True):
    """The same adapter on an NF4Linear and on its dense twin."""
    packed = NF4Linear(nn.Linear(96, 80, bias).to(dtype))
    layers = []
    for base in (packed, dense_twin(packed)):
        torch.manual_seed(1)
        layer = LoRALinear(base, 4, 8)
        layer.lora_B.data.normal_()
        layers.append(layer)
    return layers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_on_nf4_is_lora_on_dequantised_weights(dtype, bias):
    """Output and all gradients, bit for bit."""
    found = []
    for layer in lora_pair(dtype, bias):
        x = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(2)).to(dtype)
        x.requires_grad_(True)
        y = layer(x)
        y.square().sum().backward()
        found.append([y, x.grad, layer.lora_A.grad, layer.lora_B.grad])
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(*found))


def test_no_graph_holds_a_dense_weight():
    """Forward and backward make it anew; in between no tensor of its size is saved."""
    def saved(layer):
        x, sizes = torch.randn(3, 96, requires_grad=True), []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: sizes.append(t.numel()) or t, lambda t: t):
            layer(x).sum().backward()
        return sizes

    layer, twin = lora_pair(torch.float32)
    assert 96 * 80 not in saved(layer) and 96 * 80 in saved(twin)


# ---- a model

def packed_names(model):  # noqa: F811
    return [name for name, m in model.named_modules() if isinstance(m, NF4Linear)]


def same_in_dense(model, toy):  # noqa: F811
    """The dense model of the same folder, its linears replaced by dequantised ones."""
    twin = mulcot.load_model(toy / "student", dtype=model.dtype)[0]
    for name in packed_names(model):
        old, packed = twin.get_submodule(name), model.get_submodule(name)
        weight = nf4_dequantize(*nf4_quantize(old.weight), old.weight.shape, model.dtype)
        assert torch.equal(weight, packed.weight(model.dtype))
        old.weight.data = weight
    return twin


@pytest.fixture
def packed(toy):
    return mulcot.load_trained(toy / "student", nf4=True)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_dequantised_model(toy, inputs, dtype):  # noqa: F811
    """Of all weights, those of the language model's linears alone have changed."""
    model = mulcot.load_model(toy / "student", dtype=dtype, nf4=True)[0]  # noqa: F811
    twin = same_in_dense(model, toy)
    inputs = dict(inputs, pixel_values=inputs["pixel_values"].to(dtype))
    assert torch.equal(logits(model, inputs), logits(twin, inputs))
    base = mulcot.load_model(toy / "student", dtype=dtype)[0]
    assert (logits(model, inputs) - logits(base, inputs)).abs().max() > 0.01
    mine, dense = model.state_dict(), base.state_dict()
    names = packed_names(model)
    assert dense.keys() - mine.keys() == {f"{name}.weight" for name in names}
    assert all(torch.equal(dense[key], mine[key]) for key in dense.keys() & mine.keys())
    assert names == mulcot.add_lora(base) and len(names) == 14 and not model.training


def test_qwen_7b_fits_in_7_3_gb():
    """6.53 billion weights at 4.5 bits, the rest in bf16, from the real shapes without memory."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(qwen_config("7B")).bfloat16()  # noqa: F811
    total, names = sum(p.numel() for p in model.parameters()), mulcot.add_lora(model)
    bases = [model.get_submodule(name).base for name in names]
    linear = sum(m.weight.numel() for m in bases)
    assert (total, linear, len(names)) == (8_292_166_656, 6_525_288_448, 196)
    shapes = {m.weight.shape: m for m in bases}
    size = {k: sum(b.nbytes for b in NF4Linear(m).buffers()) for k, m in shapes.items()}
    small = sum(size[m.weight.shape] for m in bases)
    assert small == linear * 4.5 / 8
    assert small + 2 * (total - linear) == 7_204_231_168 < 7.3e9


# ---- adapters

@pytest.fixture
def adapted(packed, tmp_path):
    """(NF4 model with adapters, also in the dense vision tower, their folder)."""
    mulcot.save_adapter(with_adapters(packed, scope="all"), tmp_path / "adapter")
    return packed, tmp_path / "adapter"


def test_peft_over_bitsandbytes_reads_what_we_write(toy, tmp_path, inputs):  # noqa: F811
    """The other house's base, wrappers and kernels: the same logits. (The assistant's widths are
    multiples of 64, see above.)"""
    ours = with_adapters(mulcot.load_trained(toy / "assistant", nf4=True)[0])
    mulcot.save_adapter(ours, tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                bnb_4bit_compute_dtype=torch.float32,
                                llm_int8_skip_modules=["model.visual", "lm_head"])
    base = AutoModelForImageTextToText.from_pretrained(
        toy / "assistant", quantization_config=config, dtype=torch.float32, device_map="cpu",
        attn_implementation="sdpa")
    layers = [m for m in base.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    for layer in layers:  # its AVX512 kernels for inference compute in bf16
        layer.support_avx512bf16_for_cpu = False
    assert len(layers) == 14
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert any(isinstance(m, peft.tuners.lora.bnb.Linear4bit) for m in theirs.modules())
    assert (logits(theirs, inputs) - logits(ours, inputs)).abs().max() < 1e-5


def test_an_adapter_remembers_its_base(adapted, toy, inputs, tmp_path, capsys):  # noqa: F811
    """Loaded by its folder alone it gets the base it was trained over; another one is told. What
    PEFT reads is as over a dense base."""
    model, folder = adapted  # noqa: F811
    again = mulcot.load_trained(folder)[0]
    assert len(packed_names(again)) == 14 and not capsys.readouterr().err
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    dense = mulcot.load_trained(folder, nf4=False)[0]
    assert not packed_names(dense)
    assert "trained with nf4 True, here it is False" in capsys.readouterr().err
    mulcot.save_adapter(dense, tmp_path / "dense")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "dense" / name).read_bytes() == (folder / name).read_bytes()
    assert not packed_names(mulcot.load_trained(tmp_path / "dense")[0])
    assert not capsys.readouterr().err
    assert len(packed_names(mulcot.load_trained(tmp_path / "dense", nf4=True)[0])) == 14
    assert "trained with nf4 False, here it is True" in capsys.readouterr().err


def test_export_merges_into_the_dequantised_base(adapted, toy, inputs, tmp_path):  # noqa: F811
    """Ordinary linears with the same logits, those without an adapter too, in a folder that loads
    as any other."""
    model, folder = adapted  # noqa: F811
    want, out = logits(model, inputs), tmp_path / "exported"
    assert generate.main(["export", "--model", str(folder), "--out", str(out)]) == 0
    exported = mulcot.load_trained(out)[0]
    assert exported.state_dict().keys() == mulcot.load_model(
        toy / "student")[0].state_dict().keys()
    assert (logits(exported, inputs) - want).abs().max() < 1e-5
    some = mulcot.load_trained(toy / "student", nf4=True)[0]
    want = logits(some, inputs)
    mulcot.add_lora(some, targets=("q_proj",))
    assert not packed_names(mulcot.merge_lora(some)) and torch.equal(logits(some, inputs), want)


# ---- command lines

def test_train_and_predict(toy, tmp_path, capsys):
    """`--nf4` trains over 4 bits and says how much of what is trained; predicting with the adapter
    needs no flag."""
    posts, best = str(toy / "posts.jsonl"), tmp_path / "run/best"
    flags = ["assistant", "--data", posts, "--dev", posts, "--images", str(toy / "images"),
             "--model", str(toy / "student"), "--no-reasoning", "--epochs", "2", "--batch", "6",
             "--accumulate", "1", "--lr", "0.01", "--out", str(tmp_path / "run")]
    assert train.main([*flags, "--nf4"]) == 0
    printed = capsys.readouterr().out
    dense = mulcot.load_model(toy / "student")[0]
    names = mulcot.add_lora(dense, 16)
    trained = sum(p.numel() for p in dense.parameters() if p.requires_grad)
    total = sum(p.numel() for p in dense.parameters())
    assert f"trainable  {trained:,} of {total:,} parameters" in printed
    assert packed_names(mulcot.load_trained(best)[0]) == [f"{name}.base" for name in names]
    predict = ["predict", "--data", posts, "--images", str(toy / "images"), "--model", str(best),
               "--no-chain", "--out", str(tmp_path / "nf4.jsonl")]
    assert generate.main(predict) == 0 and "note:" not in capsys.readouterr().err
    assert generate.main([*predict, "--no-nf4"]) == 2  # other rows, another file
    predict[-1] = str(tmp_path / "dense.jsonl")
    assert generate.main([*predict, "--no-nf4"]) == 0 and "note:" in capsys.readouterr().err
    a, b = (mulcot.read_rows(tmp_path / f"{name}.jsonl") for name in ("nf4", "dense"))
    assert [r["id"] for r in a] == [r["id"] for r in b] and a != b
