"""Where the tests find the research data that is not part of the repository."""

import os
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent

# A busy machine is not an error.
hypothesis.settings.register_profile(
    "unhurried", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("unhurried")


def pytest_configure(config: pytest.Config) -> None:
    # Tests that start a script as a user would run it from the repository's root, whatever the current folder is.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of research data: `$SHARED_DATA` or `../shared`. Absent: skip, but fail in CI."""
    folder = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared"))
    if folder.is_dir():
        return folder
    message = f"no research data at {folder} (set SHARED_DATA)"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)
