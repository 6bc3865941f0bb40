"""The wide resnet of 2018: to the parameter, to the multiplication, to its formula, to its initialization."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nbutils.core import seed_everything
from nbutils.wide_resnet import GAMMAS, Block, WideResNet, wide_resnet_22


@pytest.fixture(scope="module")
def model():
    seed_everything(0)
    return wide_resnet_22()


def test_parameters(model):
    assert sum(p.numel() for p in model.parameters()) == 9_658_458
    assert sum(p.numel() for p in wide_resnet_22("ones").parameters()) == 9_658_458


def test_multiplications_and_shapes(model):
    """1.3846 thousand million a 32 x 32 image, counted by hooks on what really runs."""
    macs, shapes, handles = [], [], []

    def count(layer, args, output):
        each = layer.weight[0].numel()                            # products for one number of the output
        macs.append(output.numel() * each)
        shapes.append((type(layer).__name__, tuple(output.shape[1:])))

    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            handles.append(layer.register_forward_hook(count))
    with torch.no_grad():
        out = model.eval()(torch.randn(1, 3, 32, 32))
    for handle in handles:
        handle.remove()
    assert out.shape == (1, 10)
    assert sum(macs) / 1e9 == pytest.approx(1.3846, abs=5e-5)
    assert len(shapes) == 1 + 9 * 2 + 3 + 1                       # stem, blocks, shortcuts, head: 22 layers that count, and 3 of size 1x1
    assert shapes[0] == ("Conv2d", (16, 32, 32)) and shapes[-1] == ("Linear", (10,))
    assert [s for _, s in shapes[1:8]] == [(96, 32, 32)] * 7
    assert {s for _, s in shapes[8:15]} == {(192, 16, 16)} and {s for _, s in shapes[15:22]} == {(384, 8, 8)}


def test_layers(model):
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.bias is None for m in convolutions)
    assert not any(isinstance(m, nn.Dropout) for m in model.modules())
    assert [(b.conv1.in_channels, b.conv1.out_channels, b.conv1.stride[0]) for b in model.groups] == [
        (16, 96, 1), (96, 96, 1), (96, 96, 1), (96, 192, 2), (192, 192, 1), (192, 192, 1), (192, 384, 2), (384, 384, 1), (384, 384, 1)]
    for i, block in enumerate(model.groups):
        assert block.conv1.kernel_size == block.conv2.kernel_size == (3, 3) and block.conv2.stride == (1, 1)
        if i % 3:
            assert isinstance(block.shortcut, nn.Identity)
        else:
            assert tuple(block.shortcut.weight.shape) == (*block.conv1.weight.shape[:2], 1, 1)
            assert block.shortcut.stride == block.conv1.stride and block.shortcut.bias is None


@pytest.mark.parametrize("inputs, outputs, stride", [(4, 4, 1), (4, 6, 1), (4, 6, 2), (4, 4, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_block_is_its_formula(inputs, outputs, stride, training):
    seed_everything(1)
    block = Block(inputs, outputs, stride).double().train(training)
    for norm in (block.bn1, block.bn2):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    x = torch.randn(3, inputs, 8, 8, dtype=torch.float64)

    def bn(x, norm):
        mean = x.mean((0, 2, 3)) if training else norm.running_mean
        var = x.var((0, 2, 3), unbiased=False) if training else norm.running_var
        scale = norm.weight / (var + 1e-5).sqrt()
        return (x - mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]

    def conv(x, weight, stride, padding):
        """By unfolding: sums of products, and no convolution."""
        columns = F.unfold(x, weight.shape[-1], padding=padding, stride=stride)
        side = (8 - 1) // stride + 1 if x.shape[-1] == 8 else x.shape[-1]
        return (weight.flatten(1) @ columns).view(len(x), -1, side, side)

    a = bn(x, block.bn1).clamp(min=0)
    middle = bn(conv(a, block.conv1.weight, stride, 1), block.bn2).clamp(min=0)
    shortcut = a if (inputs, stride) == (outputs, 1) else conv(a, block.shortcut.weight, stride, 0)
    expected = 0.2 * conv(middle, block.conv2.weight, 1, 1) + shortcut
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)


def test_net_is_its_parts(model):
    model.eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        h = model.stem(x)
        for block in model.groups:
            h = block(h)
        h = F.relu(model.bn(h))
        assert h.shape == (2, 384, 8, 8)
        torch.testing.assert_close(model(x), model.head(F.adaptive_avg_pool2d(h, 1).flatten(1)), rtol=1e-5, atol=1e-5)


def test_gammas_of_2018(model):
    """From U(0, 1): each block's first norm and the last one. From 1: the inner ones. All shifts from 0."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    outer = [model.bn, *(block.bn1 for block in model.groups)]
    assert len(norms) == 19 and len(outer) == 10
    drawn = torch.cat([m.weight.detach() for m in outer])
    assert len(drawn) == 16 + 3 * 96 + 3 * 192 + 2 * 384 + 384
    assert 0 <= drawn.min() < 0.01 and 0.99 < drawn.max() <= 1
    n = len(drawn)
    assert abs(drawn.mean() - 0.5) < 4 / math.sqrt(12 * n) and abs(drawn.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / n)
    assert all(m.weight.std() > 0.15 for m in outer)
    assert all(torch.equal(block.bn2.weight, torch.ones_like(block.bn2.weight)) for block in model.groups)
    assert all(not m.bias.any() for m in norms)


def test_gammas_of_today():
    ones = wide_resnet_22("ones", classes=3)
    assert all(torch.equal(m.weight, torch.ones_like(m.weight)) for m in ones.modules() if isinstance(m, nn.BatchNorm2d))
    assert ones.head.out_features == 3


def test_weights_start_as_torchs_own(model):
    """U(-b, b) with b = 1 / sqrt(inputs of one output), for convolutions and the linear layer."""
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            weight = layer.weight.detach()
            assert weight.abs().max() <= bound * (1 + 1e-6)
            assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert model.head.bias.abs().max() <= 1 / math.sqrt(384)


def test_the_seed_decides():
    def draw(seed):
        seed_everything(seed)
        return WideResNet(blocks=1, widen=1).state_dict()

    a, b, c = draw(0), draw(0), draw(1)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["bn.weight"], c["bn.weight"])


@pytest.mark.parametrize("side", [32, 33, 28, 96])
def test_other_sizes(side):
    small = WideResNet(blocks=1, widen=1, channels=1, classes=4)
    assert small(torch.randn(2, 1, side, side)).shape == (2, 4)


def test_every_parameter_gets_a_gradient():
    small = WideResNet(blocks=2, widen=1)
    small(torch.randn(4, 3, 16, 16)).logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in small.parameters())


def test_bad_arguments():
    with pytest.raises(ValueError, match="unknown gamma 'one'") as caught:
        wide_resnet_22("one")
    assert all(name in str(caught.value) for name in GAMMAS)
    for options in ({"blocks": 0}, {"widen": 0}, {"blocks": -1}):
        with pytest.raises(ValueError, match="both must be 1 or more"):
            WideResNet(**options)
