"""Menus of a size plan: what a measured file says of all others."""

from __future__ import annotations

import pytest

from edgelora.quant.size_plan import Menu, Option, menu_as_dict, menu_of

BODY = (Option("small", 10, 0.04), Option("large", 20, 0.01))
HEAD = (Option("small", 100, 0.05), Option("large", 110, 0.01))
MENU = Menu({"body": BODY, "head": HEAD}, fixed_bytes=5, outright=frozenset({"head"}))


def test_a_file_measured_to_be_worse_moves_bytes_from_the_head_to_the_body() -> None:
    first = MENU.plan(125)
    assert first.types == {"body": "small", "head": "large"}
    corrected = MENU.corrected(first, kl=0.01 + 3 * 0.04)
    assert corrected.options["head"] == HEAD
    assert [o.cost for o in corrected.options["body"]] == pytest.approx([0.12, 0.03])
    assert corrected.plan(125).types == {"body": "large", "head": "small"}


@pytest.mark.parametrize("kl", [0.001, 0.03, 0.3])
def test_the_measured_file_is_then_predicted_as_it_was_measured(kl: float) -> None:
    first = MENU.plan(125)
    again = MENU.corrected(first, kl).plan(125)
    assert again.types != first.types or again.kl == pytest.approx(max(kl, 0.01 + 0.04 / 16))


def test_what_is_sixteen_times_off_is_no_matter_of_scale() -> None:
    first = MENU.plan(125)
    assert MENU.corrected(first, kl=100.0).options["body"][0].cost == pytest.approx(16 * 0.04)
    assert MENU.corrected(first, kl=0.0).options["body"][0].cost == pytest.approx(0.04 / 16)


def test_without_a_head_all_costs_are_scaled_alike() -> None:
    menu = Menu({"body": BODY, "more": HEAD}, 5)
    assert menu.corrected(menu.plan(125), 0.1).plan(125).types == menu.plan(125).types


def test_a_plan_of_other_types_corrects_nothing() -> None:
    plan = MENU.plan(125)
    assert MENU.corrected(type(plan)({**plan.types, "body": "F16"}, 130, 0.0), 1.0) is MENU


def test_the_smallest_plan_within_a_loss_or_else_the_best() -> None:
    assert MENU.plan_within(0.06).types == {"body": "small", "head": "large"}
    assert MENU.plan_within(1e-9).types == {"body": "large", "head": "large"}


def test_a_menu_survives_being_stored() -> None:
    assert menu_of(menu_as_dict(MENU)) == MENU
