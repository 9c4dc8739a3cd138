"""A third of the covering array's bundles, those of some of its models: a worker of its own may run it."""

from __future__ import annotations

import pytest

from tests.support.export_array import assert_bundle_is_right, name_of, rows_of_part


@pytest.mark.parametrize("row", rows_of_part(1), ids=name_of)
def test_bundle(row, tmp_path):
    assert_bundle_is_right(row, tmp_path)
