import campaign
import pytest


@pytest.fixture(scope="session")
def untouched(tmp_path_factory):
    """A run that nobody touched, by its source; once for all tests of a session."""
    done: dict[str, campaign.Whole] = {}

    def run(source: str) -> campaign.Whole:
        if source not in done:
            done[source] = campaign.whole(tmp_path_factory.mktemp(source), source, kills=campaign.FEW)
        return done[source]

    return run
