"The short form of tests/fault_sweep.py: one run for every kind of fault, and the driver killed twice."
import pytest
from fault_sweep import LASTING, PASSING, sweep


@pytest.mark.slow
def test_a_sweep_with_faults_equals_one_without(tmp_path):
    found = sweep(tmp_path, seeds=3, share=0.78, at_once=2, kills=2)
    assert found["wrong"] == [] and found["left running"] == [], found
    assert found["runs"] == 9 and found["struck"] == 7 and found["drivers killed"] >= 1
    done = {line.split(":")[0] for line in found["counts"] if line.endswith(": done")}
    assert done >= {"healthy", *PASSING} - {"disk full"} and not done & set(LASTING)
