"""Lets transformers' own tests run with `-m upstream`, and only then: they need a file from a package index."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the modules of this folder that hold no tests

import upstream_sources
from own_skips import UPSTREAM

pytest.register_assert_rewrite(upstream_sources.PACKAGE)


def _is_chosen(config: pytest.Config) -> bool:
    return bool(re.search(r"(?<!not )\bupstream\b", config.option.markexpr))


def pytest_configure(config):
    if _is_chosen(config):
        try:
            folder = upstream_sources.fetch()
        except FileNotFoundError as error:
            raise pytest.UsageError(str(error)) from None
        upstream_sources.add_stand_ins(folder)
        for name in upstream_sources.markers(folder):  # unknown ones are errors in this project
            config.addinivalue_line("markers", f"{name}: upstream's")


def pytest_ignore_collect(collection_path, config):
    """Leave the files out that import the mixins, unless they are asked for."""
    needs_mixins = collection_path.name.startswith("test_upstream_")
    return True if needs_mixins and not _is_chosen(config) else None


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    """Fail a run that skipped a test for a reason nobody has looked at."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not _is_chosen(session.config):  # a worker has none
        return
    reasons = {report.longrepr[2].removeprefix("Skipped: ") for report in reporter.stats.get("skipped", [])}
    unknown = sorted(
        reason
        for reason in reasons
        if not reason.startswith("own skip: ") and not any(one in reason for one in UPSTREAM)
    )
    if unknown:
        reporter.write_line(f"\nskipped for reasons that are not in own_skips.py: {unknown}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
