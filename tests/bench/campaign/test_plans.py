"""The plans: what is in them, in which order, how long they take, and what `--only` makes of
them."""

import re

import pytest

from fusedmlp.bench import cli
from fusedmlp.bench.campaign import command, plans
from fusedmlp.bench.campaign.questions import QUESTIONS
from fusedmlp.bench.campaign.steps import Step
from fusedmlp.bench.report.targets import TARGETS
from fusedmlp.testing import CASES

BRIEF = plans.PLANS["brief"].steps()
LENT = [plans.PLANS[name] for name in ("brief", "rerun")]


@pytest.mark.parametrize("plan", LENT, ids=lambda plan: plan.name)
def test_expected_seconds_add_up_to_the_box(plan):
    steps = plan.steps()
    total = plans.expected_s(steps)
    assert 0.8 * 60 * plan.minutes <= total <= 60 * plan.minutes
    assert all(step.worth for step in steps)
    # What is expected of a step fits its limit, with room for a slow machine.
    assert all(step.budget_s >= 2 * step.expected_s for step in steps)


def test_the_first_speed_comes_within_45_seconds():
    first, _, end = next(plans.timetable(BRIEF))
    assert first.name == "time:first"
    assert end <= 45


def test_the_timetable_of_a_pool_by_hand():
    steps = [
        Step("a", (), 9, expected_s=3, stage="p", at_once=2),
        Step("b", (), 9, expected_s=1, stage="p", at_once=2, needs="a"),
        Step("c", (), 9, expected_s=5, stage="p", at_once=2),
        Step("d", (), 9, expected_s=2),
    ]
    found = {s.name: (b - plans.START_S, e - plans.START_S) for s, b, e in plans.timetable(steps)}
    # b waits for a, so c takes its place.
    assert found == {"a": (0, 3), "c": (0, 5), "b": (3, 4), "d": (5, 7)}
    assert plans.expected_s(steps) == plans.START_S + 7 + plans.SUMMARY_S


def test_the_brief_plan_is_ordered_by_worth():
    names = [step.name for step in BRIEF]
    assert len(names) == len(set(names))
    for op in {case.op for case in CASES.values()}:
        assert f"check:{op}" in names
    assert {f"ask:{name}" for name in QUESTIONS} <= set(names)
    stages = list(dict.fromkeys(step.stage for step in BRIEF))
    assert stages == ["first", "checks", "speed", "memory", "late"]
    alone = {step.stage for step in BRIEF if step.at_once == 1}
    assert alone == {"first", "speed", "late"}
    # No step has what it needs in a later place.
    for step in BRIEF:
        for needed in filter(None, (step.needs, *step.without.values())):
            assert names.index(needed) < names.index(step.name)
    assert names[-1].startswith("tune:")


def test_baselines_that_compile_are_late_and_apart():
    compiling = {"compile", "compile-packed", "compile-chunked", "compile-grouped-mm", "quack",
                 "sonicmoe", "liger", "liger-moe", "flash-swiglu"}  # fmt: skip
    for step in BRIEF:
        providers = compiling.intersection(step.argv)
        if providers:
            assert step.stage == "late"
        if step.argv[3:4] == ("time",):
            assert "--provider" in step.argv  # the default would time everyone


def test_every_command_of_a_lent_plan_parses():
    parser = cli.parser()
    for plan in LENT:
        for step in plan.steps():
            module, arguments = step.argv[2], step.argv[3:]
            if module == "fusedmlp.bench":
                without = ["--without", *step.without] if step.without else []
                parser.parse_args([*arguments, *without])
            elif arguments[0] == "sanitize":
                assert arguments[2] in CASES
            elif arguments[0] == "ask":
                assert arguments[1] in QUESTIONS


def test_the_targets_are_decided_by_the_brief_plan():
    """Each op that a target names is timed, at the case and phase that it is about."""
    timed = [step.argv for step in BRIEF if step.argv[3:4] == ("time",)]
    missing = [
        target.text
        for target in TARGETS
        if target.decidable
        and not any(
            set(target.cases or (target.op,)) & set(argv)
            and (set(target.phases) & set(argv))
            and (not target.over or set(target.over) & set(argv))
            for argv in timed
        )
    ]
    assert missing == []


def test_only_takes_what_it_needs_along():
    steps = plans.only(BRIEF, "^time:cuda:gated_linear_bwd$")
    names = [step.name for step in steps]
    assert names == [
        "build", "check:cuda:gated_linear", "check:cuda:gated_mlp", "check:cuda:pingpong-cluster2",
        "check:cuda:pingpong-cluster1", "time:cuda:gated_linear_bwd",
    ]  # fmt: skip
    assert plans.only(BRIEF, None) == BRIEF


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "gated_liner"], "--only 'gated_liner' finds no step; --dry-run lists all"),
        (["--only", "("], "--only '(' is no regular expression: missing )"),
        (["--minutes", "0.3"], "--minutes 0.3 is too short for the first step, time:first: give"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "discover", lambda: pytest.fail("it asked for the machine"))
    assert cli.main(["campaign", "--out", str(tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert message in said.err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_shows_steps_worth_seconds_needs_and_where_results_go(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "220")
    monkeypatch.setattr(command, "discover", lambda: pytest.fail("it asked for the machine"))
    assert cli.main(["campaign", "--dry-run", "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    for step in BRIEF:
        (line,) = (
            line for line in text.splitlines() if re.match(rf" *\d+ +\w+ +{step.name} ", line)
        )
        assert step.worth in line
        assert f" {step.expected_s:.0f} " in line
        assert (step.needs or step.module or "-") in line
    assert f"{plans.expected_s(BRIEF):.0f} s expected" in text
    assert f"of a box of 480 s\nresults: {tmp_path / 'out'}/<gpu>-<date>-<commit>.json" in text
    assert not (tmp_path / "out").exists()
