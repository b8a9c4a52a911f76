"""Where the tests find the research data that is not part of the repository, and how many of them do without it."""

import os
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared"))
MISSING = f"no research data at {SHARED} (set SHARED_DATA)"

# A busy machine is not an error.
hypothesis.settings.register_profile(
    "unhurried", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("unhurried")


def pytest_configure(config: pytest.Config) -> None:
    # Tests that start a script as a user would run it from the repository's root, whatever the current folder is.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests could not run without the research data."""
    left_out = [report for report in terminalreporter.stats.get("skipped", []) if MISSING in str(report.longrepr)]
    if left_out:
        terminalreporter.write_line(f"{len(left_out)} tests left out: {MISSING}")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of research data, `$SHARED_DATA` or `../shared`.

    Without it a test is skipped, but fails where `REQUIRE_RESEARCH_DATA=1` says that it has to be there.
    """
    if SHARED.is_dir():
        return SHARED
    if os.environ.get("REQUIRE_RESEARCH_DATA") == "1":
        pytest.fail(MISSING)
    pytest.skip(MISSING)
