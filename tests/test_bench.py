"""The benchmark's training steps on a tiny model: equal losses, operations as counted by hand."""

import pytest

import bench
import mulcot


@pytest.fixture
def tiny(monkeypatch):
    """The models that stand for those of real shapes; eager, since torch does not count a CPU's
    attention."""
    def real_shape(shape, device):
        models.append(bench.qwen(device, hidden=128, layers=2).requires_grad_(False))
        models[-1].set_attn_implementation("eager")
        return models[-1]

    models = []
    monkeypatch.setattr(bench, "real_shape", real_shape)
    return models


def operations_by_hand(model, examples):
    """Of one of our steps; a product and its sum are two. The base is frozen, so that backward has
    the inputs' gradients alone."""
    config, vision = model.config.text_config, model.model.visual
    B, T = len(examples), max(map(len, examples))
    N, D = B * T, config.hidden_size
    layers = mulcot.lora_layers(model).values()
    base = N * sum(layer.base.in_features * layer.base.out_features for layer in layers)
    factors = N * sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in layers)
    attention = B * config.num_hidden_layers * 2 * T * T * D  # scores, and their mean of values
    head = sum(n for e in examples for _, n in e.branches) * D * config.vocab_size
    patches = [len(e.media["pixel_values"]) for e in examples]
    merger = sum(p.numel() for p in vision.merger.parameters())  # 4 patches to a token
    tower = sum(patches) * (sum(p.numel() for p in vision.parameters()) - merger + merger / 4)
    for n in patches:  # windows are left out
        tower += len(vision.fullatt_block_indexes) * 2 * n * n * vision.config.hidden_size
    return 2 * (2 * base + 3 * factors + 3 * attention + 2 * head + tower)


def test_operations_of_a_step(tiny):
    run = bench.shape_step("3B", "cpu", "ours", 1)
    counted = bench.operations(lambda: run(1))["sum"]
    assert counted == pytest.approx(operations_by_hand(tiny[0], bench.samples(1)), rel=0.01)


def test_all_sides_begin_at_one_loss(tiny):
    ours, peft, checkpointed = (
        bench.shape_step("3B", "cpu", side, 1, checkpointing)(1)[0].item()
        for side, checkpointing in (("ours", False), ("PEFT", False), ("ours", True)))
    assert ours == pytest.approx(peft, rel=1e-5) and ours == checkpointed
