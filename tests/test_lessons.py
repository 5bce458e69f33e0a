"The page of lessons: made from records, and honest about those that are missing."
import functools
import json
import math
import shutil

import pytest

from prx_nb.lab import ablations, lessons, overview, stack

PARTS = {"combine": lessons.factorial_part, "pairs": lessons.pairs_part, "equal_time": lessons.equal_time_part, "best": functools.partial(lessons.preset_part, "best"),
         "thrifty": functools.partial(lessons.preset_part, "thrifty"), "scaling": lessons.scaling_part, "leave_one_out": lambda folder: lessons.decided_part("leave_one_out", folder)}


@pytest.mark.parametrize("name", PARTS)
def test_what_is_not_run_is_said_to_be_missing_with_the_command_that_makes_it(name, tmp_path):
    assert PARTS[name](tmp_path) == lessons.not_run(name) and f"prx-nb ablate {name} --preset cpu" in lessons.not_run(name)
    assert lessons.factorial_picture(tmp_path) is None is lessons.pairs_picture(tmp_path)


def publish(home, name, value, seeds=3, **cost):
    (folder := home / name / "records").mkdir(parents=True)
    for variant in ablations.get(name).variants:
        for seed in range(seeds):
            level = value(variant) * math.exp(0.01 * math.sin(7 * seed + len(variant)))
            run = {"variant": variant, "seed": seed, "preset": "cpu", "metrics": {"joint[vit-s14]": level}, "cost": {"images_seen": 32000} | cost,
                   "finished": f"2026-11-0{seed + 1}T00:00:00"}
            (folder / f"{variant}-s{seed}.json").write_text(json.dumps(run))


def test_a_design_that_is_not_through_is_said_to_be_so(tmp_path):
    publish(tmp_path, "combine", lambda v: 0.9 if "muon" in v else 1.0)
    for path in (tmp_path / "combine/records").glob("none-s*.json"):
        path.unlink()
    assert "is not through.** 45 runs are published; too few combinations" in lessons.factorial_part(tmp_path)
    assert lessons.factorial_picture(tmp_path) is None is stack.chosen(tmp_path)
    publish(tmp_path, "pairs", lambda v: 0.9, seeds=1)
    assert "one seed of each variant" in lessons.pairs_part(tmp_path) and lessons.pairs_picture(tmp_path) is None


def test_a_stack_that_the_rule_does_not_take_is_said_to_be_wrong(tmp_path):
    publish(tmp_path, "combine", lambda v: 0.8 if "roll" in v else 1.0)
    page = lessons.factorial_part(tmp_path)
    assert "the stack is: roll" in page and "not what the rule says" in page


def test_negative_results_have_the_change_the_days_and_no_control(tmp_path):
    publish(tmp_path, "muon", lambda v: 1.3 if v == "muon" else 1.0)
    publish(tmp_path, "training_length", lambda v: 1.3 if v != "full" else 1.0)
    seen = lessons.negatives(tmp_path)
    assert "2026-11-01 to 2026-11-03" in set(seen["run on"]) and set(seen.question) == {"muon"}
    [change] = seen[seen.variant == "muon"]["exact change"]
    assert "`optimizer.name` 'adamw' to 'muon'" in change
    shutil.rmtree(tmp_path / "muon")
    assert lessons.negatives_part(tmp_path) == "No negative result is published."


def test_no_number_of_the_page_is_written_by_hand():
    page = json.loads((overview.root() / "nbs/lessons.ipynb").read_text())
    prose = "".join("".join(c["source"]) for c in page["cells"] if c["cell_type"] == "markdown").replace("32 cards", "")
    prose = "".join(part for part in prose.split("](") for part in [part.split(")")[-1]])
    assert not [word for word in prose.split() if any(ch.isdigit() for ch in word)]
