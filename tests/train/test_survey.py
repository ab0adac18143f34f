"""The idioms of residual networks: each is gated soundly, or refused; none is silently another."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from eps_train.models.registry import make
from tests.train.idioms import IDIOMS
from tests.train.oracle import judge

QUICK = (
    *("in place", "torch.add, alpha", "minus", "addcmul", "lerp", "stochastic depth", "assertion"),
    *("in place, held by a view", "no_grad", "broadcast, pooled", "position", "module that adds"),
    *("buffer that is written", "buffer that is replaced", "straight-through", "frozen norms"),
    *("warm-up by counting", "reached by a closure", "functional convolution", "tied weights"),
)
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in IDIOMS]


@pytest.mark.parametrize("name", NAMES)
def test_idiom(name: str) -> None:
    expected, make = IDIOMS[name]
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
        if isinstance(module, nn.BatchNorm2d) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
    before = copy.deepcopy(model.state_dict())
    found = judge(model, torch.randn(3, 3, 8, 8))
    assert found == expected if isinstance(found, int) else expected is None, found
    assert not isinstance(found, str) or "\n" not in found
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# The smallest of each family, with the size of the images where that is not 64.
LIBRARIES = {
    **dict.fromkeys(("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"), 64),
    **dict.fromkeys(("mobilenet_v2", "mobilenet_v3_small"), 64),
    **dict.fromkeys(("efficientnet_b0", "regnet_x_400mf", "regnet_y_400mf", "mnasnet0_5"), 64),
    **dict.fromkeys(("convnext_tiny", "swin_t", "swin_v2_t", "efficientnet_v2_s"), 64),
    **dict.fromkeys(("densenet121", "shufflenet_v2_x0_5", "squeezenet1_0", "vgg11_bn"), 64),
    **dict.fromkeys(("vit_b_32", "maxvit_t", "alexnet"), 224),
    "googlenet": 224,
    "inception_v3": 299,
}
FAMILIES = {
    **dict.fromkeys(("resnet10t", "resnetv2_18", "skresnet18", "ecaresnet26t", "seresnet18"), 64),
    **dict.fromkeys(("rexnet_100", "dpn48b", "dla46_c", "res2net50_14w_8s", "hrnet_w18_small"), 64),
    **dict.fromkeys(("mobilenetv4_conv_small", "tf_efficientnet_b0", "mixnet_s", "fbnetc_100"), 64),
    **dict.fromkeys(("ghostnet_050", "tinynet_e", "lcnet_050", "mnasnet_050", "spnasnet_100"), 64),
    **dict.fromkeys(("convnext_atto", "convnextv2_atto", "convmixer_768_32", "starnet_s050"), 64),
    **dict.fromkeys(("regnetx_002", "regnety_002", "cspresnet50", "darknet53", "vovnet39a"), 64),
    **dict.fromkeys(("edgenext_xx_small", "fastvit_t8", "repvgg_a0", "mobileone_s0"), 64),
    **dict.fromkeys(("poolformer_s12", "repvit_m0_9", "nf_resnet26", "inception_next_atto"), 64),
    **dict.fromkeys(("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"), 224),
    **dict.fromkeys(
        ("efficientvit_m0", "levit_128s", "xcit_nano_12_p16_224", "coat_lite_tiny"), 224
    ),
}
NOTHING_TO_GATE = "no residual addition"
REFUSED = {
    **dict.fromkeys(("densenet121", "shufflenet_v2_x0_5", "squeezenet1_0"), NOTHING_TO_GATE),
    **dict.fromkeys(("vgg11_bn", "alexnet", "vovnet39a", "lcnet_050"), NOTHING_TO_GATE),
    "nf_resnet26": NOTHING_TO_GATE,  # its blocks are on timm's list of untraceable ones
    **dict.fromkeys(("googlenet", "inception_v3"), "other paths in training"),  # heads beside it
}


@pytest.mark.slow
@pytest.mark.usefixtures("timm_models")
@pytest.mark.parametrize(
    ("name", "side"),
    [
        *((f"torchvision:{name}", side) for name, side in LIBRARIES.items()),
        *((f"timm:{name}", side) for name, side in FAMILIES.items()),
    ],
)
def test_network_of_a_library(name: str, side: int) -> None:
    """In float64, so that no batch norm over a few numbers makes a difference out of rounding."""
    torch.manual_seed(0)
    channels = {"in_chans": 3} if name.startswith("timm") else {}
    model = make(name, {"num_classes": 10, **channels}).double()
    for parameter in model.parameters():
        if parameter.abs().max() < 0.01:  # a branch that starts at zero could not be told by value
            nn.init.uniform_(parameter, 0.1, 0.5)
    found = judge(model, torch.randn(2, 3, side, side, dtype=torch.float64))
    if (reason := REFUSED.get(name.partition(":")[2])) is not None:
        assert reason in str(found)
    else:
        assert isinstance(found, int), found
        assert found > 0
