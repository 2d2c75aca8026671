"""The held-out split depends on a row's group alone."""

from posttrain_lib.config.data import HeldOut
from posttrain_lib.data.split import is_held_out


def test_the_share_is_about_the_fraction() -> None:
    held = sum(is_held_out(f"group {number}", HeldOut(fraction=0.1)) for number in range(20_000))
    # 4.9 standard deviations of a binomial: sqrt(20000 * 0.1 * 0.9) = 42
    assert abs(held - 2_000) < 206


def test_another_seed_holds_out_other_groups_and_a_larger_share_holds_out_more() -> None:
    groups = [str(number) for number in range(2_000)]
    chosen = {fraction: {g for g in groups if is_held_out(g, HeldOut(fraction=fraction))} for fraction in (0.1, 0.2)}
    assert chosen[0.1] < chosen[0.2]
    assert chosen[0.1] != {g for g in groups if is_held_out(g, HeldOut(fraction=0.1, seed=1))}
