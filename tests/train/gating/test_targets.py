"""Targets and what blocks cost: shares, messages, and which block is the cheapest to lose."""

from __future__ import annotations

import pytest

from eps_core.errors import ConfigError
from eps_train.gating.targets import BlockCosts, Flops, Latency, Parameters, Target, cheapness

COSTS = BlockCosts(currency="flops", whole=50, blocks={"a": 10, "b": 20, "c": 5}, timer="")
STAGES = {"a": "first", "b": "first", "c": "second"}


def test_a_speed_up_is_a_share_of_the_latency() -> None:
    target = Target.of("target_speedup", 2)
    assert (target.currency, target.share) == ("latency", 0.5)
    assert (str(target), target.relax) == ("--target-speedup 2", "lower --target-speedup")
    flops = Target.of("target_flops", 0.3)
    assert (flops.currency, flops.share, flops.unit) == ("flops", 0.3, "FLOPs")
    assert flops.relax == "raise --target-flops"


def test_a_target_of_the_library_has_no_option() -> None:
    assert Latency(0.5) == Target("latency", 0.5)
    assert (str(Flops(0.25)), str(Parameters(0.5))) == ("Flops(0.25)", "Parameters(0.5)")
    with pytest.raises(ConfigError, match=r"^Latency\(2\): must be between 0 and 1"):
        Latency(2)


@pytest.mark.parametrize("value", [1, 0, float("nan"), float("inf")])
def test_a_speed_up_is_above_1(value: float) -> None:
    with pytest.raises(ConfigError, match=r"^--target-speedup \w+: must be finite and above 1$"):
        Target.of("target_speedup", value)


def test_costs_add_up() -> None:
    assert COSTS.without([]) == 50
    assert COSTS.without(["a", "c"]) == 35
    assert COSTS.least(STAGES) == (50 - 20) / 50, "a and c stay"


@pytest.mark.parametrize(
    ("costs", "target", "line"),
    [
        (
            COSTS,
            Target.of("target_flops", 0.5),
            "target: 50.0% of the FLOPs (--target-flops 0.5), 25 of 50; 5 to 20 a block",
        ),
        (
            BlockCosts(
                currency="latency", whole=0.5, blocks={"a": 0.02, "b": 0.1}, timer="a clock"
            ),
            Target.of("target_speedup", 4),
            "target: 25.0% of the latency (--target-speedup 4), 0.125 of 0.500 ms a call;"
            " 0.0200 to 0.1000 ms a block (a clock)",
        ),
    ],
)
def test_a_target_in_one_line(costs: BlockCosts, target: Target, line: str) -> None:
    assert costs.describe(target) == line


def test_the_next_to_go() -> None:
    blocks = {"gain": (-0.3, 10.0), "big gain": (-0.1, 500.0), "dear": (0.2, 10.0)}
    blocks |= {"worth it": (0.2, 400.0), "free": (0.1, 0.0)}
    assert sorted(blocks, key=lambda name: cheapness(*blocks[name])) == [
        "big gain", "gain", "worth it", "dear", "free",
    ]  # fmt: skip
