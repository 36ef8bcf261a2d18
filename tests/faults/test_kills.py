"""Runs of two processes that are killed at random moments end as if nothing had happened: the campaign in small."""

import campaign
import pytest
import runs

from sslx import workdir


@pytest.mark.parametrize("source", [
    "mixture", *(pytest.param(source, marks=pytest.mark.slow) for source in ("text", "packed"))])
def test_killed_runs_end_identically(source, untouched, tmp_path):
    """Moments and victims are drawn from a seed; of each kind there must be some."""
    fallen = campaign.campaign(untouched(source), tmp_path, kills=campaign.FEW, seed=0)
    assert {f.moment for f in fallen} == set(campaign.MOMENTS)
    assert {f.victims for f in fallen} == set(campaign.VICTIMS)


def test_files_that_a_kill_left_half_written_are_removed(tmp_path):
    """The moment between writing and renaming is too short for the kills above to hit it reliably."""
    (tmp_path / "checkpoints").mkdir()
    for name in (".config.json.41", ".metrics.jsonl.42", "checkpoints/.UNSEALED.43", ".hidden", "metrics.jsonl"):
        (tmp_path / name).write_text("{")
    with workdir.locked(tmp_path):
        assert runs.leftovers(tmp_path) == [workdir.LOCK]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden", "checkpoints", "metrics.jsonl"]
