"""Fixtures that several files of tests share."""

import pytest


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of short documents. No test may change it."""
    from small_runs import write_documents

    return write_documents(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data):
    """The run of one process, in micro-batches, to which those of several are compared."""
    from several_processes import Processes

    out = tmp_path_factory.mktemp("alone") / "run"
    assert Processes(1, data, out).wait() == [0]
    return out
